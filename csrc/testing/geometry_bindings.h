// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <pybind11/pybind11.h>

namespace glimpse::testing {

/// Adds the geometry to the test module: operators (roi_align, crop, glimpse, given_axes) for
/// axis_table, borders for border_taps, the axes of pasted masks, and the levels of a pyramid.
void bind_geometry(pybind11::module_& module);

}  // namespace glimpse::testing
