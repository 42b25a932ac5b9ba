// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/backend.h"

namespace glimpse {

const Backend& cpu_backend() { return simple_backend(); }

}  // namespace glimpse
