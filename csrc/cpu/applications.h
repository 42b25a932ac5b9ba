// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "batch_problem.h"
#include "glimpse_problem.h"
#include "paste_problem.h"
#include "problem.h"

namespace glimpse {

// The three applications of Backend on the CPU: each plans, splits the work into tasks and runs
// the kernels of the instruction set in use.
void cpu_sample(const Problem& problem);
void cpu_grad_features(const Problem& problem);
void cpu_grad_boxes(const Problem& problem);
void cpu_copy_glimpse(const GlimpseProblem& problem);

void cpu_paste(const PasteProblem& problem);
void cpu_paste_bits(const PasteProblem& problem);  // what cpu_paste does for PasteResult::kBits

void cpu_crop_batch(const BatchProblem& batch);

}  // namespace glimpse
