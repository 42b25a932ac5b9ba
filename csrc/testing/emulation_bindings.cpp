// SPDX-License-Identifier: BSD-3-Clause
#ifndef GLIMPSE_EMULATED
#define GLIMPSE_EMULATED 1
#endif
#include "testing/emulation_bindings.h"

#include <pybind11/stl.h>

#include "testing/cuda_emulation.h"
#include "testing/emulation_selftest.h"

namespace glimpse::testing {

void bind_emulation(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("emulation_selftests", &emulation_selftests,
             "Rows (name, passed, what was wrong) of the emulation's own tests.");
  module.def("emulation_seed", &emulation::seed, "The seed of the order of threads and blocks.");
  module.def("emulation_set_seed", &emulation::set_seed, py::arg("seed"),
             "Another order of threads and blocks; 0 is the natural one.");
  module.def(
      "emulation_reached_sites",
      [] {
        std::vector<std::tuple<std::string, std::string, uint64_t>> rows;
        for (const emulation::Site& site : emulation::reached_sites()) {
          rows.emplace_back(site.name, site.call, site.reached);
        }
        return rows;
      },
      "Rows (place, call, count) of the barriers, collectives and copy waits that threads "
      "reached.");
  module.def("emulation_skip_site", &emulation::skip_site, py::arg("name"),
             "Turn the barrier or wait at this place into nothing ('' for none); returns the place "
             "before.");
  module.def(
      "emulation_set_launcher",
      [](uintptr_t address) {
        emulation::set_launcher(reinterpret_cast<emulation::Launcher>(address));
      },
      py::arg("address"),
      "Hands launches to the C function at this address (emulation::Launcher); 0 ends that.");
}

}  // namespace glimpse::testing
