// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>

#include "paste_problem.h"
#include "problem.h"

/// The launch layer: each function picks a kernel for the dtype, the layout and the sizes of a
/// problem, and launches it on problem.stream. None waits, allocates or reads device memory.
namespace glimpse::cuda {

void sample(const Problem& problem);
void grad_features(const Problem& problem);
void grad_boxes(const Problem& problem);
void paste(const PasteProblem& problem);

/// Bytes of problem.workspace that grad_features needs; depends on sizes only.
size_t grad_features_workspace(const Problem& problem);

}  // namespace glimpse::cuda
