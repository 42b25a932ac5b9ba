// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/sample.cuh"

#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

constexpr int64_t kMostGridX = 2147483647;
constexpr int64_t kMostGridY = 65535;  // also of z

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Stream stream_of(const Problem& problem) { return static_cast<Stream>(problem.stream); }

template <class T>
void sample_simple(const Problem& problem) {
  constexpr int kThreads = 256;
  constexpr int64_t kMostBlocks = 65536;  // each thread then takes several outputs
  const int64_t outputs = problem.boxes * problem.channels * problem.out_height * problem.out_width;
  const int64_t blocks = divide_up(outputs, kThreads);
  launch(sample_simple_kernel<T>,
         dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)), kThreads, 0,
         stream_of(problem), problem);
}

/// The most channels that one aligned access can hold everywhere: 16 / sizeof(T), or a power of
/// two below it down to 1.
template <class T>
int aligned_channels(const Problem& problem) {
  int channels = 16 / static_cast<int>(sizeof(T));
  const auto allow = [&](int64_t elements) {
    while (elements % channels != 0) channels /= 2;
  };
  const auto allow_pointer = [&](const void* pointer) {
    while (reinterpret_cast<uintptr_t>(pointer) % (channels * sizeof(T)) != 0 && channels > 1)
      channels /= 2;
  };
  allow(problem.channels);
  allow_pointer(problem.pooled);
  for (int32_t i = 0; i < problem.levels; ++i) {
    const Level& level = problem.level[i];
    allow_pointer(level.data);
    // The stride of a direction with one element is never used and can be anything.
    if (problem.batch > 1) allow(level.stride_n);
    if (level.height > 1) allow(level.stride_h);
    if (level.width > 1) allow(level.stride_w);
  }
  return channels;
}

template <class T, int kChannels>
bool sample_nhwc(const Problem& problem) {
  // Work of a warp where boxes are plenty: long enough to pay for the tables.
  constexpr int64_t kMostCells = 32;
  // Blocks that keep a large GPU busy. Fewer boxes are divided further.
  constexpr int64_t kEnoughBlocks = 512;

  // Offsets inside an image are 32-bit and count packs of channels.
  for (int32_t i = 0; i < problem.levels; ++i) {
    const Level& level = problem.level[i];
    const int64_t largest =
        (level.height - 1) * level.stride_h + (level.width - 1) * level.stride_w;
    if (largest / kChannels > int64_t{0xffffffff}) return false;
  }

  NhwcPlan plan;
  plan.tables = table_shape(problem);
  plan.lanes_log2 = 5;
  while (plan.lanes_log2 > 0 && (int64_t{kChannels} << (plan.lanes_log2 - 1)) >= problem.channels) {
    --plan.lanes_log2;
  }
  const int64_t lanes = int64_t{1} << plan.lanes_log2;
  const int64_t workers = kNhwcThreads / lanes;
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const int64_t slices = divide_up(problem.channels, lanes * kChannels);
  int64_t run = divide_up(cells, workers);
  if (run > problem.out_width) run = divide_up(run, problem.out_width) * problem.out_width;
  if (run > kMostCells) run = kMostCells;
  while (run > 1 && problem.boxes * slices * divide_up(cells, run * workers) < kEnoughBlocks) {
    run = divide_up(run, 2);
  }
  plan.cells_per_worker = static_cast<int32_t>(run);
  plan.fill = static_cast<float>(problem.fill);
  const int64_t needed_threads = divide_up(divide_up(cells, run) * lanes, 32) * 32;
  const int64_t threads = needed_threads < kNhwcThreads ? needed_threads : kNhwcThreads;
  const int64_t groups = divide_up(divide_up(cells, run) * lanes, threads);
  if (problem.boxes > kMostGridX || slices > kMostGridY || groups > kMostGridY) return false;
  launch(sample_nhwc_kernel<T, kChannels>,
         dim3(static_cast<unsigned>(problem.boxes), static_cast<unsigned>(slices),
              static_cast<unsigned>(groups)),
         static_cast<unsigned>(threads), plan.tables.bytes<float, false>(), stream_of(problem),
         problem, plan);
  return true;
}

