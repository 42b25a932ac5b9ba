// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/backend.h"

#include "cuda/kernels.h"

namespace glimpse {

#if defined(GLIMPSE_EMULATED)
const Backend& emulated_backend() {
  constexpr const char* kName = "emulated";
#else
const Backend& cuda_backend() {
  constexpr const char* kName = "cuda";
#endif
  static const Backend backend = {kName,
                                  false,
                                  cuda::grad_features_workspace,
                                  cuda::grad_boxes_workspace,
                                  [](const Problem&) { return false; },
                                  cuda::sample,
                                  cuda::grad_features,
                                  cuda::grad_boxes,
                                  cuda::frames_sample,
                                  cuda::frames_maximum,
                                  cuda::frames_grad_features,
                                  cuda::frames_grad_boxes,
                                  cuda::copy_glimpse_workspace,
                                  cuda::copy_glimpse,
                                  cuda::paste,
                                  cuda::paste_changes,
                                  cuda::crop_batch_workspace,
                                  cuda::crop_batch};
  return backend;
}

}  // namespace glimpse
