// SPDX-License-Identifier: BSD-3-Clause
//
// Operators on frames: builds the tables of some boxes, and applies them in tasks.
#include "cpu/frames.h"

#include <algorithm>
#include <cstring>

#include "cpu/backend.h"
#include "cpu/dtypes.h"
#include "cpu/frame_kernels.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace glimpse {
namespace {

template <class T>
const FrameKernels<T>& kernels_in_use() {
#if defined(__x86_64__)
  if (std::strcmp(cpu_isa(), "baseline") != 0) return avx2::frame_kernels<T>();
#endif
  return baseline::frame_kernels<T>();
}

int64_t cells_of(const FrameProblem& problem) {
  return int64_t{problem.out_height} * problem.out_width;
}

PixelStrides strides_of(const Level& map) { return {map.stride_h, map.stride_w}; }

/// Calls apply(tables, count) for one chunk of boxes after the other, with their tables.
template <class A, class Apply>
void for_each_chunk(const FrameProblem& problem, PixelStrides strides, const Apply& apply) {
  std::vector<CellTable<A>> tables;
  for (int64_t first = 0; first < problem.boxes;) {
    const int64_t end = end_of_table_chunk<A>(problem, first);
    const int64_t count = end - first;
    if (static_cast<int64_t>(tables.size()) < count) tables.resize(static_cast<size_t>(count));
    parallel_tasks(count, workers_for(count * cells_of(problem) * 16), [&](const auto& next) {
      for (int64_t i = next(); i < count; i = next()) {
        build_cell_table(problem, first + i, strides, false, tables[static_cast<size_t>(i)]);
      }
    });
    apply(tables.data(), count);
    first = end;
  }
}

/// Calls visit(channel, cell_y, cell_x, offset) for the outputs of a box in channels
/// [channel, end), in the order of memory.
template <class Visit>
void for_each_element(const FrameProblem& problem, int64_t box, int64_t channel, int64_t end,
                      const Visit& visit) {
  if (problem.layout == Layout::kNchw) {
    for (int64_t c = channel; c < end; ++c) {
      int64_t offset = (box * problem.channels + c) * cells_of(problem);
      for (int32_t i = 0; i < problem.out_height; ++i) {
        for (int32_t j = 0; j < problem.out_width; ++j, ++offset) visit(c, i, j, offset);
      }
    }
    return;
  }
  for (int32_t i = 0; i < problem.out_height; ++i) {
    for (int32_t j = 0; j < problem.out_width; ++j) {
      const int64_t cell = (box * problem.out_height + i) * problem.out_width + j;
      for (int64_t c = channel; c < end; ++c) visit(c, i, j, cell * problem.channels + c);
    }
  }
}

/// visit(weight, offset) for the taps of a sample, offsets from pixel (0, 0).
template <class A, class Visit>
void for_each_offset(const SampleTap<A>& tap, PixelStrides strides, const Visit& visit) {
  visit(tap.weight[0], tap.offset);
  if ((tap.highs & 2) != 0) visit(tap.weight[1], tap.offset + strides.width);
  if ((tap.highs & 1) != 0) {
    visit(tap.weight[2], tap.offset + strides.height);
    if ((tap.highs & 2) != 0) visit(tap.weight[3], tap.offset + strides.height + strides.width);
  }
}

/// Calls visit(weight, offset) for the taps of the chosen sample of a cell.
template <class A, class Visit>
void for_each_chosen(const FrameProblem& problem, const SampleTable<A>& table, PixelStrides strides,
                     int32_t i, int32_t j, int32_t chosen, const Visit& visit) {
  if (!table.frame.reads) return;
  if (table.complete) {
    const int64_t at = table.find(i, j, chosen);
    if (at >= 0) for_each_offset(table.tap[static_cast<size_t>(at)], strides, visit);
    return;
  }
  for_chosen_sample(problem, table.frame, i, j, chosen, [&](const auto& point, const auto& taps) {
    const TapWeights<A> weights = sample_weights(table.frame, point, taps);
    for (int32_t y = 0; y < taps.y.count; ++y) {
      for (int32_t x = 0; x < taps.x.count; ++x) {
        visit(weights.value[2 * y + x],
              taps.y.pixel[y] * strides.height + taps.x.pixel[x] * strides.width);
      }
    }
  });
}

// ------------------------------------------------------------------------------------------ sample

template <class T>
void sample_typed(const FrameProblem& problem) {
  using A = acc_t<T>;
  const FrameKernels<T>& kernel = kernels_in_use<T>();
  // In kNchw the planes of a block of channels stay in the cache for all boxes of a chunk.
  const int64_t block = problem.layout == Layout::kNchw ? 8 : problem.channels;
  const int64_t blocks = (problem.channels + block - 1) / block;
  for_each_chunk<A>(
      problem, strides_of(problem.map), [&](const CellTable<A>* tables, int64_t count) {
        const int64_t workers = workers_for(count * problem.channels * cells_of(problem));
        const int64_t runs = std::clamp<int64_t>((4 * workers + blocks - 1) / blocks, 1, count);
        parallel_tasks(blocks * runs, workers, [&](const auto& next) {
          for (int64_t task = next(); task < blocks * runs; task = next()) {
            const int64_t channel = task / runs * block, run = task % runs;
            const int64_t end = std::min(problem.channels, channel + block);
            for (int64_t i = count * run / runs; i < count * (run + 1) / runs; ++i) {
              kernel.sample(problem, tables[i], channel, end);
            }
          }
        });
      });
}

template <class T>
void sample_chosen(const FrameProblem& problem) {
  using A = acc_t<T>;
  const Level& map = problem.map;
  auto* pooled = static_cast<pooled_t<T>*>(problem.pooled);
  const int64_t workers = workers_for(problem.boxes * problem.channels * cells_of(problem));
  parallel_tasks(problem.boxes, workers, [&](const auto& next) {
    SampleTable<A> table;
    for (int64_t k = next(); k < problem.boxes; k = next()) {
      build_sample_table(problem, k, strides_of(map), table);
      const T* image = static_cast<const T*>(map.data) + table.frame.image * map.stride_n;
      for_each_element(
          problem, k, 0, problem.channels, [&](int64_t c, int32_t i, int32_t j, int64_t offset) {
            A sum = 0;
            for_each_chosen(problem, table, strides_of(map), i, j, problem.chosen[offset],
                            [&](A weight, int64_t pixel) {
                              sum += weight * load_value(image[c * map.stride_c + pixel]);
                            });
            pooled[offset] = Store<pooled_t<T>>::from(sum);
          });
    }
  });
}

template <class T>
void maximum_typed(const FrameProblem& problem) {
  using A = acc_t<T>;
  const FrameKernels<T>& kernel = kernels_in_use<T>();
  const Level& map = problem.map;
  const int64_t workers = workers_for(problem.boxes * problem.channels * cells_of(problem));
  parallel_tasks(problem.boxes, workers, [&](const auto& next) {
    SampleTable<A> table;
    const Scratch scratch(sizeof(A) * 2 * static_cast<size_t>(problem.channels));
    for (int64_t k = next(); k < problem.boxes; k = next()) {
      build_sample_table(problem, k, strides_of(map), table);
      if (table.complete) {
        list_candidates(problem, table);
        kernel.maximum(problem, table, scratch.as<A>());
        continue;
      }
      const FrameBox<A>& box = table.frame;
      const T* image = static_cast<const T*>(map.data) + box.image * map.stride_n;
      for_each_element(
          problem, k, 0, problem.channels, [&](int64_t c, int32_t i, int32_t j, int64_t offset) {
            Maximum<A> largest = Maximum<A>::none();
            if (box.reads) {
              for_each_candidate(problem, box, i, j, [&](int32_t index, const auto& taps) {
                A value = 0;
                for (int32_t y = 0; y < taps.y.count; ++y) {
                  for (int32_t x = 0; x < taps.x.count; ++x) {
                    value += taps.y.weight[y] * taps.x.weight[x] *
                             load_value(image[c * map.stride_c + taps.y.pixel[y] * map.stride_h +
                                              taps.x.pixel[x] * map.stride_w]);
                  }
                }
                largest.take(value, index);
              });
            }
            static_cast<pooled_t<T>*>(problem.pooled)[offset] =
                Store<pooled_t<T>>::from(largest.value);
            problem.winner[offset] = largest.sample;
          });
    }
  });
}

// -------------------------------------------------------------------------------- gradient to maps

/// Sums for the whole map: the map itself where it holds sums exactly, else a copy in float.
template <class T>
class MapSums {
 public:
  using A = acc_t<T>;

