// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "coco_runs.h"
#include "paste_problem.h"

namespace glimpse {

/// The runs of the images that a kThreshold problem describes, one for each mask. No image is made.
void cpu_paste_runs(const PasteProblem& problem, CocoMask* runs);

}  // namespace glimpse
