// SPDX-License-Identifier: BSD-3-Clause
#pragma once

// Not "backend.h", which would be this file.
#include "../backend.h"

namespace glimpse {

/// The kernels on the current GPU. An image index outside the batch makes a row of zeros, because
/// reading it on the host would have to wait for the device.
const Backend& cuda_backend();

/// The same sources compiled with GLIMPSE_EMULATED: the kernels on this CPU, for tests.
const Backend& emulated_backend();

}  // namespace glimpse