  explicit MapSums(const FrameProblem& problem)
      : problem_(problem),
        image_(problem.channels * problem.map.height * problem.map.width),
        copy_(std::is_same_v<T, A> ? 0 : sizeof(A) * static_cast<size_t>(problem.batch * image_)) {
    A* sums = data();
    const int64_t all = problem.batch * image_;
    parallel_for(0, all, 1 << 16,
                 [&](int64_t first, int64_t end) { std::fill(sums + first, sums + end, A(0)); });
  }
  A* of_image(int64_t image) { return data() + image * image_; }
  /// The map was made for this call and is dense, so both have these strides.
  PixelStrides strides() const {
    return problem_.layout == Layout::kNhwc
               ? PixelStrides{problem_.map.width * problem_.channels, problem_.channels}
               : PixelStrides{problem_.map.width, 1};
  }
  int64_t stride_c() const {
    return problem_.layout == Layout::kNhwc ? 1 : int64_t{problem_.map.height} * problem_.map.width;
  }
  void finish() {
    if constexpr (!std::is_same_v<T, A>) {
      const A* sums = data();
      T* to = static_cast<T*>(problem_.map.data);
      parallel_for(0, problem_.batch * image_, 1 << 14, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) to[i] = Store<T>::from(sums[i]);
      });
    }
  }

 private:
  A* data() {
    if constexpr (std::is_same_v<T, A>) {
      return static_cast<A*>(problem_.map.data);
    } else {
      return copy_.template as<A>();
    }
  }

  const FrameProblem& problem_;
  const int64_t image_;
  const Scratch copy_;
};

