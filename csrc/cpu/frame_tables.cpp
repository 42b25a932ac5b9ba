// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/frame_tables.h"

#include <algorithm>

namespace glimpse {
namespace {

/// The samples of an axis that may be on the map: local positions, cell after cell.
template <class A>
struct Lines {
  std::vector<int32_t> start;  // [cells + 1]
  std::vector<A> local, progress;

  Lines(const Axis<A>& axis, int32_t cells, A low, A high) {
    start.reserve(static_cast<size_t>(cells) + 1);
    for (int32_t cell = 0; cell < cells; ++cell) {
      start.push_back(static_cast<int32_t>(local.size()));
      const SampleRange range = samples_within(axis, cell, low, high);
      for (int32_t i = range.first; i < range.end; ++i) {
        local.push_back(axis.position(cell, i));
        progress.push_back(axis.progress(cell, i));
      }
    }
    start.push_back(static_cast<int32_t>(local.size()));
  }
};

/// Pixels first..last of one direction that positions from low to high can touch.
struct Span {
  int32_t first, last;

  template <class A>
  static Span of(A low, A high, int32_t size) {
    const A top = static_cast<A>(size - 1);
    // Positions outside are dropped or read the edge pixel, and NaN reads nothing.
    const auto first = static_cast<int32_t>(low > 0 ? std::min(low, top) : A(0));
    const auto last = static_cast<int32_t>(high > 0 ? std::min(high, top) : A(0));
    return {first, last < size - 1 ? last + 1 : last};
  }
  int64_t size() const { return int64_t{last} - first + 1; }
};

/// Sums over a rectangle of pixels, and which of them were touched.
template <class A>
struct Square {
  Span y, x;
  std::vector<A> sums;
  std::vector<uint8_t> touched;

  void open(Span rows, Span columns, size_t numbers) {
    y = rows;
    x = columns;
    const auto area = static_cast<size_t>(y.size() * x.size());
    if (touched.size() < area) touched.resize(area, 0);
    if (sums.size() < area * numbers) sums.resize(area * numbers, A(0));
  }
};

template <class A>
class CellTableBuilder {
 public:
  CellTableBuilder(const FrameProblem& problem, const FrameBox<A>& box, PixelStrides strides,
                   bool slopes, CellTable<A>& table)
      : problem_(problem),
        box_(box),
        strides_(strides),
        slopes_(slopes),
        numbers_(slopes ? kFrameColumns : 1),
        factor_(frame_factor(box.frame)),
        y_(box.frame.axis[0], problem.out_height, box.reach.low[0], box.reach.high[0]),
        x_(box.frame.axis[1], problem.out_width, box.reach.low[1], box.reach.high[1]),
        table_(table) {}

  void build() {
    for (int32_t i = 0; i < problem_.out_height; ++i) {
      for (int32_t j = 0; j < problem_.out_width; ++j) {
        table_.start.push_back(static_cast<int32_t>(table_.offset.size()));
        add_cell(i, j);
      }
    }
    table_.start.push_back(static_cast<int32_t>(table_.offset.size()));
  }

 private:
  void add_cell(int32_t i, int32_t j) {
    const int32_t rows = y_.start[i + 1] - y_.start[i], columns = x_.start[j + 1] - x_.start[j];
    if (rows == 0 || columns == 0) return;
    // Positions are affine and roundings monotone, so corners hold the extremes, if all are finite.
    const A y0 = y_.local[y_.start[i]], y1 = y_.local[y_.start[i + 1] - 1];
    const A x0 = x_.local[x_.start[j]], x1 = x_.local[x_.start[j + 1] - 1];
    const Frame<A>& frame = box_.frame;
    const A corners_y[4] = {frame.position_y(y0, x0), frame.position_y(y0, x1),
                            frame.position_y(y1, x0), frame.position_y(y1, x1)};
    const A corners_x[4] = {frame.position_x(y0, x0), frame.position_x(y0, x1),
                            frame.position_x(y1, x0), frame.position_x(y1, x1)};
    bool finite = true;
    for (const A corner : corners_y) finite = finite && corner - corner == 0;
    for (const A corner : corners_x) finite = finite && corner - corner == 0;
    const auto [low_y, high_y] = std::minmax_element(corners_y, corners_y + 4);
    const auto [low_x, high_x] = std::minmax_element(corners_x, corners_x + 4);
    const Span span_y = Span::of(*low_y, *high_y, problem_.map.height);
    const Span span_x = Span::of(*low_x, *high_x, problem_.map.width);
    const int64_t samples = int64_t{rows} * columns;
    const bool merge = finite && samples > 1 && span_y.size() * span_x.size() <= 8 * samples + 16;
    if (merge) square_.open(span_y, span_x, numbers_);
    for (int32_t a = y_.start[i]; a < y_.start[i + 1]; ++a) {
      for (int32_t b = x_.start[j]; b < x_.start[j + 1]; ++b) add_sample(a, b, merge);
    }
    if (merge) close();
  }

