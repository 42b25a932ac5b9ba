// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.cuh"
#include "glimpse_problem.h"
#include "noise.h"

/// Glimpses of whole pixels; Note [Why glimpses are copied].
///
///   copy_glimpse_kernel      copies, and fills what lies outside: all of a call without noise
///   plane_statistics_kernel  range and moments of the channels of images that windows leave
///   image_range_kernel       the range of all channels of such an image, for uniform noise
///
/// Whether a window leaves its image is known on the device only, so the last two are always
/// launched where there is noise, and their blocks end at once where they are not needed.
namespace glimpse::cuda {

constexpr int kGlimpseThreads = 256;

struct ZeroFill {
  template <class T>
  __device__ __forceinline__ T at(const GlimpseProblem&, int64_t, int64_t, int32_t, int32_t) const {
    return T(0);
  }
};

struct NoiseFill {
  const Statistics* statistics;  // of every channel (gaussian) or image (uniform)

  template <class T>
  __device__ __forceinline__ T at(const GlimpseProblem& problem, int64_t n, int64_t c, int32_t y,
                                  int32_t x) const {
    const bool gaussian = problem.noise == Noise::kGaussian;
    const Statistics known = statistics[gaussian ? n * problem.channels + c : n];
    return noise_at<T>(gaussian, known, static_cast<uint64_t>(*problem.seed), n, c, y, x);
  }
};

/// One thread: the packs `index`, `index + all threads`, ... of the output, each of kPack
/// neighbours in memory. Threads of a warp are neighbours too. A pack lies in one line: a row of
/// one channel, or for kNhwc a row with all its channels. Where source and target both allow it, it
/// is moved as one word; else its elements are read one by one, which the cache makes up for.
template <class T, class Fill, int kPack>
__global__ void __launch_bounds__(kGlimpseThreads)
    copy_glimpse_kernel(GLIMPSE_GRID_CONSTANT GlimpseProblem problem,
                        GLIMPSE_GRID_CONSTANT Fill fill) {
  const bool nhwc = problem.layout == Layout::kNhwc;
  const int64_t unit = nhwc ? problem.channels : 1;  // elements of a cell in its line
  const bool dense = problem.stride_w == unit && (unit == 1 || problem.stride_c == 1);
  const int64_t packs_of_line = unit * problem.out_width / kPack;
  const int64_t lines = (nhwc ? 1 : problem.channels) * problem.out_height;  // of an image
  const int64_t packs = problem.batch * lines * packs_of_line;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < packs;
       index += threads) {
    const int64_t line = index / packs_of_line;
    const int64_t first = (index - line * packs_of_line) * kPack;  // element of the line
    const int64_t n = line / lines;
    const int64_t row = line - n * lines;
    int64_t c = row / problem.out_height;
    const auto y = static_cast<int32_t>(row - c * problem.out_height);
    auto x = static_cast<int32_t>(nhwc ? first / problem.channels : first);
    if (nhwc) c = first - x * problem.channels;

    const GlimpseWindow window = glimpse_window(problem, n);
    const bool row_inside = y >= window.y.begin && y < window.y.end;
    // Offsets become pointers where the image is read; elsewhere it may have no memory at all.
    const T* image = static_cast<const T*>(problem.image);
    const int64_t pixels = n * problem.stride_n + (window.y.first + y) * problem.stride_h;
    T* target = static_cast<T*>(problem.output) + index * kPack;
    if constexpr (kPack > 1) {
      const bool whole = row_inside && first >= window.x.begin * unit &&
                         first + kPack <= window.x.end * unit && dense;
      if (whole) {
        const T* source =
            image + (pixels + (nhwc ? 0 : c * problem.stride_c) + window.x.first * unit + first);
        if (reinterpret_cast<uintptr_t>(source) % sizeof(uint4) == 0) {
          *reinterpret_cast<uint4*>(target) = load_readonly(reinterpret_cast<const uint4*>(source));
          continue;
        }
      }
    }
    T values[kPack];
    GLIMPSE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (row_inside && x >= window.x.begin && x < window.x.end) {
        values[i] = image[pixels + c * problem.stride_c + (window.x.first + x) * problem.stride_w];
      } else {
        values[i] = fill.template at<T>(problem, n, c, y, x);
      }
      if (!nhwc) {
        ++x;
      } else if (++c == problem.channels) {
        c = 0;
        ++x;
      }
    }
    if constexpr (kPack > 1) {
      uint4 word;
      memcpy(&word, values, sizeof(word));
      *reinterpret_cast<uint4*>(target) = word;
    } else {
      *target = values[0];
    }
  }
}

