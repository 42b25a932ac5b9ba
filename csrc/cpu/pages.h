// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

namespace glimpse {

// Note [Fresh pages]
// Memory that an allocator has just asked the system for has no pages yet, and each is made when it
// is first written: a fault of 2 us for 4 KB where that was measured, more than all else that a
// large gradient costs. Asking for many pages at once takes two thirds of it. Memory that was used
// before has its pages, which costs little to find out.

/// Has pages made for memory that will be written as a whole. Only ever a matter of speed.
void prepare_pages(void* data, int64_t bytes);

/// prepare_pages on several threads.
void prepare_result(void* data, int64_t bytes, int64_t workers);

}  // namespace glimpse
