// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>

// Pages of memory that results lie in. All of this is advice to the operating system: it changes
// no number, works on Linux and does nothing elsewhere, and what the system refuses is left.
//
// Note [Pages in advance]
// A large result is mostly memory that the process has just been given, and the first write to
// each of its pages traps into the system: two microseconds for 4 KiB, more than the arithmetic of
// most operators. The pages of a whole range are made in one request for two thirds of that, and
// on all threads.

namespace glimpse {

/// Whether large results are advised to huge pages; GLIMPSE_HUGE_PAGES=1 at first.
bool huge_pages();
void set_huge_pages(bool advise);

/// Advises the huge pages that lie inside a large result, if that is wanted.
void advise_pages(void* data, size_t bytes);

/// For a result that will be written in full: advises its pages and makes those that are
/// not there yet.
void prepare_result(void* data, size_t bytes);

/// Makes the pages of [begin, end).
void populate_pages(void* begin, void* end);

}  // namespace glimpse
