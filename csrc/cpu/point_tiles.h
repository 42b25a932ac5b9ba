// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/point.h"
#include "half.h"

namespace glimpse {

// Note [Tiles of points]
// The channels of a pixel lie a plane apart, so each tap of each channel is a load of its own. An
// image with about as many points as pixels is read often enough to turn it over first: a block of
// channels is copied into a tile in which the channels of a pixel are neighbours, and a tap is a
// few vectors. On a map of 14 x 14 with 196 points this takes a third of the time.

/// Whether tiles pay: points come image by image, and a tile stays in the cache.
inline bool uses_tiles(const Problem& problem) {
  constexpr int64_t kMostPixels = 2048, kLeastChannels = 16;
  const int64_t pixels = int64_t{problem.level[0].height} * problem.level[0].width;
  return !images_vary(problem) && pixels > 0 && pixels <= kMostPixels &&
         4 * problem.boxes_per_image >= pixels && problem.channels >= kLeastChannels;
}

/// The problem as points of a tile see it: offsets of points are offsets into the tile.
inline Problem in_tiles(const Problem& problem) {
  Problem tiles = problem;
  tiles.level[0].stride_w = kChannelsTogether;
  tiles.level[0].stride_h = kChannelsTogether * problem.level[0].width;
  return tiles;
}

/// A block of channels of one image, [pixels, kChannelsTogether]; channels that are not there are
/// 0.
template <class A>
class Tile {
 public:
  explicit Tile(const Level& level)
      : level_(level),
        values_(static_cast<size_t>(level.height) * static_cast<size_t>(level.width) *
                kChannelsTogether) {}

  A* data() { return values_.data(); }
  void clear() { std::fill(values_.begin(), values_.end(), A(0)); }

  template <class T>
  void load(const T* planes, int64_t channels) {
    if (channels < kChannelsTogether) clear();
    for_each_pixel(planes, channels, [](const T& pixel, A& value) { value = load_value(pixel); });
  }
  void store(A* planes, int64_t channels) {
    for_each_pixel(planes, channels, [](A& pixel, const A& value) { pixel = value; });
  }

 private:
  /// Four channels at a time, so that what is written of a pixel lies together.
  template <class P, class Visit>
  void for_each_pixel(P* planes, int64_t channels, const Visit& visit) {
    for (int64_t first = 0; first < channels; first += 4) {
      const int64_t count = std::min<int64_t>(4, channels - first);
      for (int32_t y = 0; y < level_.height; ++y) {
        P* row = planes + first * level_.stride_c + y * level_.stride_h;
        A* to = values_.data() + int64_t{y} * level_.width * kChannelsTogether + first;
        const int64_t step = level_.stride_w, plane = level_.stride_c;
        if (count == 4) {
          for (int32_t x = 0; x < level_.width; ++x, row += step, to += kChannelsTogether) {
            for (int64_t c = 0; c < 4; ++c) visit(row[c * plane], to[c]);
          }
        } else {
          for (int32_t x = 0; x < level_.width; ++x, row += step, to += kChannelsTogether) {
            for (int64_t c = 0; c < count; ++c) visit(row[c * plane], to[c]);
          }
        }
      }
    }
  }

  const Level level_;
  std::vector<A> values_;
};

/// Calls body(tile, points, begin, end, first, count, products) for runs of points of one image,
/// `begin` to `end`, and each block of `count` channels from `first` on, with the tile of the
/// block; then end_run(begin, end, products). A run has four products for each point, 0 at first,
/// if any.
template <class T, bool kProducts, class Body, class End>
void for_each_tile(const Problem& problem, const Body& body, const End& end_run) {
  using A = acc_t<T>;
  const Problem tiles = in_tiles(problem);
  const Level& level = problem.level[0];
  const int64_t each = problem.boxes_per_image, images = problem.boxes / each;
  const int64_t workers = workers_for(4 * problem.boxes * problem.channels);
  const int64_t runs = workers == 1 ? 1 : (2 * workers + images - 1) / images;
  parallel_tasks(images * runs, workers, [&](const auto& next) {
    Tile<A> tile(level);
    Points<A> points(each);
    std::vector<double> products;
    for (int64_t task = next(); task < images * runs; task = next()) {
      const int64_t image = task / runs, run = task % runs;
      const int64_t begin = image * each + each * run / runs;
      const int64_t end = image * each + each * (run + 1) / runs;
      points.read(tiles, begin, end);
      if constexpr (kProducts) products.assign(static_cast<size_t>(4 * (end - begin)), 0.0);
      for (int64_t first = 0; first < problem.channels; first += kChannelsTogether) {
        const int64_t count = std::min(kChannelsTogether, problem.channels - first);
        tile.load(
            static_cast<const T*>(level.data) + image * level.stride_n + first * level.stride_c,
            count);
        body(tile.data(), points, begin, end, first, count, products.data());
      }
      end_run(begin, end, products.data());
    }
  });
}

template <class T>
void sample_tiles(const Problem& problem) {
  using A = acc_t<T>;
  const auto fill = Store<pooled_t<T>>::from(static_cast<A>(problem.fill));
  const auto sample = [&](const A* tile, const Points<A>& points, int64_t begin, int64_t end,
                          int64_t first, int64_t count, double*) {
    auto* to = static_cast<pooled_t<T>*>(problem.pooled) + begin * problem.channels + first;
    for (int64_t k = begin; k < end; ++k) {
      const Point<A>& point = points[k - begin];
      A sum[kChannelsTogether];
      if (point.count == 0) {
        std::fill_n(to, count, fill);
      } else {
        with_count(point.count, [&](auto taps) {
          for (int64_t c = 0; c < kChannelsTogether; ++c) {
            sum[c] = point.weight[0] * tile[point.offset[0] + c];
            for (int t = 1; t < taps; ++t) sum[c] += point.weight[t] * tile[point.offset[t] + c];
          }
        });
        for (int64_t c = 0; c < count; ++c) to[c] = Store<pooled_t<T>>::from(sum[c]);
      }
      to += problem.channels;
    }
  };
  for_each_tile<T, false>(problem, sample, [](int64_t, int64_t, const double*) {});
}

template <class T>
void grad_boxes_tiles(const Problem& problem) {
  using A = acc_t<T>;
  const PointValues<const pooled_t<T>> pooled(problem);
  const auto add = [&](const A* tile, const Points<A>& points, int64_t begin, int64_t end,
                       int64_t first, int64_t count, double* products) {
    A grad[kChannelsTogether] = {};
    for (int64_t k = begin; k < end; ++k, products += 4) {
      const Point<A>& point = points[k - begin];
      if (point.count == 0) continue;
      pooled.load(k, point.image, first, count, grad);
      add_products(grad, tile, point, kChannelsTogether, products);
    }
  };
  for_each_tile<T, true>(problem, add, [&](int64_t begin, int64_t end, const double* products) {
    write_point_gradients<A>(problem, begin, end, products);
  });
}

}  // namespace glimpse