  void add_sample(int32_t a, int32_t b, bool merge) {
    const FramePoint<A> point{y_.local[a], x_.local[b], y_.progress[a], x_.progress[b]};
    const FrameTaps<A> taps = FrameTaps<A>::at(box_.frame, point.local_y, point.local_x,
                                               problem_.map.height, problem_.map.width);
    if (!taps.kept()) return;
    A values[4 * kFrameColumns];  // [tap][number]
    if (slopes_) {
      for (int32_t tap = 0; tap < 4; ++tap) {
        const int32_t y = tap / 2, x = tap % 2;
        for_each_column_slope(box_, point, taps.y.slope[y] * taps.x.weight[x],
                              taps.y.weight[y] * taps.x.slope[x], taps.y.slope[y] * taps.x.slope[x],
                              [&](int32_t column, A slope) {
                                values[tap * kFrameColumns + column] = slope * factor_;
                              });
      }
    } else {
      const TapWeights<A> weights = sample_weights(box_, point, taps);
      for (int32_t tap = 0; tap < 4; ++tap) values[tap] = weights.value[tap] * factor_;
    }
    for (int32_t y = 0; y < taps.y.count; ++y) {
      for (int32_t x = 0; x < taps.x.count; ++x) {
        const A* own = values + (2 * y + x) * numbers_;
        if (merge) {
          const auto at =
              static_cast<size_t>((taps.y.pixel[y] - square_.y.first) * square_.x.size() +
                                  taps.x.pixel[x] - square_.x.first);
          square_.touched[at] = 1;
          for (int32_t n = 0; n < numbers_; ++n) square_.sums[at * numbers_ + n] += own[n];
        } else {
          push(taps.y.pixel[y], taps.x.pixel[x], own);
        }
      }
    }
  }

  void close() {
    size_t at = 0;
    for (int32_t y = square_.y.first; y <= square_.y.last; ++y) {
      for (int32_t x = square_.x.first; x <= square_.x.last; ++x, ++at) {
        if (square_.touched[at] == 0) continue;
        A* own = square_.sums.data() + at * numbers_;
        push(y, x, own);
        square_.touched[at] = 0;
        std::fill_n(own, numbers_, A(0));
      }
    }
  }

  void push(int32_t y, int32_t x, const A* values) {
    table_.offset.push_back(y * strides_.height + x * strides_.width);
    table_.weight.insert(table_.weight.end(), values, values + numbers_);
  }

