// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "problem.h"

namespace glimpse {

// Note [Plan, then apply]
// A call first writes down what every box reads, as tables of indices and weights, and then
// applies the tables to all channels. Planning is scalar, branchy and the only part that computes
// a coordinate. Applying is all the work, and knows neither operators nor borders.
//
// A kernel that is to run without branches wants rows of one length. Rows are padded in a way that
// no pixel can notice, not even an infinite one: with a slot of zeros that the kernel provides
// (kZeroSlot), or by splitting the last tap in two halves (kSplit).

/// A sparse matrix: row r holds the taps [begin(r), end(r)).
template <class A>
struct Table {
  int32_t first = 0, end = 0;       // rows outside have no taps
  int32_t uniform = 0;              // taps in each row of [first, end); 0: see `start`
  const int32_t* start = nullptr;   // [end - first + 1] where rows differ in length
  const int32_t* target = nullptr;  // transposed tables: the pixel of each row
  const int32_t* index = nullptr;
  const A* weight = nullptr;
  const A* slope_origin = nullptr;  // of grad_boxes only
  const A* slope_step = nullptr;

  int32_t tap_begin(int32_t row) const {
    return uniform != 0 ? (row - first) * uniform : start[row - first];
  }
  int32_t tap_end(int32_t row) const {
    return uniform != 0 ? (row - first + 1) * uniform : start[row - first + 1];
  }
};

/// A sparse matrix whose rows are the lanes of vectors: block b holds rows b * lanes and on, and
/// its taps come vector by vector. Rows of a block that have fewer taps than the longest are
/// cleared in the vectors that they lack, so that they add nothing, not even a NaN.
template <class A>
struct LaneTable {
  enum Kind : uint8_t { kFar = 1, kPartial = 2 };

  int32_t blocks = 0;
  const int32_t* start = nullptr;  // [blocks + 1] in vectors of taps
  const uint8_t* kind = nullptr;   // of each vector: an index reaches two vectors; a tap is missing
  const int32_t* base = nullptr;   // of each vector: the lowest index
  const int32_t* index = nullptr;  // [lanes] of each: counted from the base
  const A* weight = nullptr;
  const A* slope_origin = nullptr;  // of grad_boxes only
  const A* slope_step = nullptr;
  const A* tap_mask = nullptr;  // [lanes] of each vector: all bits set where it has a tap
  const A* row_mask = nullptr;  // [lanes] of each block: all bits set where a row has taps
};

/// A sparse matrix whose rows are lanes that pick out of a few vectors in registers, see pick() of
/// simd.h. All rows have `taps` taps; one that is missing has no bit in its mask.
template <class A>
struct PickTable {
  int32_t blocks = 0, taps = 0;
  const uint8_t* index = nullptr;   // [blocks][taps][lanes]
  const uint16_t* mask = nullptr;   // [blocks][taps]
  const A* weight = nullptr;        // [blocks][taps][lanes]
  const A* slope_origin = nullptr;  // of grad_boxes only
  const A* slope_step = nullptr;
};

/// Longest rows that are padded to one length, and that kernels are specialised for.
constexpr int32_t kMaxUniform = 6;
/// Wider windows and outputs are served cell by cell, so that scratch stays small.
constexpr int32_t kMaxColumns = 2048;

/// What one box reads.
template <class A>
struct BoxPlan {
  int64_t box;
  int64_t image;
  int32_t level;
  bool empty;   // reads nothing
  bool direct;  // serve cell by cell: few cells of a wide window, or too much for scratch
  bool narrow;  // few channels: lanes are cells or columns; see Note [Cells in lanes] of apply.h
  bool planar;  // channel by channel; see Note [One plane at a time] of apply_planes.h

  /// kNchw and narrow (there in elements: columns of all channels that lie between): the window,
  /// `vectors` vectors of pixels from first_column on, of which the last one may read `last_valid`
  /// pixels before the row of the map ends.
  int32_t first_column, vectors, last_valid;
  /// kNhwc: transposed tables list the columns that are touched, and no others.
  int32_t slots;