/// Whether offsets inside `channels` channels of an image are 32-bit.
bool offsets_are_short(const Problem& problem, int64_t channels) {
  for (int32_t i = 0; i < problem.levels; ++i) {
    const Level& level = problem.level[i];
    const int64_t largest = (level.height - 1) * level.stride_h +
                            (level.width - 1) * level.stride_w + (channels - 1) * level.stride_c;
    if (largest > 0x7fffffff) return false;
  }
  return true;
}

/// False where the sizes do not suit the kernel.
template <class T>
bool sample_planes(const Problem& problem) {
  constexpr int64_t kEnoughBlocks = 1024;
  const int64_t blocks = divide_up(problem.boxes, kPlanesThreads);
  // Taps are found again for each slice.
  int64_t channels = divide_up(problem.channels, 32) * 32;
  while (channels > 32 && blocks * divide_up(problem.channels, channels) < kEnoughBlocks) {
    channels = divide_up(channels, 64) * 32;
  }
  const int64_t slices = divide_up(problem.channels, channels);
  if (!offsets_are_short(problem, 1) || blocks > kMostGridX || slices > kMostGridY ||
      channels > 0x7fffffff) {
    return false;
  }
  launch(sample_planes_kernel<T>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)), kPlanesThreads, 0,
         stream_of(problem), problem, static_cast<int32_t>(channels),
         static_cast<uint32_t>(sizeof(T)));
  return true;
}

/// False where the sizes do not suit the kernel.
template <class T, int kChannels>
bool sample_packed_points(const Problem& problem) {
  constexpr int64_t kEnoughWarps = 8448;  // 64 for each multiprocessor of a large GPU
  constexpr int64_t kWarps = kPointsThreads / 32;
  int32_t lanes_log2 = 0;
  while (lanes_log2 < 5 && (int64_t{kChannels} << lanes_log2) < problem.channels) ++lanes_log2;
  const int64_t slices = divide_up(problem.channels, int64_t{kChannels} << lanes_log2);
  const int64_t groups = 32 >> lanes_log2;
  int64_t points = 32;
  while (points > groups && divide_up(problem.boxes, points) * slices < kEnoughWarps) points /= 2;
  const int64_t blocks = divide_up(problem.boxes, points * kWarps);
  if (!offsets_are_short(problem, 1) || blocks > kMostGridX || slices > kMostGridY) return false;
  launch(sample_points_kernel<T, kChannels>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)), kPointsThreads, 0,
         stream_of(problem), problem, lanes_log2, static_cast<int32_t>(points));
  return true;
}

/// False where the sizes do not suit the kernels.
template <class T>
bool sample_points(const Problem& problem) {
  constexpr int kWide = 16 / sizeof(T);
  if (problem.layout != Layout::kNhwc) return sample_planes<T>(problem);
  return aligned_channels<T>(problem) == kWide && sample_packed_points<T, kWide>(problem);
}

/// False where the sizes do not suit the kernel.
template <class T>
bool sample_cells(const Problem& problem) {
  // Room for cells of one sample; more would take more than 48 KB of doubles.
  constexpr int32_t kMostTaps = 2 * kMostTableRows;
  constexpr int64_t kMostChannels = 32, kEnoughBlocks = 1024;
  constexpr int64_t kFewestCells = 32;  // for a block to be worth its tables
  if (int64_t{problem.out_height} * problem.out_width < kFewestCells) return false;
  CellsPlan plan;
  plan.tables = table_shape(problem, kMostTaps);
  plan.columns = problem.out_width < kCellsThreads ? problem.out_width : kCellsThreads;
  plan.column_groups = static_cast<int32_t>(divide_up(problem.out_width, plan.columns));
  plan.rows_per_pass = kCellsThreads / plan.columns;
  if (plan.rows_per_pass > problem.out_height) plan.rows_per_pass = problem.out_height;
  const int64_t channels = problem.channels < kMostChannels ? problem.channels : kMostChannels;
  plan.channels_per_block = static_cast<int32_t>(channels);
  plan.element_bytes = static_cast<uint32_t>(sizeof(T));
  const int64_t slices = divide_up(problem.channels, channels);
  const auto groups_of = [&](int64_t passes) {
    return plan.column_groups * divide_up(problem.out_height, passes * plan.rows_per_pass);
  };
  int64_t passes = 16;
  while (passes > 1 && problem.boxes * slices * groups_of(passes) < kEnoughBlocks) passes /= 2;
  plan.rows_per_block = static_cast<int32_t>(passes) * plan.rows_per_pass;
  const int64_t groups = groups_of(passes);
  const int64_t threads = divide_up(int64_t{plan.columns} * plan.rows_per_pass, 32) * 32;
  if (!offsets_are_short(problem, 1) || problem.boxes > kMostGridX || groups > kMostGridY ||
      slices > kMostGridY) {
    return false;
  }
  launch(sample_cells_kernel<T>,
         dim3(static_cast<unsigned>(problem.boxes), static_cast<unsigned>(groups),
              static_cast<unsigned>(slices)),
         static_cast<unsigned>(threads), plan.tables.bytes<acc_t<T>, false>(), stream_of(problem),
         problem, plan);
  return true;
}

