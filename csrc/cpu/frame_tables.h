// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <vector>

#include "frame_problem.h"

namespace glimpse {

// Note [Tables of a frame]
// Two tables say what a box reads. Both are built once for all of its channels.
//
// CellTable, for means: for each cell the pixels that its samples touch, each once. Samples of a
// cell lie close together and share taps, so a cell of 2 x 2 samples has 9 pixels rather than 16
// taps where they are a pixel apart, and an adaptive one reads each pixel once. They are merged in
// a small square of sums over the pixels that the cell spans, unless samples are so far apart that
// the square would be mostly empty. So a table is never larger than the cells' share of the map and
// a margin, whatever the box.
//
// SampleTable, where each channel has a sample of its own: the taps of every sample. Too large a
// number of samples gives no table, and each is evaluated when it is needed.

/// Taps of each cell; cell i has [start[i], start[i + 1]).
template <class A>
struct CellTable {
  int64_t box = 0, image = 0;
  std::vector<int32_t> start;   // [cells + 1], all 0 where the box reads nothing
  std::vector<int64_t> offset;  // of a pixel in its plane, in elements
  std::vector<A> weight;        // one for each tap, or kFrameColumns: d value / d column
};

/// What a CellTable is built for.
struct PixelStrides {
  int64_t height, width;
};

/// slopes: kFrameColumns weights for each tap, the derivatives in the columns of the box.
template <class A>
void build_cell_table(const FrameProblem& problem, int64_t k, PixelStrides strides, bool slopes,
                      CellTable<A>& table);

/// Boxes first <= k < end whose tables together are worth holding at a time.
template <class A>
int64_t end_of_table_chunk(const FrameProblem& problem, int64_t first);

/// Taps of one sample: `offset` of the low pixel; highs as in weights (low, low), (low, high), ...
template <class A>
struct SampleTap {
  int64_t offset;
  int32_t highs;  // bit 0: a high pixel along y, bit 1: along x; -1: dropped
  A weight[4];
};

/// A sample that takes part in the maximum of a cell.
struct Candidate {
  int32_t tap;    // -1: dropped, which counts as a 0
  int32_t index;  // in the cell's window; -1: dropped
};

template <class A>
struct SampleTable {
  int64_t box = 0;
  FrameBox<A> frame;
  bool complete = false;          // false: the samples have no table
  std::vector<int32_t> y, x;      // first line of each cell of y and of x, and the end
  std::vector<SampleTap<A>> tap;  // [line of y][line of x]
  std::vector<FramePoint<A>> point;
  std::vector<Candidate> candidate;  // of all cells in order, each in the order of its samples
  std::vector<int32_t> candidates;   // where those of a cell start, and the end

  int64_t lines_x() const { return x.back(); }
  /// The number of the tap of the chosen sample of a cell, or -1.
  int64_t find(int32_t cell_y, int32_t cell_x, int32_t chosen) const {
    const int64_t columns = x[cell_x + 1] - x[cell_x], rows = y[cell_y + 1] - y[cell_y];
    if (chosen < 0 || chosen >= rows * columns) return -1;
    const int64_t at = (y[cell_y] + chosen / columns) * lines_x() + x[cell_x] + chosen % columns;
    return tap[static_cast<size_t>(at)].highs < 0 ? -1 : at;
  }
};

template <class A>
void build_sample_table(const FrameProblem& problem, int64_t k, PixelStrides strides,
                        SampleTable<A>& table);

/// Lists the candidates of all cells of a complete table.
template <class A>
void list_candidates(const FrameProblem& problem, SampleTable<A>& table);

}  // namespace glimpse
