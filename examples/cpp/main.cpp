// SPDX-License-Identifier: BSD-3-Clause
// Operators of glimpse_ext in a program without Python: inside a model that AOTInductor compiled,
// and called by name.
//
//   detect MODEL.pt2 CASE.pt ...
//
// MODEL.pt2 is what examples/cpp/export.py compiled; a CASE.pt holds an image, boxes, and what
// Python computed from them.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
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
class Tensors {
 public:
  explicit Tensors(const std::string& path) : values_(read(path)) {}

  at::Tensor operator[](const char* name) const { return values_.at(name).toTensor(); }

 private:
  static c10::impl::GenericDict read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)),
                                  std::istreambuf_iterator<char>());
    return torch::jit::pickle_load(bytes).toGenericDict();
  }

  c10::impl::GenericDict values_;
};

/// An operator by its name, with the types of its schema. The library registered it when it was
/// loaded.
at::Tensor roi_align(const at::Tensor& input, const at::Tensor& boxes, double spatial_scale,
                     int64_t height, int64_t width, int64_t sampling_ratio, bool aligned) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, double, c10::SymInt,
                               c10::SymInt, int64_t, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("glimpse_ext::roi_align", "")
                             .typed<Signature>();
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
  std::printf("%s: %lld boxes, largest difference %.2g%s\n", what,
              static_cast<long long>(got.size(0)), error, close ? "" : ": TOO LARGE");
  return close;
}

/// Wrong arguments throw, with the words that Python has.
bool refuses_wrong_boxes(const at::Tensor& image, const at::Tensor& boxes) {
  try {
    roi_align(image, boxes.slice(1, 0, 3), 1.0, 7, 7, 2, true);
  } catch (const std::exception& error) {
    const std::string message = error.what();
    std::printf("refused: %s\n", message.substr(0, message.find('\n')).c_str());
    return message.find("roi_align: boxes must be [K, 5]") != std::string::npos;
  }
  std::printf("boxes of three columns were taken\n");
  return false;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("expects MODEL.pt2 CASE.pt ...");
  // Derivatives are registered by the Python package: without it operators have values only.
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  bool good = true;
  for (int i = 2; i < argc; ++i) {
    const Tensors tensors(argv[i]);
    const at::Tensor image = tensors["image"], boxes = tensors["boxes"];
    std::printf("%s: image of %lldx%lld\n", argv[i], static_cast<long long>(image.size(2)),
                static_cast<long long>(image.size(3)));
    const at::Tensor scores = model.run({image, boxes}).at(0);
    good &= agree("  compiled model", scores, tensors["scores"]);
    const at::Tensor pooled = roi_align(image, boxes, 1.0, 7, 7, 2, true);
    good &= agree("  roi_align by name", pooled, tensors["pooled"]);
    if (i == 2) good &= refuses_wrong_boxes(image, boxes);
  }
  return good ? 0 : 1;
} catch (const c10::Error& error) {
  std::fprintf(stderr, "detect: %s\n", error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "detect: %s\n", error.what());
  return 1;
}
