// SPDX-License-Identifier: BSD-3-Clause
#pragma once

// Not "backend.h", which would be this file.
#include "../backend.h"

namespace glimpse {

/// The backend of the CPU dispatch key: merged tables, vector kernels, threads.
const Backend& cpu_backend();

/// The same numbers by the shortest loops that can be read: what cpu_backend() is tested against.
const Backend& simple_backend();

}  // namespace glimpse
