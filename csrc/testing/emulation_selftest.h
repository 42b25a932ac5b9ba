// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <string>
#include <tuple>
#include <vector>

namespace glimpse::testing {

/// Runs small kernels with known answers and with known faults on the CUDA emulation. One row per
/// test: its name, whether it passed, and what was wrong.
std::vector<std::tuple<std::string, bool, std::string>> emulation_selftests();

}  // namespace glimpse::testing
