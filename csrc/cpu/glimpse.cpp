// SPDX-License-Identifier: BSD-3-Clause
//
// Glimpses of whole pixels; Note [Why glimpses are copied].
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/applications.h"
#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "noise.h"

namespace glimpse {
namespace {

/// What threads share out: the smallest runs of the output that a run of pixels makes. For kNchw
/// the cells of one row of one channel; for kNhwc the cells of one row with all their channels.
struct Line {
  int64_t image, channel;
  int32_t y;
};

/// Writes the cells first <= x < end of a line, with their channels.
struct ZeroFill {
  template <class T>
  void operator()(const Line&, int64_t channels, int32_t first, int32_t end, T* out) const {
    std::memset(static_cast<void*>(out), 0, sizeof(T) * channels * (end - first));
  }
};

struct NoiseFill {
  const GlimpseProblem& problem;
  const std::vector<Statistics>& statistics;  // of every channel (gaussian) or image (uniform)

  template <class T>
  void operator()(const Line& line, int64_t channels, int32_t first, int32_t end, T* out) const {
    const bool gaussian = problem.noise == Noise::kGaussian;
    const uint64_t seed = static_cast<uint64_t>(*problem.seed);
    for (int32_t x = first; x < end; ++x) {
      for (int64_t c = line.channel; c < line.channel + channels; ++c) {
        const Statistics& known =
            statistics[gaussian ? line.image * problem.channels + c : line.image];
        *out++ = noise_at<T>(gaussian, known, seed, line.image, c, line.y, x);
      }
    }
  }
};

/// Pixels of a line that lie apart from each other: no row of the image can be copied as a whole.
template <class T>
void copy_apart(const T* row, int64_t pixels, int64_t stride, int64_t channels,
                int64_t stride_channel, T* out) {
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t c = 0; c < channels; ++c) *out++ = row[x * stride + c * stride_channel];
  }
}

/// Rows of a window lie in pages of their own, across which no processor looks ahead.
constexpr int32_t kRowsAhead = 8;

/// Asks for the `count` elements that lie `offset` behind `row`.
template <class T>
void prefetch_row(const T* row, int64_t offset, int64_t count) {
  constexpr int64_t kLine = 64, kMost = 1024;  // bytes; longer rows are looked ahead in by hardware
  const int64_t bytes = std::min<int64_t>(count * static_cast<int64_t>(sizeof(T)), kMost);
  const char* from = reinterpret_cast<const char*>(row + offset);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(from + i);
  __builtin_prefetch(from + bytes - 1);
}

template <class T, class Fill>
void copy_typed(const GlimpseProblem& problem, const Fill& fill) {
  const bool nhwc = problem.layout == Layout::kNhwc;
  const int64_t unit = nhwc ? problem.channels : 1;  // elements of a cell in its line
  const bool dense = problem.stride_w == unit && (unit == 1 || problem.stride_c == 1);
  const int64_t planes = nhwc ? 1 : problem.channels;
  const int64_t lines = planes * problem.out_height;  // of an image
  const int64_t elements = unit * problem.out_width;  // of a line
  const auto* image = static_cast<const T*>(problem.image);
  auto* output = static_cast<T*>(problem.output);

  const auto copy_lines = [&](int64_t first, int64_t end) {
    // Counted on from here: three divisions would cost as much as the copy of a short line.
    Line line = {first / lines, first % lines / problem.out_height,
                 static_cast<int32_t>(first % problem.out_height)};
    GlimpseWindow window = glimpse_window(problem, line.image);
    T* out = output + first * elements;
    for (int64_t index = first; index < end; ++index, out += elements, ++line.y) {
      if (line.y == problem.out_height) {
        line.y = 0;
        if (++line.channel == planes) {
          line.channel = 0;
          window = glimpse_window(problem, ++line.image);
        }
      }
      if (line.y < window.y.begin || line.y >= window.y.end || window.x.begin >= window.x.end) {
        fill(line, unit, 0, problem.out_width, out);
        continue;
      }
      const int32_t begin = window.x.begin, count = window.x.end - begin;
      const T* row = image + line.image * problem.stride_n + line.channel * problem.stride_c +
                     (window.y.first + line.y) * problem.stride_h +
                     (window.x.first + begin) * problem.stride_w;
      if (begin > 0) fill(line, unit, 0, begin, out);
      if (dense) {
        if (line.y + kRowsAhead < window.y.end) {
          prefetch_row(row, kRowsAhead * problem.stride_h, unit * count);
        }
        std::memcpy(static_cast<void*>(out + begin * unit), row, sizeof(T) * unit * count);
      } else {
        copy_apart(row, count, problem.stride_w, unit, problem.stride_c, out + begin * unit);
      }
      if (begin + count < problem.out_width) {
        fill(line, unit, begin + count, problem.out_width, out + (begin + count) * unit);
      }
    }
  };
  constexpr int64_t kBytesPerThread = 1 << 16;
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
  parallel_for(0, problem.batch * lines, std::max<int64_t>(kBytesPerThread / bytes, 1), copy_lines);
}

/// One number of each kind per lane, in the order of noise.h.
struct Lanes {
  double sum[kStatisticsLanes] = {};
  double low[kStatisticsLanes], high[kStatisticsLanes];
  double nans[kStatisticsLanes] = {};

  Lanes() {
    std::fill_n(low, kStatisticsLanes, HUGE_VAL);
    std::fill_n(high, kStatisticsLanes, -HUGE_VAL);
  }

