// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/frames.h"

namespace glimpse {
void cpu_frames_sample(const FrameProblem& p) { simple_frames_sample(p); }
void cpu_frames_maximum(const FrameProblem& p) { simple_frames_maximum(p); }
void cpu_frames_grad_features(const FrameProblem& p) { simple_frames_grad_features(p); }
void cpu_frames_grad_boxes(const FrameProblem& p) { simple_frames_grad_boxes(p); }
}  // namespace glimpse
