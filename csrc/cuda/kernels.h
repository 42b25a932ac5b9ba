// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>

#include "batch_problem.h"
#include "frame_problem.h"
#include "glimpse_problem.h"
#include "paste_problem.h"
#include "problem.h"

/// The launch layer: each function picks a kernel for the dtype, the layout and the sizes of a
/// problem, and launches it on problem.stream. None waits, allocates or reads device memory.
namespace glimpse::cuda {

void sample(const Problem& problem);
void grad_features(const Problem& problem);
void grad_boxes(const Problem& problem);
void paste(const PasteProblem& problem);
void paste_bits(const PasteProblem& problem);  // what paste does for PasteResult::kBits
void paste_changes(const PasteProblem& problem, const PasteChanges& changes);
void crop_batch(const BatchProblem& batch);
size_t crop_batch_workspace(const BatchProblem& batch);

/// The first three where cells weigh pixels; they are called by those. The gradient to the features
/// needs the workspace.
void filter_sample(const Problem& problem);
void filter_grad_features(const Problem& problem);
void filter_grad_boxes(const Problem& problem);
size_t filter_workspace(const Problem& problem);

/// grad_features where boxes are points, and whether they are; called by it. It needs the
/// workspace.
bool gathers_points(const Problem& problem);
void points_grad_features(const Problem& problem);
size_t points_workspace(const Problem& problem);

void frames_sample(const FrameProblem& problem);
void frames_maximum(const FrameProblem& problem);
void frames_grad_features(const FrameProblem& problem);
void frames_grad_boxes(const FrameProblem& problem);

/// Bytes of problem.workspace that a gradient needs; they depend on sizes only.
size_t grad_features_workspace(const Problem& problem);
size_t grad_boxes_workspace(const Problem& problem);

void copy_glimpse(const GlimpseProblem& problem);
size_t copy_glimpse_workspace(const GlimpseProblem& problem);

}  // namespace glimpse::cuda
