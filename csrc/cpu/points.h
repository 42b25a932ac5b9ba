// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "problem.h"

namespace glimpse {

// Boxes of one cell and one sample in an image whose channels lie apart. A window that is turned
// from pixels to channels in registers would be a pixel wide; here every point reads its four
// pixels from each plane, a few planes at a time so that these stay in the cache.

/// Whether the functions below serve `problem`.
bool is_points(const Problem& problem);

void sample_points(const Problem& problem);
void grad_boxes_of_points(const Problem& problem);
/// float and double only.
void grad_features_of_points(const Problem& problem);

}  // namespace glimpse
