// SPDX-License-Identifier: BSD-3-Clause
// glimpse_ext._testing: NumPy to the geometry, and which backend runs the operators. Tests only;
// not part of a wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/backend.h"
#include "cuda/backend.h"
#include "geometry/sincos.h"
#include "noise.h"
#include "testing/emulation_bindings.h"
#include "testing/geometry_bindings.h"

namespace py = pybind11;

extern "C" const glimpse::Backend* glimpse_replace_backend(const glimpse::Backend* backend);

namespace glimpse::testing {
namespace {

template <class T>
py::tuple paste_axis_as(double lo, double hi, int32_t mask, int32_t mask_width, bool snapped) {
  const T grow = static_cast<T>((mask_width + 2.0) / mask_width);
  const Axis<T> axis = snapped
                           ? snapped_paste_axis(static_cast<T>(lo), static_cast<T>(hi), grow, mask)
                           : paste_axis(static_cast<T>(lo), static_cast<T>(hi), mask);
  return py::make_tuple(axis.origin, axis.step, axis.samples);
}

py::tuple paste_axis_of(double lo, double hi, int32_t mask, int32_t mask_width, bool snapped,
                        const std::string& dtype) {
  if (dtype == "float64") return paste_axis_as<double>(lo, hi, mask, mask_width, snapped);
  return paste_axis_as<float>(lo, hi, mask, mask_width, snapped);
}

const Backend* find_backend(const std::string& name) {
  if (name == "cpu") return nullptr;  // the library's own
  if (name == "simple") return &simple_backend();
  if (name == "emulated") return &emulated_backend();
  throw std::invalid_argument("backend must be cpu, simple or emulated, got " + name);
}

std::string use_backend(const std::string& name) {
  const Backend* previous = glimpse_replace_backend(find_backend(name));
  return previous == nullptr ? "cpu" : previous->name;
}

}  // namespace
}  // namespace glimpse::testing

PYBIND11_MODULE(_testing, m) {
  using namespace pybind11::literals;
  namespace testing = glimpse::testing;

  m.def(
      "sincos",
      [](double angle, bool degrees) {
        const glimpse::SinCos turned = glimpse::portable_sincos(angle, degrees);
        return std::make_pair(turned.sine, turned.cosine);
      },
      "angle"_a, "degrees"_a);
  m.def("normal_quantile", &glimpse::normal_quantile);
  m.def("philox", [](uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    const glimpse::RandomBits bits = glimpse::philox(seed, c0, c1, c2, c3);
    return std::vector<uint32_t>(bits.word, bits.word + 4);
  });
  m.def("paste_axis", &testing::paste_axis_of, "lo"_a, "hi"_a, "mask"_a, "mask_width"_a,
        "snapped"_a, "dtype"_a = "float32", "(origin, step, samples) of one direction of a mask.");
  m.def("use_backend", &testing::use_backend, "name"_a,
        "Runs the CPU operators on a backend (cpu, simple, emulated); returns the previous name.");

  testing::bind_geometry(m);
  testing::bind_emulation(m);
}
