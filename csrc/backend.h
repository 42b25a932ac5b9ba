// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>

#include "batch_problem.h"
#include "frame_problem.h"
#include "glimpse_problem.h"
#include "paste_problem.h"
#include "problem.h"

namespace glimpse {

/// The three applications of the tables. Everything an operator does is made of these:
///   sample         pooled   = Ay * features * Ax^T
///   grad_features  features = Ay^T * pooled * Ax, summed over boxes in box order
///   grad_boxes     grad_box = <pooled, d/d box (Ay * features * Ax^T)>
/// With tangent axes, Ay or Ax is replaced by its derivative along the tangent (in grad_boxes: the
/// axis that is not differentiated), so derivatives of every order use the same three.
///
/// Contract: every output element is written exactly once by one owner, which adds its terms in
/// an order that depends on nothing but the problem. No output needs to be cleared before.
struct Backend {
  const char* name;
  /// Boxes lie in host memory and image indices are checked before the call.
  bool checks_image_index;
  /// Bytes of Problem::workspace that a call needs.
  size_t (*grad_features_workspace)(const Problem&);
  size_t (*grad_boxes_workspace)(const Problem&);
  /// Whether both gradients of this problem may have `strided` pooled values.
  bool (*reads_strided)(const Problem&);
  void (*sample)(const Problem&);
  void (*grad_features)(const Problem&);
  void (*grad_boxes)(const Problem&);
  /// The same on frames, sample by sample, for operators that are not separable. frames_maximum
  /// pools by the largest sample and says which that was; the derivatives of the maximum are the
  /// other three with it as FrameProblem::chosen. None needs a workspace.
  void (*frames_sample)(const FrameProblem&);
  void (*frames_maximum)(const FrameProblem&);
  void (*frames_grad_features)(const FrameProblem&);
  void (*frames_grad_boxes)(const FrameProblem&);
  /// Windows of whole pixels, copied; not an application of tables: Note [Why glimpses are copied].
  size_t (*copy_glimpse_workspace)(const GlimpseProblem&);
  void (*copy_glimpse)(const GlimpseProblem&);
  /// Masks into images. The value has the derivatives of sample with the axes of the masks given.
  void (*paste)(const PasteProblem&);
  /// Where their images change, without the images. None: runs are made on the host at once.
  void (*paste_changes)(const PasteProblem&, const PasteChanges&);
  /// Resized crops of several images. The value, before it is scaled and converted, is that of
  /// sample with a filter, and so are its derivatives.
  size_t (*crop_batch_workspace)(const BatchProblem&);
  void (*crop_batch)(const BatchProblem&);
};

}  // namespace glimpse
