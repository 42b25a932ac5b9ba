// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <pybind11/pybind11.h>

namespace glimpse::testing {

/// Adds the controls of the CUDA emulation to the test module: emulation_selftests, emulation_seed,
/// emulation_set_seed, emulation_reached_sites and emulation_skip_site.
void bind_emulation(pybind11::module_& module);

}  // namespace glimpse::testing
