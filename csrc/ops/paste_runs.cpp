// SPDX-License-Identifier: BSD-3-Clause
#include "ops/config.h"
// clang-format off: config.h decides which functions the torch headers declare.
#include <torch/csrc/stable/ops.h>
// clang-format on

#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "coco_runs.h"
#include "ops/checks.h"
#include "ops/device.h"
#include "ops/layout.h"
#include "ops/library.h"
#include "ops/paste.h"

#if !defined(GLIMPSE_CUDA_LIBRARY)
#include "cpu/paste_runs.h"
#endif

// Note [Run lengths of a device]
// How many runs there are is data. The device lists where images change, as far as there is room,
// and counts how often; both come to the host in one copy of a size that follows from shapes, which
// is the only thing to wait for. Run lengths are written from the list there. Where there was no
// room for all, which rough or very large masks may bring about, the counts say how much it takes
// the second time.

namespace glimpse::ops {

namespace {

/// Changes that a first try has room for: two in each column of boxes that cover a quarter of the
/// width, and of one mask that covers all of it. Boxes of detectors are smaller.
int64_t usual_changes(const PasteProblem& problem) {
  return problem.masks * problem.width / 2 + 4 * int64_t{problem.width};
}

/// What a device has found, on the host.
struct HostChanges {
  Tensor numbers;  // int32: how many changes each part of each image has, then where they are
  int32_t parts = 0;
};

HostChanges find_changes(const PasteProblem& problem, const Tensor& masks) {
  HostChanges found;
  found.parts = (problem.width - 1) / PasteChanges::kPartColumns + 1;
  const int64_t counts = problem.masks * found.parts;
  const auto columns = static_cast<size_t>(problem.masks * problem.width);
  int64_t room = usual_changes(problem);
  while (true) {
    Tensor numbers = make_empty(masks, {counts + room, 1}, ScalarType::Int);
    Tensor scratch = make_workspace(masks, columns * sizeof(int32_t));
    PasteChanges changes;
    changes.parts = found.parts;
    changes.part_changes = numbers.mutable_data_ptr<int32_t>();
    changes.column_changes = static_cast<int32_t*>(scratch.mutable_data_ptr());
    changes.place = changes.part_changes + counts;
    changes.room = room;
    current_backend().paste_changes(problem, changes);
    found.numbers =
        torch::stable::to(numbers, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    const auto* count = found.numbers.const_data_ptr<int32_t>();
    const int64_t all = std::accumulate(count, count + counts, int64_t{0});
    if (all <= room) return found;
    room = all;
  }
}

/// Run lengths from the places of changes.
void write_runs(const PasteProblem& problem, const HostChanges& found,
                std::vector<CocoMask>& runs) {
  const int64_t height = problem.height;
  const int32_t* count = nullptr;
  const int32_t* place = nullptr;
  if (found.parts > 0) {
    count = found.numbers.const_data_ptr<int32_t>();
    place = count + problem.masks * found.parts;
  }
  RunWriter writer;
  for (CocoMask& own : runs) {
    writer.start(height);
    int64_t x = 0, column = 0;  // the place at which column x begins
    const int64_t all = std::accumulate(count, count + found.parts, int64_t{0});
    count += found.parts;
    for (const int32_t* end = place + all; place != end; ++place) {
      const int64_t y = *place - column;
      if (y >= 2 * height) {
        x = *place / height;
        column = x * height;
      } else if (y >= height) {
        ++x;
        column += height;
      }
      writer.change(column, *place - column);
    }
    own = writer.end(problem.width);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> paste_masks_runs(Tensor masks, Tensor boxes,
                                                            int64_t height, int64_t width,
                                                            double threshold, bool snapped) {
  const char* name = "paste_masks_to_rle";
  check(threshold >= 0, name, "threshold must be zero or more, got ", threshold);
  const DeviceScope scope(masks);
  PasteCall call(name, masks, boxes, height, width, snapped, PasteResult::kThreshold, threshold);
  PasteProblem& problem = call.problem;
  problem.stream = scope.stream();

  constexpr int64_t kMostPixels = 0x7fffffff;
  const int64_t pixels = int64_t{problem.height} * problem.width;
  std::vector<CocoMask> runs(static_cast<size_t>(problem.masks));
  HostChanges found;
  bool on_host = false;
#if defined(GLIMPSE_CUDA_LIBRARY)
  check(pixels <= kMostPixels, name,
        "images on a CUDA device must have fewer than 2^31 pixels, got ", height, " x ", width);
#else
  on_host = current_backend().paste_changes == nullptr || pixels > kMostPixels;
  if (on_host) cpu_paste_runs(problem, runs.data());
#endif
  if (!on_host) {
    if (problem.masks > 0 && pixels > 0) found = find_changes(problem, masks);
    write_runs(problem, found, runs);
  }

  size_t bytes = 0;
  for (const CocoMask& own : runs) bytes += own.counts.size();
  Tensor counts = make_on_host({static_cast<int64_t>(bytes)}, ScalarType::Byte);
  Tensor ends = make_on_host({problem.masks, 1}, ScalarType::Long);
  Tensor areas = make_on_host({problem.masks, 1}, ScalarType::Long);
  Tensor tight = make_on_host({problem.masks, 4}, ScalarType::Long);
  auto* text = static_cast<char*>(counts.mutable_data_ptr());
  auto* end = ends.mutable_data_ptr<int64_t>();
  auto* area = areas.mutable_data_ptr<int64_t>();
  auto* corner = tight.mutable_data_ptr<int64_t>();
  int64_t size = 0;
  for (const CocoMask& own : runs) {
    std::memcpy(text + size, own.counts.data(), own.counts.size());
    size += static_cast<int64_t>(own.counts.size());
    *end++ = size;
    *area++ = own.area;
    for (const int64_t edge : {own.x1, own.y1, own.x2, own.y2}) *corner++ = edge;
  }
  return {counts, ends, areas, tight};
}

}  // namespace glimpse::ops