  double folded_sum() {
    for (int32_t apart = kStatisticsLanes / 2; apart > 0; apart /= 2) {
      for (int32_t lane = 0; lane < apart; ++lane) sum[lane] += sum[lane + apart];
    }
    return sum[0];
  }
  Range range() const {
    Range all = Range::none();
    for (int32_t lane = 0; lane < kStatisticsLanes; ++lane) {
      const double poison = nans[lane] > 0 ? static_cast<double>(NAN) : 0.0;
      all.add(low[lane] + poison, high[lane] + poison);
    }
    return all;
  }
};

/// Calls visit(pixels, stride, count, lane) on runs of a plane whose pixels belong to the lanes
/// lane, lane + 1, ...
template <class T, class Visit>
void for_each_run(const GlimpseProblem& problem, int64_t n, int64_t c, const Visit& visit) {
  if (problem.height == 0 || problem.width == 0) return;  // there may be no memory either
  const T* plane =
      static_cast<const T*>(problem.image) + n * problem.stride_n + c * problem.stride_c;
  int32_t lane = 0;
  for (int64_t y = 0; y < problem.height; ++y) {
    const T* row = plane + y * problem.stride_h;
    for (int32_t x = 0; x < problem.width;) {
      const int32_t count = std::min(problem.width - x, kStatisticsLanes - lane);
      visit(row + x * problem.stride_w, count, lane);
      x += count;
      lane = (lane + count) % kStatisticsLanes;
    }
  }
}

/// body(load) with load(pixels, i) being the pixel i of a run: neighbours in memory or not.
template <class T, class Body>
void with_stride(int64_t stride, const Body& body) {
  if (stride == 1) {
    body([](const T* pixels, int32_t i) { return static_cast<double>(load_value(pixels[i])); });
  } else {
    body([stride](const T* pixels, int32_t i) {
      return static_cast<double>(load_value(pixels[i * stride]));
    });
  }
}

template <class T>
Statistics plane_statistics(const GlimpseProblem& problem, int64_t n, int64_t c) {
  Lanes lanes;
  with_stride<T>(problem.stride_w, [&](const auto& load) {
    for_each_run<T>(problem, n, c, [&](const T* pixels, int32_t count, int32_t lane) {
      for (int32_t i = 0; i < count; ++i) {
        const double v = load(pixels, i);
        lanes.sum[lane + i] += v;
        lanes.low[lane + i] = v < lanes.low[lane + i] ? v : lanes.low[lane + i];
        lanes.high[lane + i] = v > lanes.high[lane + i] ? v : lanes.high[lane + i];
        lanes.nans[lane + i] += v == v ? 0.0 : 1.0;
      }
    });
  });
  Statistics statistics = lanes.range().statistics();
  if (problem.noise != Noise::kGaussian) return statistics;

  const double pixels = static_cast<double>(int64_t{problem.height} * problem.width);
  const double mean = lanes.folded_sum() / pixels;
  Lanes squares;
  with_stride<T>(problem.stride_w, [&](const auto& load) {
    for_each_run<T>(problem, n, c, [&](const T* run, int32_t count, int32_t lane) {
      for (int32_t i = 0; i < count; ++i) {
        const double off = load(run, i) - mean;
        squares.sum[lane + i] += off * off;
      }
    });
  });
  statistics.mean = mean;
  statistics.deviation = rounded_sqrt(squares.folded_sum() / pixels);
  return statistics;
}

/// The statistics of the images whose window leaves them.
template <class T>
std::vector<Statistics> needed_statistics(const GlimpseProblem& problem) {
  std::vector<int64_t> images;
  for (int64_t n = 0; n < problem.batch; ++n) {
    if (leaves_image(problem, glimpse_window(problem, n))) images.push_back(n);
  }
  const int64_t channels = problem.channels;
  std::vector<Statistics> planes(images.size() * channels);
  parallel_for(0, static_cast<int64_t>(planes.size()), 1, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      planes[i] = plane_statistics<T>(problem, images[i / channels], i % channels);
    }
  });
  const bool gaussian = problem.noise == Noise::kGaussian;
  std::vector<Statistics> result(problem.batch * (gaussian ? channels : 1));
  for (size_t i = 0; i < images.size(); ++i) {
    const Statistics* own = planes.data() + i * channels;
    if (gaussian) {
      std::copy_n(own, channels, result.data() + images[i] * channels);
    } else {
      Range range = Range::none();
      for (int64_t c = 0; c < channels; ++c) range.add(own[c].low, own[c].high);
      result[images[i]] = range.statistics();
    }
  }
  return result;
}

}  // namespace

void cpu_copy_glimpse(const GlimpseProblem& problem) {
  if (problem.noise != Noise::kZero) {
    return with_gradient_type(problem.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const std::vector<Statistics> statistics = needed_statistics<T>(problem);
      copy_typed<T>(problem, NoiseFill{problem, statistics});
    });
  }
  switch (problem.element_bytes) {
    case 1:
      return copy_typed<uint8_t>(problem, ZeroFill());
    case 2:
      return copy_typed<uint16_t>(problem, ZeroFill());
    case 4:
      return copy_typed<uint32_t>(problem, ZeroFill());
    default:
      return copy_typed<uint64_t>(problem, ZeroFill());
  }
}

}  // namespace glimpse
