// SPDX-License-Identifier: BSD-3-Clause
#include "ops/config.h"
// clang-format off: config.h decides which functions the torch headers declare.
#include <torch/csrc/stable/ops.h>
// clang-format on

#include "ops/paste.h"

#include <sys/mman.h>

#include <array>
#include <optional>

#include "ops/checks.h"
#include "ops/device.h"
#include "ops/layout.h"
#include "ops/library.h"

#if !defined(GLIMPSE_CUDA_LIBRARY)
#include "cpu/pages.h"
#endif

namespace glimpse::ops {

namespace {

void check_arguments(const char* name, const Tensor& masks, const Tensor& boxes) {
  check(masks.dim() == 4 && masks.size(1) == 1, name,
        "masks must be [N, Mh, Mw] or [N, 1, Mh, Mw], got ", describe_shape(masks));
  check(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4, name,
        "boxes must be [", masks.size(0), ", 4] (x1, y1, x2, y2), one for each mask, got ",
        describe_shape(boxes));
  check(is_float(boxes.scalar_type()), name,
        "boxes must be float64, float32, float16 or bfloat16, got ",
        describe_dtype(boxes.scalar_type()));
  check_same_device(name, "boxes", boxes, masks);
  check(masks.size(0) == 0 || (masks.size(2) > 0 && masks.size(3) > 0), name,
        "masks must have at least one pixel, got ", describe_shape(masks));
  check(masks.size(2) <= 0x7fffff00 && masks.size(3) <= 0x7fffff00, name,
        "mask height and width must fit in 32 bits, got ", describe_shape(masks));
}

/// Elements of a row of the result.
int32_t row_size(const PasteProblem& problem) {
  return problem.result == PasteResult::kBits ? problem.row_bytes() : problem.width;
}

#if !defined(GLIMPSE_CUDA_LIBRARY)

/// Rows of all images that the masks reach.
template <class T>
int64_t reached_rows(const PasteProblem& problem) {
  int64_t rows = 0;
  for (int64_t k = 0; k < problem.masks; ++k) {
    const Cells cells = PasteLine<T>::of(problem, k, kY).pixels;
    rows += cells.end - cells.first;
  }
  return rows;
}

/// Whether the result should be memory that the system clears when it is first touched. The pages
/// that no mask reaches then cost nothing; those that are reached cost more than memory that is
/// used again, and more than huge pages.
bool wants_zero_pages(const PasteProblem& problem) {
  constexpr double kLeast = 1 << 20, kMost = 1e15;  // elements; not more than can be counted
  const bool background = problem.result != PasteResult::kValue &&
                          problem.result != PasteResult::kQuantized &&
                          !(static_cast<float>(problem.threshold) > 0.0f);
  const double elements = static_cast<double>(problem.masks) * problem.height * row_size(problem);
  if (background || !(elements >= kLeast && elements <= kMost)) return false;
  const int64_t rows = problem.dtype == Dtype::kFloat64 ? reached_rows<double>(problem)
                                                        : reached_rows<float>(problem);
  return rows < problem.masks * problem.height / (huge_pages() ? 4 : 2);
}

size_t element_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

/// Zeros that are memory only where they are touched; none if the system gives none.
std::optional<Tensor> make_zero_pages(const PasteProblem& problem, ScalarType type,
                                      const Tensor& like) {
  const int64_t width = row_size(problem), plane = problem.height * width;
  const size_t bytes = static_cast<size_t>(problem.masks * plane) * element_bytes(type);
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return std::nullopt;
  const std::array<int64_t, 4> size = {problem.masks, 1, problem.height, width};
  const std::array<int64_t, 4> strides = {plane, plane, width, 1};
  return torch::stable::from_blob(pages, {size.data(), size.size()},
                                  {strides.data(), strides.size()}, like.device(), type,
                                  [bytes](void* data) { munmap(data, bytes); });
}

#endif

Tensor paste(const char* name, const Tensor& masks, const Tensor& boxes, int64_t height,
             int64_t width, bool snapped, PasteResult result, double threshold) {
  const DeviceScope scope(masks);
  PasteCall call(name, masks, boxes, height, width, snapped, result, threshold);
  PasteProblem& problem = call.problem;
  problem.stream = scope.stream();

  const ScalarType type = result == PasteResult::kThreshold   ? ScalarType::Bool
                          : result == PasteResult::kQuantized ? ScalarType::Byte
                          : result == PasteResult::kBits      ? ScalarType::Byte
                          : problem.dtype == Dtype::kUInt8    ? ScalarType::Float
                                                              : masks.scalar_type();
  std::optional<Tensor> image;
#if !defined(GLIMPSE_CUDA_LIBRARY)
  if (wants_zero_pages(problem)) image = make_zero_pages(problem, type, masks);
  problem.cleared = image.has_value();
#endif
  if (!image.has_value()) {
    image = make_empty(masks, {problem.masks, 1, height, row_size(problem)}, type, Layout::kNchw);
  }
  if (image->numel() > 0) {
    problem.image = image->mutable_data_ptr();
    current_backend().paste(problem);
  }
  return *image;
}

}  // namespace

PasteCall::PasteCall(const char* name, const Tensor& masks, const Tensor& boxes, int64_t height,
                     int64_t width, bool snapped, PasteResult result, double threshold) {
  check_arguments(name, masks, boxes);
  const bool is_bool = masks.scalar_type() == ScalarType::Bool;
  problem.dtype = is_bool ? Dtype::kUInt8 : storage_dtype(name, masks.scalar_type());
  problem.height = static_cast<int32_t>(check_output_size(name, height));
  problem.width = static_cast<int32_t>(check_output_size(name, width));
  boxes_ =
      converted(boxes, problem.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float);
  problem.mask = masks.const_data_ptr();
  problem.stride_n = masks.stride(0);
  problem.stride_h = masks.stride(2);
  problem.stride_w = masks.stride(3);
  problem.mask_height = static_cast<int32_t>(masks.size(2));
  problem.mask_width = static_cast<int32_t>(masks.size(3));
  problem.box = boxes_.const_data_ptr();
  problem.snapped = snapped;
  const double mask_width = problem.mask_width > 0 ? problem.mask_width : 1;
  problem.grow = (mask_width + 2.0) / mask_width;
  problem.masks = masks.size(0);
  problem.result = result;
  problem.threshold = threshold;
}

Tensor paste_masks(Tensor masks, Tensor boxes, int64_t height, int64_t width, bool snapped) {
  return paste("paste_masks", masks, boxes, height, width, snapped, PasteResult::kValue, 0);
}

Tensor paste_masks_threshold(Tensor masks, Tensor boxes, int64_t height, int64_t width,
                             double threshold, bool snapped) {
  const PasteResult result = threshold >= 0 ? PasteResult::kThreshold : PasteResult::kQuantized;
  return paste("paste_masks", masks, boxes, height, width, snapped, result, threshold);
}

Tensor paste_masks_to_bits(Tensor masks, Tensor boxes, int64_t height, int64_t width,
                           double threshold, bool snapped) {
  const char* name = "paste_masks_to_bits";
  check(threshold >= 0, name, "threshold must be zero or more, got ", threshold);
  return paste(name, masks, boxes, height, width, snapped, PasteResult::kBits, threshold);
}

}  // namespace glimpse::ops
