// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "frame_problem.h"

namespace glimpse {

// The applications of Backend on frames, on the CPU: tables of merged taps, threads.
void cpu_frames_sample(const FrameProblem& problem);
void cpu_frames_maximum(const FrameProblem& problem);
void cpu_frames_grad_features(const FrameProblem& problem);
void cpu_frames_grad_boxes(const FrameProblem& problem);

// The same by the shortest loops, in double, serially: what the others are compared with.
void simple_frames_sample(const FrameProblem& problem);
void simple_frames_maximum(const FrameProblem& problem);
void simple_frames_grad_features(const FrameProblem& problem);
void simple_frames_grad_boxes(const FrameProblem& problem);

/// Offset of element [k, c, y, x] of a tensor like `pooled`.
inline int64_t pooled_offset(const FrameProblem& problem, int64_t k, int64_t c, int64_t y,
                             int64_t x) {
  if (problem.layout == Layout::kNhwc) {
    return ((k * problem.out_height + y) * problem.out_width + x) * problem.channels + c;
  }
  return ((k * problem.channels + c) * problem.out_height + y) * problem.out_width + x;
}

}  // namespace glimpse
