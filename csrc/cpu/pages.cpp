// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/pages.h"

#include <algorithm>

#include "cpu/parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older ones say that they do not know it
#endif
#endif

namespace glimpse {

void prepare_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kLeast = 1 << 17;  // bytes
  constexpr uintptr_t kPages = 256;    // that are looked at together
  if (bytes < kLeast) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(data);
  // Whole pages: those at the ends hold a first and a last byte, so they exist.
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
  for (uintptr_t at = first / page * page; at < end; at += kPages * page) {
    const uintptr_t size = std::min(kPages * page, end - at);
    unsigned char present[kPages];
    auto* start = reinterpret_cast<void*>(at);
    if (mincore(start, size, present) != 0) return;
    const auto count = static_cast<int64_t>(size / page);
    const auto missing =
        std::count_if(present, present + count, [](unsigned char p) { return (p & 1) == 0; });
    // Those that are there cost time too.
    if (4 * missing > count && madvise(start, size, MADV_POPULATE_WRITE) != 0) return;
  }
#else
  (void)data;
  (void)bytes;
#endif
}

void prepare_result(void* data, int64_t bytes, int64_t workers) {
  constexpr int64_t kChunk = 1 << 21;
  if (workers <= 1) return prepare_pages(data, bytes);
  parallel_for(0, (bytes + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t end) {
    prepare_pages(static_cast<char*>(data) + first * kChunk,
                  std::min(end * kChunk, bytes) - first * kChunk);
  });
}

}  // namespace glimpse
