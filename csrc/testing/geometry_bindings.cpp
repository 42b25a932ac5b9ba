// SPDX-License-Identifier: BSD-3-Clause
#include "testing/geometry_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry/pyramid.h"
#include "geometry/tables.h"

namespace glimpse::testing {
namespace {

namespace py = pybind11;

template <class T>
T choose(const char* what, const std::string& name, const std::map<std::string, T>& choices) {
  const auto found = choices.find(name);
  if (found == choices.end()) throw std::invalid_argument("unknown " + (what + (" " + name)));
  return found->second;
}

// Calls function(T()) with the type that `dtype` names.
template <class Function>
auto with_dtype(const std::string& dtype, const Function& function) {
  if (dtype == "float32") return function(float());
  if (dtype == "float64") return function(double());
  throw std::invalid_argument("dtype must be float32 or float64, got " + dtype);
}

Operator roi_align(int32_t sampling_ratio, bool aligned) {
  return Operator(RoiAlign{sampling_ratio, aligned ? 1 : 0});
}

Operator crop(const std::string& unit, bool align_corners, const std::string& outside, bool nearest,
              bool single) {
  Crop crop = {};
  crop.order = Crop::kXyxy;
  crop.unit = choose<Unit>("unit", unit,
                           {{"fraction", Unit::kFraction},
                            {"normalized", Unit::kNormalized},
                            {"pixels", Unit::kPixels}});
  crop.align_corners = align_corners;
  crop.outside = choose<int32_t>(
      "outside", outside, {{"zeros", Crop::kZeros}, {"edge", Crop::kEdge}, {"fill", Crop::kFill}});
  crop.nearest = nearest;
  crop.single = single;
  return Operator(crop);
}

Operator glimpse_of(int32_t version, bool centered, bool normalized, int32_t scale) {
  return Operator(
      Glimpse{{version, centered ? 1 : 0, normalized ? 1 : 0}, scale, Glimpse::kFraction});
}

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

template <class T>
py::dict axis_table_as(const Operator& op, double lo, double hi, int32_t cells, int32_t size,
                       double scale) {
  T box[4] = {};
  // An axis that is made of one number has one column, and `lo` is that number.
  box[op.hi_column(kY)] = static_cast<T>(hi);
  box[op.lo_column(kY)] = static_cast<T>(lo);
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

py::dict axis_table(const Operator& op, double lo, double hi, int32_t cells, int32_t size,
                    double scale, const std::string& dtype) {
  return with_dtype(
      dtype, [&](auto t) { return axis_table_as<decltype(t)>(op, lo, hi, cells, size, scale); });
}

/// What pixels a border gives to positions: one row of two taps for each.
template <class T>
py::dict border_taps_as(const Border& border, const std::vector<double>& positions, int32_t size) {
  std::vector<bool> inside;
  std::vector<int32_t> counts, pixels;
  std::vector<T> weights, slopes;
  for (const double wide : positions) {
    const T position = static_cast<T>(wide);
    const Taps<T> taps = border.taps(position, size);
    inside.push_back(border.inside(position, size));
    counts.push_back(taps.count);
    for (int32_t i = 0; i < 2; ++i) {
      pixels.push_back(taps.pixel[i]);
      weights.push_back(taps.weight[i]);
      slopes.push_back(taps.slope[i]);
    }
  }
  const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(positions.size()), 2};
  py::dict result;
  result["inside"] = py::array(py::cast(inside));
  result["count"] = to_numpy(counts);
  result["pixel"] = to_numpy(pixels).reshape(shape);
  result["weight"] = to_numpy(weights).reshape(shape);
  result["slope"] = to_numpy(slopes).reshape(shape);
  return result;
}

py::dict border_taps(const Border& border, const std::vector<double>& positions, int32_t size,
                     const std::string& dtype) {
  return with_dtype(dtype,
                    [&](auto t) { return border_taps_as<decltype(t)>(border, positions, size); });
}

/// Origin and step of the axis of a mask that is pasted into lo..hi; given_axes() samples them.
/// The width of the mask, by which torchvision's boxes grow, is that of the axis where it is 0.
std::tuple<double, double> paste_axis_of(const std::string& method, double lo, double hi,
                                         int32_t mask, const std::string& dtype,
                                         int32_t mask_width) {
  return with_dtype(dtype, [&](auto t) -> std::tuple<double, double> {
    using T = decltype(t);
    const T a = static_cast<T>(lo), b = static_cast<T>(hi);
    const bool snapped =
        choose<bool>("method", method, {{"detectron2", false}, {"torchvision", true}});
    const double width = mask_width > 0 ? mask_width : mask;
    const T grow = static_cast<T>((width + 2.0) / width);
    const Axis<T> axis = snapped ? snapped_paste_axis(a, b, grow, mask) : paste_axis(a, b, mask);
    return {axis.origin, axis.step};
  });
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

}  // namespace

void bind_geometry(py::module_& m) {
  using namespace pybind11::literals;

  py::class_<Operator>(m, "Operator").def_readonly("border", &Operator::border);
  m.def("roi_align", &roi_align, "sampling_ratio"_a, "aligned"_a);
  m.def("crop", &crop, "unit"_a, "align_corners"_a, "outside"_a, "nearest"_a = false,
        "single"_a = false);
  m.def("glimpse", &glimpse_of, "version"_a, "centered"_a, "normalized"_a, "scale"_a = 1);
  m.def("given_axes", [] { return Operator(GivenAxes{}); });
  m.def("axis_table", &axis_table, "op"_a, "lo"_a, "hi"_a, "cells"_a, "size"_a, "scale"_a = 1.0,
        "dtype"_a = "float64");
  m.def("paste_axis", &paste_axis_of, "method"_a, "lo"_a, "hi"_a, "mask"_a, "dtype"_a = "float64",
        "mask_width"_a = 0);

  py::class_<Border>(m, "Border")
      .def_readonly("reach", &Border::reach)
      .def_readonly("mode", &Border::mode);
  m.def("roi_border", &roi_border);
  m.def("zeros_border", &zeros_border);
  m.def("edge_border", &edge_border);
  m.def("fill_border", &fill_border, "nearest"_a = false);
  m.def("covered_border", &covered_border, "nearest"_a = false);
  m.def("border_taps", &border_taps, "border"_a, "positions"_a, "size"_a, "dtype"_a = "float64");

  m.def("assign_level", &assign_level_as, "box"_a, "rule"_a, "canonical_size"_a,
        "canonical_level"_a, "scales"_a, "dtype"_a = "float32");
  m.def("log2", &portable_log2);
}

}  // namespace glimpse::testing
