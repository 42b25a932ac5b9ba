// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <stdexcept>

#include "half.h"
#include "problem.h"

namespace glimpse {

/// Names a type as a value, so that a generic lambda can be called with it.
template <class T>
struct Type {
  using type = T;
};

/// Calls apply(Type<T>()) with the storage type T of gradients of features.
template <class Apply>
void with_gradient_type(Dtype dtype, const Apply& apply) {
  switch (dtype) {
    case Dtype::kFloat32:
      return apply(Type<float>());
    case Dtype::kFloat64:
      return apply(Type<double>());
    case Dtype::kFloat16:
      return apply(Type<half>());
    case Dtype::kBFloat16:
      return apply(Type<bfloat16>());
    case Dtype::kUInt8:
      break;  // Integers have no gradient.
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

/// Calls apply(Type<T>()) with the storage type T of features.
template <class Apply>
void with_feature_type(Dtype dtype, const Apply& apply) {
  if (dtype == Dtype::kUInt8) return apply(Type<uint8_t>());
  with_gradient_type(dtype, apply);
}

}  // namespace glimpse
