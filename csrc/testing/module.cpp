// SPDX-License-Identifier: BSD-3-Clause
// glimpse_ext._testing: NumPy to the geometry, and which backend runs the operators. Tests only;
// not part of a wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/backend.h"
#include "cuda/backend.h"
#include "geometry/pyramid.h"
#include "geometry/tables.h"
#include "testing/emulation_bindings.h"

namespace py = pybind11;

extern "C" const glimpse::Backend* glimpse_replace_backend(const glimpse::Backend* backend);

namespace glimpse::testing {
namespace {

/// A merged row in vectors, as build_row() wants it.
template <class T>
struct Row {
  std::vector<int32_t> pixels;
  std::vector<T> weights, slopes_origin, slopes_step;

  int32_t size() const { return static_cast<int32_t>(pixels.size()); }
  int32_t pixel(int32_t i) const { return pixels[i]; }
  void add(int32_t i, T weight, T slope_origin, T slope_step) {
    weights[i] += weight;
    slopes_origin[i] += slope_origin;
    slopes_step[i] += slope_step;
  }
  void push(int32_t pixel, T weight, T slope_origin, T slope_step) {
    pixels.push_back(pixel);
    weights.push_back(weight);
    slopes_origin.push_back(slope_origin);
    slopes_step.push_back(slope_step);
  }
  void scale(int32_t i, T factor) {
    weights[i] *= factor;
    slopes_origin[i] *= factor;
    slopes_step[i] *= factor;
  }
};

template <class T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

Operator make_operator(const std::string& kind, int32_t sampling_ratio, bool aligned) {
  if (kind != "roi_align") throw std::invalid_argument("unknown operator kind " + kind);
  return Operator(RoiAlign{sampling_ratio, aligned ? 1 : 0});
}

template <class T>
py::dict axis_table_as(const Operator& op, double lo, double hi, double scale, int32_t cells,
                       int32_t size) {
  T box[4] = {};
  box[op.lo_column(kY)] = static_cast<T>(lo);
  box[op.hi_column(kY)] = static_cast<T>(hi);
  const Axis<T> axis = op.axis(kY, box, static_cast<T>(scale), size, cells);
  Row<T> all;
  std::vector<int32_t> offsets{0}, capacities;
  std::vector<T> positions;
  for (int32_t cell = 0; cell < cells; ++cell) {
    Row<T> row;
    build_row(op, axis, Weighting<T>::value(), cell, size, row);
    for (int32_t i = 0; i < row.size(); ++i) {
      all.push(row.pixels[i], row.weights[i], row.slopes_origin[i], row.slopes_step[i]);
    }
    offsets.push_back(all.size());
    capacities.push_back(row_capacity(op, axis, cell, size));
    if (axis.samples <= 4096) {
      for (int32_t i = 0; i < axis.samples; ++i) positions.push_back(axis.position(cell, i));
    }
  }
  const std::vector<T> jacobian{axis.origin_lo, axis.origin_hi, axis.step_lo, axis.step_hi};
  py::dict result;
  result["samples"] = axis.samples;
  result["origin"] = axis.origin;
  result["step"] = axis.step;
  result["position"] = to_numpy(positions);
  result["offset"] = to_numpy(offsets);
  result["capacity"] = to_numpy(capacities);
  result["pixel"] = to_numpy(all.pixels);
  result["weight"] = to_numpy(all.weights);
  result["slope_origin"] = to_numpy(all.slopes_origin);
  result["slope_step"] = to_numpy(all.slopes_step);
  result["jacobian"] = to_numpy(jacobian).reshape({2, 2});
  return result;
}

py::dict axis_table(const std::string& kind, double lo, double hi, double scale,
                    int32_t sampling_ratio, bool aligned, int32_t cells, int32_t size,
                    const std::string& dtype) {
  const Operator op = make_operator(kind, sampling_ratio, aligned);
  if (dtype == "float32") return axis_table_as<float>(op, lo, hi, scale, cells, size);
  if (dtype == "float64") return axis_table_as<double>(op, lo, hi, scale, cells, size);
  throw std::invalid_argument("dtype must be float32 or float64, got " + dtype);
}

int32_t assign_level_as(const std::vector<double>& box, const std::string& rule,
                        double canonical_size, int32_t canonical_level,
                        const std::vector<double>& scales, const std::string& dtype) {
  LevelRule level_rule;
  level_rule.kind = rule == "detectron2" ? LevelRule::kDetectron2 : LevelRule::kTorchvision;
  level_rule.canonical_size = canonical_size;
  level_rule.canonical_level = canonical_level;
  level_rule.first = level_of_scale(scales.front());
  level_rule.last = level_of_scale(scales.back());
  if (dtype == "float64") return assign_level(level_rule, box.data());
  const std::vector<float> single(box.begin(), box.end());
  return assign_level(level_rule, single.data());
}

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

  m.def("axis_table", &testing::axis_table, "kind"_a, "lo"_a, "hi"_a, "scale"_a, "sampling_ratio"_a,
        "aligned"_a, "cells"_a, "size"_a, "dtype"_a = "float64");
  m.def("assign_level", &testing::assign_level_as, "box"_a, "rule"_a, "canonical_size"_a,
        "canonical_level"_a, "scales"_a, "dtype"_a = "float32");
  m.def("log2", &glimpse::portable_log2);
  m.def("paste_axis", &testing::paste_axis_of, "lo"_a, "hi"_a, "mask"_a, "mask_width"_a,
        "snapped"_a, "dtype"_a = "float32", "(origin, step, samples) of one direction of a mask.");
  m.def("use_backend", &testing::use_backend, "name"_a,
        "Runs the CPU operators on a backend (cpu, simple, emulated); returns the previous name.");

  testing::bind_emulation(m);
}
