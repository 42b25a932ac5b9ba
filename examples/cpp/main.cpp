// SPDX-License-Identifier: BSD-3-Clause
// Operators of glimpse_ext in a program without Python: inside a model that AOTInductor compiled, and called by name.
//
//   detect MODEL.pt2 CASE.pt ...
//
// MODEL.pt2 is what examples/cpp/export.py compiled; a CASE.pt holds an image, boxes, and what Python computed from them.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/abs.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

/// The tensors of a file that torch.save wrote from a dict.
c10::Dict<std::string, at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)),
                                std::istreambuf_iterator<char>());
  return c10::impl::toTypedDict<std::string, at::Tensor>(
      torch::jit::pickle_load(bytes).toGenericDict());
}

/// An operator by its name, with the types of its schema. The library registered it when it was loaded.
at::Tensor roi_align(const at::Tensor& input, const at::Tensor& boxes, double spatial_scale, int64_t height,
                     int64_t width, int64_t sampling_ratio, bool aligned) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, double, c10::SymInt, c10::SymInt, int64_t, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("glimpse_ext::roi_align", "").typed<Signature>();
  return op.call(input, boxes, spatial_scale, height, width, sampling_ratio, aligned);
}

/// Prints how far two results are apart. Convolutions of the two programs may add in another order.
bool agree(const char* what, const at::Tensor& got, const at::Tensor& expected) {
  if (got.sizes() != expected.sizes()) {
    std::printf("%s: shape differs\n", what);
    return false;
  }
  const double error = got.numel() == 0 ? 0.0 : (got - expected).abs().max().item<double>();
  const bool close = error <= 1e-5;
  std::printf("%s: %lld boxes, largest difference %.2g%s\n", what, static_cast<long long>(got.size(0)), error,
              close ? "" : ": TOO LARGE");
  return close;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("expects MODEL.pt2 CASE.pt ...");
  // Derivatives are registered by the Python package: without it operators have values only.
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  bool good = true;
  for (int i = 2; i < argc; ++i) {
    const auto tensors = read_tensors(argv[i]);
    const at::Tensor image = tensors.at("image"), boxes = tensors.at("boxes");
    std::printf("%s: image of %lldx%lld\n", argv[i], static_cast<long long>(image.size(2)),
                static_cast<long long>(image.size(3)));
    good &= agree("  compiled model", model.run({image, boxes}).at(0), tensors.at("scores"));
    good &= agree("  roi_align by name", roi_align(image, boxes, 1.0, 7, 7, 2, true), tensors.at("pooled"));
  }
  return good ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "detect: %s\n", error.what());
  return 1;
}