/// Tasks are blocks of channels: each owns them in all images and takes the boxes in order.
template <class Body>
void for_each_channel_block(const FrameProblem& problem, int64_t boxes, const Body& body) {
  const int64_t workers = workers_for(boxes * problem.channels * cells_of(problem));
  // Whole vectors and cache lines where channels are innermost.
  const int64_t least = problem.layout == Layout::kNhwc ? 32 : 8;
  const int64_t wanted = workers == 1 && problem.layout == Layout::kNhwc
                             ? problem.channels
                             : (problem.channels + 2 * workers - 1) / (2 * workers);
  const int64_t block = problem.layout == Layout::kNhwc
                            ? std::max(least, (wanted + least - 1) / least * least)
                            : least;
  const int64_t blocks = (problem.channels + block - 1) / block;
  parallel_tasks(blocks, workers, [&](const auto& next) {
    for (int64_t task = next(); task < blocks; task = next()) {
      body(task * block, std::min(problem.channels, (task + 1) * block));
    }
  });
}

template <class T>
void grad_features_typed(const FrameProblem& problem) {
  using A = acc_t<T>;
  const FrameKernels<T>& kernel = kernels_in_use<T>();
  MapSums<T> sums(problem);
  for_each_chunk<A>(problem, sums.strides(), [&](const CellTable<A>* tables, int64_t count) {
    for_each_channel_block(problem, count, [&](int64_t channel, int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        if (tables[i].offset.empty()) continue;
        kernel.grad_features(problem, tables[i], channel, end, sums.of_image(tables[i].image),
                             sums.stride_c());
      }
    });
  });
  sums.finish();
}

template <class T>
void grad_features_chosen(const FrameProblem& problem) {
  using A = acc_t<T>;
  const auto* grad = static_cast<const T*>(problem.pooled);
  MapSums<T> sums(problem);
  for_each_channel_block(problem, problem.boxes, [&](int64_t channel, int64_t end) {
    SampleTable<A> table;
    for (int64_t k = 0; k < problem.boxes; ++k) {
      build_sample_table(problem, k, sums.strides(), table);
      if (!table.frame.reads) continue;
      A* image = sums.of_image(table.frame.image);
      for_each_element(
          problem, k, channel, end, [&](int64_t c, int32_t i, int32_t j, int64_t offset) {
            const A g = load_value(grad[offset]);
            A* plane = image + c * sums.stride_c();
            for_each_chosen(problem, table, sums.strides(), i, j, problem.chosen[offset],
                            [&](A weight, int64_t pixel) { plane[pixel] += weight * g; });
          });
    }
  });
  sums.finish();
}

// ------------------------------------------------------------------------------- gradient to boxes

template <class A>
void store_columns(const FrameProblem& problem, int64_t k, const double* sums) {
  A* row = static_cast<A*>(problem.grad_box) + k * problem.box_columns;
  const int32_t columns = problem.op.columns();
  std::fill_n(row, problem.box_columns, A(0));
  for (int32_t i = 0; i < columns; ++i) {
    row[problem.box_columns - columns + i] = static_cast<A>(sums[i]);
  }
}

template <class T>
void grad_boxes_typed(const FrameProblem& problem) {
  using A = acc_t<T>;
  const FrameKernels<T>& kernel = kernels_in_use<T>();
  const int64_t workers = workers_for(problem.boxes * problem.channels * cells_of(problem));
  parallel_tasks(problem.boxes, workers, [&](const auto& next) {
    CellTable<A> table;
    std::vector<A> scratch;
    for (int64_t k = next(); k < problem.boxes; k = next()) {
      build_cell_table(problem, k, strides_of(problem.map), true, table);
      scratch.resize(table.offset.size());
      double sums[kFrameColumns] = {};
      kernel.grad_boxes(problem, table, scratch.data(), sums);
      store_columns<A>(problem, k, sums);
    }
  });
}