/// False where the sizes do not suit the kernel.
template <class T>
bool sample_nhwc(const Problem& problem) {
  constexpr int kWide = 16 / sizeof(T), kWord = 4 / sizeof(T);
  const int channels = aligned_channels<T>(problem);
  if (channels == kWide) return sample_nhwc<T, kWide>(problem);
  if (channels >= kWord) return sample_nhwc<T, kWord>(problem);
  return sample_nhwc<T, 1>(problem);
}

template <class T>
bool sample_nchw(const Problem& problem) {
  // Few channels would leave lanes idle, and a block should not have to walk over a whole picture.
  constexpr int64_t kFewestChannels = 8, kMostCells = 1024;
  // Offsets inside the channels that a warp takes at a time.
  if (!offsets_are_short(problem, kNchwSlots * kNchwMostSide)) return false;
  const NchwPlan plan = nchw_plan(problem, sizeof(T));
  const int64_t cells = int64_t{problem.out_height} * problem.out_width;
  const int64_t slices = divide_up(problem.channels, plan.channels_per_block);
  if (problem.channels < kFewestChannels || cells > kMostCells || problem.boxes > kMostGridX ||
      slices > kMostGridY) {
    return false;
  }
  launch(sample_nchw_kernel<T>,
         dim3(static_cast<unsigned>(problem.boxes), static_cast<unsigned>(slices)), kNchwThreads,
         plan.bytes(), stream_of(problem), problem, plan);
  return true;
}

/// Whether lanes that are cells leave no other kernel to be faster. Channels beside each other are
/// read in packs where that is possible.
bool suits_cells(const Problem& problem) {
  return problem.layout == Layout::kNchw || problem.channels < 4;
}

/// The kernels of numbers that only images and tests have.
template <class T>
void sample_any(const Problem& problem) {
  if (tables_apply(problem) && suits_cells(problem) && sample_cells<T>(problem)) return;
  sample_simple<T>(problem);
}

template <class T>
void sample_tuned(const Problem& problem) {
  const bool points =
      problem.out_height == 1 && problem.out_width == 1 && problem.op.fixed_samples() == 1;
  if (points) {
    if (sample_points<T>(problem)) return;
    return sample_simple<T>(problem);
  }
  if (tables_apply(problem)) {
    const bool nhwc = problem.layout == Layout::kNhwc;
    if (nhwc && !suits_cells(problem) && sample_nhwc<T>(problem)) return;
    if (!nhwc && sample_nchw<T>(problem)) return;
  }
  sample_any<T>(problem);
}

}  // namespace

void sample(const Problem& problem) {
  if (problem.filter.used) return filter_sample(problem);
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return sample_tuned<float>(problem);
    case Dtype::kFloat16:
      return sample_tuned<half>(problem);
    case Dtype::kBFloat16:
      return sample_tuned<bfloat16>(problem);
    case Dtype::kFloat64:
      return sample_any<double>(problem);
    case Dtype::kUInt8:
      return sample_any<uint8_t>(problem);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

}  // namespace glimpse::cuda
