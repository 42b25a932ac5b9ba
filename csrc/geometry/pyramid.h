// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>

#include "geometry/rounded.h"

namespace glimpse {

/// Which level of a feature pyramid serves a box.
struct LevelRule {
  enum Kind : int32_t { kTorchvision = 0, kDetectron2 = 1, kKinds };

  int32_t kind;
  int32_t canonical_level;
  double canonical_size;
  int32_t first, last;  // levels of the finest and the coarsest feature map
};

/// The level number of a spatial scale: -log2(scale), truncated.
GLIMPSE_HD int32_t level_of_scale(double scale) {
  return static_cast<int32_t>(-portable_log2(static_cast<double>(static_cast<float>(scale))));
}

/// Index of the feature map for the box x1, y1, x2, y2, or -1 where the rule finds none (one side
/// negative, or NaN). The two libraries differ in where their epsilon stands:
///   torchvision  floor(canonical_level + log2(sqrt(area) / canonical_size) + 1e-6)
///   detectron2   floor(canonical_level + log2(sqrt(area) / canonical_size + 1e-8))
/// evaluated in the dtype of the coordinates, like theirs where boxes and maps have one dtype.
template <class T>
GLIMPSE_HD int32_t assign_level(const LevelRule& rule, const T* box) {
  using R = Rounded<T>;
  const R area = (R(box[2]) - R(box[0])) * (R(box[3]) - R(box[1]));
  if (!(area.value >= 0)) return -1;
  R ratio = R(rounded_sqrt(area.value)) / R(static_cast<T>(rule.canonical_size));
  if (rule.kind == LevelRule::kDetectron2) ratio = ratio + R(static_cast<T>(1e-8));
  const R log2(static_cast<T>(portable_log2(static_cast<double>(ratio.value))));
  R level = R(static_cast<T>(rule.canonical_level)) + log2;
  if (rule.kind == LevelRule::kTorchvision) level = level + R(static_cast<T>(1e-6));
  if (!(level.value >= static_cast<T>(rule.first))) return 0;  // also -inf
  if (level.value >= static_cast<T>(rule.last)) return rule.last - rule.first;
  const int32_t whole = static_cast<int32_t>(level.value);
  const int32_t floor = whole - (static_cast<T>(whole) > level.value ? 1 : 0);
  return floor - rule.first;
}

}  // namespace glimpse