/// The gradient times the pixels at the four taps of a sample, over some channels.
template <class A>
struct SampleProducts {
  A at[4] = {};

  template <class T>
  void add(A g, const T* plane, const Level& map, int64_t offset, bool high_y, bool high_x) {
    at[0] += g * load_value(plane[offset]);
    if (high_x) at[1] += g * load_value(plane[offset + map.stride_w]);
    if (high_y) at[2] += g * load_value(plane[offset + map.stride_h]);
    if (high_y && high_x) at[3] += g * load_value(plane[offset + map.stride_h + map.stride_w]);
  }
  void add_columns(const FrameBox<A>& box, const FramePoint<A>& point, const FrameTaps<A>& taps,
                   double* sums) const {
    double in_y = 0, in_x = 0, in_both = 0;
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t y = i / 2, x = i % 2;
      const double product = at[i];
      in_y += product * taps.y.slope[y] * taps.x.weight[x];
      in_x += product * taps.y.weight[y] * taps.x.slope[x];
      in_both += product * taps.y.slope[y] * taps.x.slope[x];
    }
    for_each_column_slope(box, point, in_y, in_x, in_both,
                          [&](int32_t column, double slope) { sums[column] += slope; });
  }
};

template <class T>
void grad_boxes_chosen(const FrameProblem& problem) {
  using A = acc_t<T>;
  const Level& map = problem.map;
  const auto* grad = static_cast<const pooled_t<T>*>(problem.pooled);
  const int64_t workers = workers_for(problem.boxes * problem.channels * cells_of(problem));
  parallel_tasks(problem.boxes, workers, [&](const auto& next) {
    SampleTable<A> table;
    std::vector<SampleProducts<A>> products;
    for (int64_t k = next(); k < problem.boxes; k = next()) {
      build_sample_table(problem, k, strides_of(map), table);
      const FrameBox<A>& box = table.frame;
      const T* image = static_cast<const T*>(map.data) + box.image * map.stride_n;
      double sums[kFrameColumns] = {};
      products.assign(table.tap.size(), SampleProducts<A>());
      const auto visit = [&](int64_t c, int32_t i, int32_t j, int64_t offset) {
        const A g = load_value(grad[offset]);
        const T* plane = image + c * map.stride_c;
        if (table.complete) {
          const int64_t at = table.find(i, j, problem.chosen[offset]);
          if (at < 0) return;
          const SampleTap<A>& tap = table.tap[static_cast<size_t>(at)];
          products[static_cast<size_t>(at)].add(g, plane, map, tap.offset, (tap.highs & 1) != 0,
                                                (tap.highs & 2) != 0);
          return;
        }
        for_chosen_sample(problem, box, i, j, problem.chosen[offset],
                          [&](const auto& point, const auto& taps) {
                            SampleProducts<A> own;
                            own.add(g, plane, map,
                                    taps.y.pixel[0] * map.stride_h + taps.x.pixel[0] * map.stride_w,
                                    taps.y.count == 2, taps.x.count == 2);
                            own.add_columns(box, point, taps, sums);
                          });
      };
      if (box.reads) for_each_element(problem, k, 0, problem.channels, visit);
      for (size_t i = 0; i < products.size(); ++i) {
        if (table.tap[i].highs < 0) continue;
        const FramePoint<A>& point = table.point[i];
        products[i].add_columns(
            box, point,
            FrameTaps<A>::at(box.frame, point.local_y, point.local_x, map.height, map.width), sums);
      }
      store_columns<A>(problem, k, sums);
    }
  });
}

}  // namespace

void cpu_frames_sample(const FrameProblem& problem) {
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    problem.chosen != nullptr ? sample_chosen<T>(problem) : sample_typed<T>(problem);
  });
}

void cpu_frames_maximum(const FrameProblem& problem) {
  with_feature_type(problem.dtype,
                    [&](auto type) { maximum_typed<typename decltype(type)::type>(problem); });
}

void cpu_frames_grad_features(const FrameProblem& problem) {
  with_gradient_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    problem.chosen != nullptr ? grad_features_chosen<T>(problem) : grad_features_typed<T>(problem);
  });
}

void cpu_frames_grad_boxes(const FrameProblem& problem) {
  with_feature_type(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    problem.chosen != nullptr ? grad_boxes_chosen<T>(problem) : grad_boxes_typed<T>(problem);
  });
}

}  // namespace glimpse
