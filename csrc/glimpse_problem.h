// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/conventions.h"
#include "problem.h"

namespace glimpse {

/// What stands where a window leaves its image; see noise.h.
enum class Noise : int32_t { kZero = 0, kUniform = 1, kGaussian = 2 };

/// Windows of whole pixels of one call, copied bit for bit: one window for each image.
///
/// Note [Why glimpses are copied]
/// The tables of the other operators multiply pixels by weights and add them up. With weights of
/// one and zero that is the same number, but not the same bits: it takes no integers, turns -0 into
/// 0, one NaN into another, and an infinite pixel makes NaN of its neighbours. TensorFlow copies,
/// so this operator has a kernel of its own. Its derivatives are tables again.
struct GlimpseProblem {
  GlimpseRule rule;
  int64_t batch, channels;
  int32_t height, width;
  int32_t out_height, out_width;
  int32_t element_bytes;  // 1, 2, 4 or 8
  Dtype dtype;            // where noise needs numbers; else only the bytes count
  Layout layout;          // of `output`

  const void* image;  // strides are in elements and can be anything
  int64_t stride_n, stride_c, stride_h, stride_w;
  void* output;           // [batch, channels, out_height, out_width], dense in `layout`
  const void* offset;     // [batch, 2] of y, x
  int32_t double_offset;  // 1: offsets are double and windows are placed in it; 0: float

  Noise noise;
  const int64_t* seed;  // one number; null for kZero
  void* workspace;      // as many bytes as the backend asked for
  void* stream;         // of the device; unused on the host
};

/// Both spans of the window of an image.
struct GlimpseWindow {
  GlimpseSpan y, x;
};

GLIMPSE_HD GlimpseWindow glimpse_window(const GlimpseProblem& problem, int64_t image) {
  const GlimpseRule& rule = problem.rule;
  GlimpseWindow window;
  if (problem.double_offset != 0) {
    const double* offset = static_cast<const double*>(problem.offset) + 2 * image;
    window.y = glimpse_span(offset[0], rule, problem.height, problem.out_height);
    window.x = glimpse_span(offset[1], rule, problem.width, problem.out_width);
  } else {
    const float* offset = static_cast<const float*>(problem.offset) + 2 * image;
    window.y = glimpse_span(offset[0], rule, problem.height, problem.out_height);
    window.x = glimpse_span(offset[1], rule, problem.width, problem.out_width);
  }
  return window;
}

/// Whether any cell of the window lies outside the image.
GLIMPSE_HD bool leaves_image(const GlimpseProblem& problem, const GlimpseWindow& window) {
  return window.y.end - window.y.begin < problem.out_height ||
         window.x.end - window.x.begin < problem.out_width;
}

}  // namespace glimpse
