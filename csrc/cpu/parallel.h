// SPDX-License-Identifier: BSD-3-Clause
#pragma once

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

}  // namespace glimpse
