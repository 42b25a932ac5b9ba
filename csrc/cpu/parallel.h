// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace glimpse {

/// Calls body(context, first, end) on disjoint ranges that together are [begin, end), on several
/// threads when there are more than `grain` iterations. An exception of a body, bad_alloc say,
/// leaves from here after all bodies have ended.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(void* context, int64_t first, int64_t end), void* context);

/// Threads that parallel_ranges uses at most. Nothing that decides a result may depend on it.
int64_t parallel_threads();

/// parallel_ranges with body(first, end) being any callable.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, Body&& body) {
  using Callable = std::remove_reference_t<Body>;
  parallel_ranges(
      begin, end, grain,
      [](void* context, int64_t first, int64_t last) {
        (*static_cast<Callable*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

/// Runs the tasks 0..tasks - 1 on up to `workers` threads, each of which takes the next task when
/// it is free. Calls body(next) once per thread; next() gives a task, or `tasks` and more at the
/// end.
template <class Body>
void parallel_tasks(int64_t tasks, int64_t workers, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&taken] { return taken.fetch_add(1, std::memory_order_relaxed); };
  parallel_for(0, workers < tasks ? workers : tasks, 1, [&](int64_t, int64_t) { body(next); });
}

/// Threads that are worth waking for `outputs` numbers.
inline int64_t workers_for(int64_t outputs) {
  constexpr int64_t kOutputsPerThread = 1 << 14;
  const int64_t wanted = outputs / kOutputsPerThread;
  if (wanted <= 1) return 1;
  const int64_t threads = parallel_threads();
  return wanted < threads ? wanted : threads;
}

}  // namespace glimpse
