// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "problem.h"

namespace glimpse {

// Boxes of one cell and one sample. A window that is turned from pixels to channels in registers
// would be a pixel wide, and a plan of it takes longer than the reading: here every point reads its
// four pixels from each plane, a few planes at a time so that these stay in the cache, or where
// channels are neighbours from all of them at once.

/// Whether the functions below serve `problem`.
bool is_points(const Problem& problem);
/// The same for float and double only.
bool is_wide_points(const Problem& problem);

void sample_points(const Problem& problem);
void grad_boxes_of_points(const Problem& problem);
/// is_wide_points() only.
void grad_features_of_points(const Problem& problem);

}  // namespace glimpse