  Table<A> y;  // cell -> rows of the map
  Table<A> x;  // cell -> columns: counted from first_column (kNchw), as slots (kNhwc, grad_boxes,
               // not direct), or absolute (kNhwc)
  Table<A> y_transposed;  // touched row -> cells
  Table<A> x_transposed;  // column (kNchw: each of the window; kNhwc: slot) -> cells
  const A* column_mask;   // kNchw, grad_boxes: all bits set where a column is touched
  const int32_t* unread;  // sample: cells along x that read nothing, where the fill is not 0
  int32_t unread_count;

  PickTable<A> picks;  // planar: of the cells, or (gradients) of the columns of the window
  int32_t packed;      // planar, sample: rows of cells in a vector

  LaneTable<A> lanes;  // narrow: of the cells (elements of a row of cells); grad_features: columns

  /// The numbers that take gradients of origin and step to the box edges.
  Axis<A> axis[2];
};

/// Memory that is released at once.
class Arena {
 public:
  template <class T>
  T* allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 15) & ~size_t{15};
    if (bytes > left_) grow(bytes);
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return result;
  }

 private:
  void grow(size_t bytes);

  std::vector<std::unique_ptr<char[]>> blocks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

enum class Purpose { kSample, kGradFeatures, kGradBoxes };

/// Boxes of one image of one level, a run of PlanSet::plans.
struct Group {
  int64_t first, end;
  int32_t level;
  int64_t image;
};

/// The plans of the boxes [first, end) of a call.
template <class A>
class PlanSet {
 public:
  /// `lanes`: pixels in a vector of the kernels that will apply the plans; `sources`: vectors that
  /// their lanes can pick from.
  PlanSet(const Problem& problem, Purpose purpose, int64_t first, int64_t end, int32_t lanes,
          int32_t sources);

  /// Grouped by level and image; in box order inside a group. Boxes that read nothing stand last,
  /// in a group of level -1.
  const std::vector<const BoxPlan<A>*>& plans() const { return order_; }
  const std::vector<Group>& groups() const { return groups_; }
  /// Over all plans that are neither empty nor direct nor narrow, planar ones apart.
  int32_t max_vectors() const { return max_vectors_; }
  int32_t max_slots() const { return max_slots_; }
  /// Over all narrow plans; 0 where there is none.
  int32_t max_narrow_vectors() const { return max_narrow_vectors_; }
  /// Over all planar plans; 0 where there is none.
  int32_t max_planar_vectors() const { return max_planar_vectors_; }

 private:
  std::vector<BoxPlan<A>> boxes_;
  std::vector<Arena> arenas_;
  std::vector<const BoxPlan<A>*> order_;
  std::vector<Group> groups_;
  int32_t max_vectors_ = 0, max_slots_ = 0, max_narrow_vectors_ = 0, max_planar_vectors_ = 0;
};

/// Boxes planned at a time: bounds the memory of tables, while a feature map is read from memory
/// once per chunk.
constexpr int64_t kPlanChunk = 8192;

/// Bytes of planes that all boxes are served on before the next ones: a part of an L2 cache.
constexpr int64_t kPlaneBytes = 256 * 1024;

/// Planes of a map, of elements of `size` bytes, that stay in the cache together; at most `most`.
inline int64_t planes_together(const Level& level, int64_t most, int64_t size) {
  const int64_t bytes = int64_t{level.height} * level.width * size;
  const int64_t fit = bytes == 0 ? most : kPlaneBytes / bytes;
  return fit < 1 ? 1 : fit < most ? fit : most;
}

/// Uninitialised memory at vector alignment.
class Scratch {
 public:
  explicit Scratch(size_t bytes)
      : data_(bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 127) & ~size_t{63})) {
    if (bytes != 0 && data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace glimpse
