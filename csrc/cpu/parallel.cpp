// SPDX-License-Identifier: BSD-3-Clause
#include "ops/config.h"
// clang-format off: config.h decides which functions the torch headers declare.
#include <torch/csrc/stable/ops.h>
// clang-format on

#include "cpu/parallel.h"

#include <pthread.h>

#include <exception>
#include <mutex>

namespace glimpse {

namespace {

// Note [After fork]
// A forked process has one thread, whatever libtorch's pool believes: OpenMP would wait for workers
// that exist in the parent only, and never return. What has been forked, such as a worker of a
// DataLoader, therefore works in its one thread. Results do not depend on it.
bool forked = false;

// Before any operator can run; a thread that forks does nothing else meanwhile.
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void parallel_ranges(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(void* context, int64_t first, int64_t end), void* context) {
  if (begin >= end) return;
  if (forked) return body(context, begin, end);
  // An exception must not cross the C interface below, nor leave a worker thread.
  std::mutex mutex;
  std::exception_ptr failure;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      body(context, first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

int64_t parallel_threads() { return forked ? 1 : torch::stable::get_num_threads(); }

}  // namespace glimpse
