// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "backend.h"

namespace glimpse {

/// The CUDA sources compiled for the host, where cuda_emulation.h plays the GPU. Image indices are
/// not checked on the host, as on CUDA.
const Backend& emulated_backend();

}  // namespace glimpse
