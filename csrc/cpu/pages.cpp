// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/parallel.h"

namespace glimpse {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

bool wanted_by_environment() {
  const char* value = std::getenv("GLIMPSE_HUGE_PAGES");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

std::atomic<bool> advise_huge_pages{wanted_by_environment()};

uintptr_t address_of(void* data) { return reinterpret_cast<uintptr_t>(data); }
void* pointer_to(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

bool huge_pages() { return advise_huge_pages.load(std::memory_order_relaxed); }
void set_huge_pages(bool advise) { advise_huge_pages.store(advise, std::memory_order_relaxed); }

#if defined(__linux__)

namespace {

uintptr_t page_size() {
  static const auto size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return size;
}

/// Whether the page of an address is memory already.
bool is_resident(uintptr_t address) {
  unsigned char resident = 1;
  return mincore(pointer_to(address & ~(page_size() - 1)), 1, &resident) != 0 ||
         (resident & 1) != 0;
}

}  // namespace

void advise_pages(void* data, size_t bytes) {
  if (bytes < 2 * kHugePage || !huge_pages()) return;
  const uintptr_t first = (address_of(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address_of(data) + bytes) / kHugePage * kHugePage;
  madvise(pointer_to(first), last - first, MADV_HUGEPAGE);
}

void populate_pages(void* begin, void* end) {
#if !defined(MADV_POPULATE_WRITE)
  constexpr int MADV_POPULATE_WRITE = 23;  // in Linux 5.14 and later
#endif
  static std::atomic<bool> known{true};
  if (!known.load(std::memory_order_relaxed)) return;
  const uintptr_t first = address_of(begin) & ~(page_size() - 1);
  const uintptr_t last = (address_of(end) + page_size() - 1) & ~(page_size() - 1);
  if (madvise(pointer_to(first), last - first, MADV_POPULATE_WRITE) != 0 && errno == EINVAL) {
    known.store(false, std::memory_order_relaxed);
  }
}

void prepare_result(void* data, size_t bytes) {
  constexpr size_t kLeast = size_t{1} << 20;
  if (bytes < kLeast) return;
  advise_pages(data, bytes);
  const uintptr_t begin = address_of(data), end = begin + bytes;
  // Memory that was used before is there in whole, so one page speaks for its neighbours.
  const auto piece = [&](int64_t i) { return begin / kHugePage * kHugePage + i * kHugePage; };
  const auto last_byte = [&](int64_t i) { return piece(i + 1) < end ? piece(i + 1) - 1 : end - 1; };
  const auto pieces = static_cast<int64_t>((end - 1) / kHugePage - begin / kHugePage + 1);
  int64_t first = 0;
  while (first < pieces && is_resident(last_byte(first))) ++first;
  parallel_for(first, pieces, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      if (is_resident(last_byte(i))) continue;
      populate_pages(pointer_to(piece(i) < begin ? begin : piece(i)), pointer_to(last_byte(i) + 1));
    }
  });
}

#else

void advise_pages(void*, size_t) {}
void populate_pages(void*, void*) {}
void prepare_result(void*, size_t) {}

#endif

}  // namespace glimpse

/// set_huge_pages() and huge_pages() for whoever has the shared library only.
extern "C" __attribute__((visibility("default"))) void glimpse_set_huge_pages(int advise) {
  glimpse::set_huge_pages(advise != 0);
}
extern "C" __attribute__((visibility("default"))) int glimpse_huge_pages() {
  return glimpse::huge_pages() ? 1 : 0;
}