  const FrameProblem& problem_;
  const FrameBox<A>& box_;
  const PixelStrides strides_;
  const bool slopes_;
  const int32_t numbers_;
  const A factor_;
  const Lines<A> y_, x_;
  CellTable<A>& table_;
  Square<A> square_;
};

template <class A>
int64_t samples_of(const FrameProblem& problem, const FrameBox<A>& box, int32_t direction) {
  const int32_t cells = direction == kY ? problem.out_height : problem.out_width;
  const Axis<A>& axis = box.frame.axis[direction];
  if (problem.op.sampling_ratio > 0) return int64_t{axis.samples} * cells;
  int64_t lines = 0;
  for (int32_t cell = 0; cell < cells; ++cell) {
    const SampleRange range =
        samples_within(axis, cell, box.reach.low[direction], box.reach.high[direction]);
    lines += range.end - range.first;
  }
  return lines;
}

}  // namespace

template <class A>
void build_cell_table(const FrameProblem& problem, int64_t k, PixelStrides strides, bool slopes,
                      CellTable<A>& table) {
  const FrameBox<A> box = read_frame<A>(problem, k);
  table.box = k;
  table.image = box.image;
  table.start.clear();
  table.offset.clear();
  table.weight.clear();
  if (!box.reads) {
    table.start.assign(static_cast<size_t>(problem.out_height) * problem.out_width + 1, 0);
    return;
  }
  CellTableBuilder<A>(problem, box, strides, slopes, table).build();
}

template <class A>
int64_t end_of_table_chunk(const FrameProblem& problem, int64_t first) {
  constexpr int64_t kMostBoxes = 512, kMostSamples = int64_t{1} << 19;
  int64_t samples = 0, end = first;
  for (; end < problem.boxes && end - first < kMostBoxes; ++end) {
    const FrameBox<A> box = read_frame<A>(problem, end);
    if (box.reads) samples += samples_of(problem, box, kY) * samples_of(problem, box, kX);
    if (samples > kMostSamples && end > first) break;
  }
  return end;
}

template <class A>
void build_sample_table(const FrameProblem& problem, int64_t k, PixelStrides strides,
                        SampleTable<A>& table) {
  constexpr int64_t kMostLines = int64_t{1} << 14, kMostSamples = int64_t{1} << 16;
  table.box = k;
  table.frame = read_frame<A>(problem, k);
  table.complete = false;
  table.tap.clear();
  table.point.clear();
  const FrameBox<A>& box = table.frame;
  if (!box.reads) return;
  const int64_t lines_y = samples_of(problem, box, kY), lines_x = samples_of(problem, box, kX);
  if (lines_y > kMostLines || lines_x > kMostLines || lines_y * lines_x > kMostSamples) return;
  const Lines<A> y(box.frame.axis[0], problem.out_height, box.reach.low[0], box.reach.high[0]);
  const Lines<A> x(box.frame.axis[1], problem.out_width, box.reach.low[1], box.reach.high[1]);
  table.y = y.start;
  table.x = x.start;
  for (size_t a = 0; a < y.local.size(); ++a) {
    for (size_t b = 0; b < x.local.size(); ++b) {
      const FramePoint<A> point{y.local[a], x.local[b], y.progress[a], x.progress[b]};
      const FrameTaps<A> taps = FrameTaps<A>::at(box.frame, point.local_y, point.local_x,
                                                 problem.map.height, problem.map.width);
      SampleTap<A> tap;
      tap.offset = taps.y.pixel[0] * strides.height + taps.x.pixel[0] * strides.width;
      tap.highs = taps.kept() ? (taps.y.count == 2 ? 1 : 0) | (taps.x.count == 2 ? 2 : 0) : -1;
      const TapWeights<A> weights = sample_weights(box, point, taps);
      std::copy_n(weights.value, 4, tap.weight);
      table.tap.push_back(tap);
      table.point.push_back(point);
    }
  }
  table.complete = true;
}

template <class A>
void list_candidates(const FrameProblem& problem, SampleTable<A>& table) {
  std::vector<Candidate>& list = table.candidate;
  list.clear();
  table.candidates.clear();
  for (int32_t i = 0; i < problem.out_height; ++i) {
    for (int32_t j = 0; j < problem.out_width; ++j) {
      table.candidates.push_back(static_cast<int32_t>(list.size()));
      const CellWindow window = cell_window(table.frame, i, j);
      const DroppedAround dropped = DroppedAround::of(table.frame.frame, window);
      const auto drop = [&list](bool really) {
        if (really) list.push_back({-1, -1});
      };
      drop(dropped.before);
      int32_t index = 0;
      for (int32_t y = table.y[i]; y < table.y[i + 1] && window.size() > 0; ++y) {
        drop(dropped.left);
        for (int32_t x = table.x[j]; x < table.x[j + 1]; ++x, ++index) {
          const auto tap = static_cast<int32_t>(y * table.lines_x() + x);
          const bool kept = table.tap[static_cast<size_t>(tap)].highs >= 0;
          list.push_back(kept ? Candidate{tap, index} : Candidate{-1, -1});
        }
        drop(dropped.right);
      }
      drop(dropped.after);
    }
  }
  table.candidates.push_back(static_cast<int32_t>(list.size()));
}

template void list_candidates(const FrameProblem&, SampleTable<float>&);
template void list_candidates(const FrameProblem&, SampleTable<double>&);
template void build_cell_table(const FrameProblem&, int64_t, PixelStrides, bool, CellTable<float>&);
template void build_cell_table(const FrameProblem&, int64_t, PixelStrides, bool,
                               CellTable<double>&);
template int64_t end_of_table_chunk<float>(const FrameProblem&, int64_t);
template int64_t end_of_table_chunk<double>(const FrameProblem&, int64_t);
template void build_sample_table(const FrameProblem&, int64_t, PixelStrides, SampleTable<float>&);
template void build_sample_table(const FrameProblem&, int64_t, PixelStrides, SampleTable<double>&);

}  // namespace glimpse