/// Folds a value of each thread in the order of noise.h; thread 0 has the sum. The block has
/// kStatisticsLanes threads.
__device__ __forceinline__ double folded_sum(double value, double* lanes) {
  __syncthreads();  // what another sum left there has been read
  lanes[threadIdx.x] = value;
  __syncthreads();
  for (int apart = kStatisticsLanes / 2; apart > 0; apart /= 2) {
    if (threadIdx.x < static_cast<unsigned>(apart)) {
      lanes[threadIdx.x] =
          (Rounded<double>(lanes[threadIdx.x]) + Rounded<double>(lanes[threadIdx.x + apart])).value;
    }
    __syncthreads();
  }
  return lanes[0];
}

/// One block: the plane blockIdx.x of batch * channels. One thread: a lane of noise.h.
template <class T>
__global__ void __launch_bounds__(kStatisticsLanes)
    plane_statistics_kernel(GLIMPSE_GRID_CONSTANT GlimpseProblem problem, Statistics* statistics) {
  using R = Rounded<double>;
  GLIMPSE_SHARED(double, lanes, [kStatisticsLanes]);
  GLIMPSE_SHARED(Range, ranges, [kStatisticsLanes]);
  const int64_t plane = blockIdx.x;
  const int64_t n = plane / problem.channels;
  if (!leaves_image(problem, glimpse_window(problem, n))) return;
  const T* image = static_cast<const T*>(problem.image);  // without memory where it has no pixel
  const int64_t pixels = n * problem.stride_n + (plane - n * problem.channels) * problem.stride_c;
  const int64_t count = int64_t{problem.height} * problem.width;

  // Calls visit(v) for the pixels of this thread's lane, in order.
  const auto for_each_pixel = [&](const auto& visit) {
    for (int64_t i = threadIdx.x; i < count; i += kStatisticsLanes) {
      const int64_t y = i / problem.width, x = i - y * problem.width;
      const int64_t at = pixels + y * problem.stride_h + x * problem.stride_w;
      visit(static_cast<double>(load_value(image[at])));
    }
  };
  Range range = Range::none();
  R sum;
  for_each_pixel([&](double v) {
    range.add(v, v);
    sum = sum + R(v);
  });
  ranges[threadIdx.x] = range;
  const bool gaussian = problem.noise == Noise::kGaussian;
  double mean = 0, deviation = 0;
  if (gaussian) {
    const R pixel_count(static_cast<double>(count));
    mean = (R(folded_sum(sum.value, lanes)) / pixel_count).value;
    R squares;
    for_each_pixel([&](double v) {
      const R off = R(v) - R(mean);
      squares = squares + off * off;
    });
    deviation = rounded_sqrt((R(folded_sum(squares.value, lanes)) / pixel_count).value);
  } else {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    Range all = Range::none();
    for (int lane = 0; lane < kStatisticsLanes; ++lane)
      all.add(ranges[lane].low, ranges[lane].high);
    Statistics result = all.statistics();
    if (gaussian) {
      result.mean = mean;
      result.deviation = deviation;
    }
    statistics[plane] = result;
  }
}

/// One block: the image blockIdx.x. One thread: every kThreads-th of its channels.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    image_range_kernel(GLIMPSE_GRID_CONSTANT GlimpseProblem problem, const Statistics* planes,
                       Statistics* images) {
  GLIMPSE_SHARED(Range, ranges, [kThreads]);
  const int64_t n = blockIdx.x;
  if (!leaves_image(problem, glimpse_window(problem, n))) return;
  Range range = Range::none();
  for (int64_t c = threadIdx.x; c < problem.channels; c += kThreads) {
    const Statistics& plane = planes[n * problem.channels + c];
    range.add(plane.low, plane.high);
  }
  ranges[threadIdx.x] = range;
  __syncthreads();
  if (threadIdx.x == 0) {
    Range all = Range::none();
    for (int lane = 0; lane < kThreads; ++lane) all.add(ranges[lane].low, ranges[lane].high);
    images[n] = all.statistics();
  }
}

}  // namespace glimpse::cuda
