// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "paste_problem.h"

namespace glimpse {

/// A mask in its image as runs of equal pixels, in the order of COCO: column after column, first a
/// run of zeros, then one of ones and so on.
struct PastedRuns {
  std::vector<int64_t> lengths;
  int64_t area = 0;                        // pixels that are 1
  int64_t x1 = 0, y1 = 0, x2 = 0, y2 = 0;  // their tight box in edge units; zeros without any
};

/// The runs of the image that a kThreshold problem describes, for each mask; there is no image.
void cpu_paste_runs(const PasteProblem& problem, PastedRuns* runs);

/// Appends the `counts` of COCO's compressed run lengths.
void append_coco_counts(const std::vector<int64_t>& lengths, std::string& text);

}  // namespace glimpse
