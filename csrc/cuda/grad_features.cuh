// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda/device.cuh"
#include "cuda/pack.cuh"
#include "cuda/split.cuh"
#include "cuda/tables.cuh"
#include "half.h"
#include "problem.h"

/// features = Ay^T * pooled gradient * Ax, summed over boxes. Two launches: what tiles need to know
/// of each box (prepare_kernel), then one of
///
///   gather_nhwc_kernel    lanes are neighbouring channels and read gradients with wide loads
///   gather_nchw_kernel    gradients are staged in shared memory, lanes are channels
///   gather_simple_kernel  a thread per element; sizes beyond 32-bit counts
namespace glimpse::cuda {

// Note [Gather backward]
// grad[y, x] = sum over boxes k, cells i, j of  Wy_k[i, y] * Wx_k[j, x] * pooled_grad_k[i, j].
// Writing that box by box would make boxes meet in memory. Here blocks own pixels instead: a block
// keeps the sums of one tile in registers, looks up which boxes reach the tile, and adds them. Each
// element is stored once, zeros included: no atomics, no memset, no read of the result.
//
// Order of additions of an element: boxes ascending, then cell rows ascending, then cell columns
// ascending, one term  Wx * (Wy * pooled_grad)  at a time, skipping terms with a weight of zero.
// Nothing else decides it: not the tile, not the block, not the other boxes. Weights are the merged
// weights of build_row, bit for bit, because samples that miss the tile add nothing to it.

// ------------------------------------------------------------------------------- what boxes reach

/// Inclusive pixel rectangle, conservative: every pixel that a box reads lies inside.
struct alignas(16) Footprint {
  int32_t first_y, last_y, first_x, last_x;
};

/// The merged taps of one cell along one axis, as build_row gives them. Unused ones have pixel -1.
template <class Number>
struct alignas(16) PreparedRow {
  static constexpr int32_t kTaps = 4;  // of two samples
  Tap<Number> tap[kTaps];
};

/// What the first kernel leaves for the second, in Problem::workspace: 24 bytes a box, and the rows
/// of its cells where they are short and few (prepares_rows). A box meets several tiles and several
/// slices of channels, and each of them would build the rows again.
struct Footprints {
  Footprint* area;
  int64_t* map;  // image * levels + level; -1: the box reads nothing, and its area is undefined

  GLIMPSE_HD explicit Footprints(const Problem& problem)
      : area(static_cast<Footprint*>(problem.workspace)),
        map(reinterpret_cast<int64_t*>(area + problem.boxes)) {}

  GLIMPSE_HD static size_t bytes(const Problem& problem) {
    return static_cast<size_t>(problem.boxes) * (sizeof(Footprint) + sizeof(int64_t));
  }

  /// [boxes][rows of y, rows of x], behind the others.
  template <class Number>
  GLIMPSE_HD static PreparedRow<Number>* rows(const Problem& problem) {
    return reinterpret_cast<PreparedRow<Number>*>(static_cast<char*>(problem.workspace) +
                                                  (bytes(problem) + 15) / 16 * 16);
  }
};

/// Whether rows are prepared: from sizes alone.
template <class Number>
bool prepares_rows(const Problem& problem) {
  constexpr int64_t kMostBytes = 1 << 20;  // of the workspace
  const int64_t row_taps = 2 * int64_t{problem.op.fixed_samples()};
  const int64_t box_rows = int64_t{problem.out_height} + problem.out_width;
  const int64_t box_bytes = 24 + box_rows * static_cast<int64_t>(sizeof(PreparedRow<Number>));
  return row_taps > 0 && row_taps <= PreparedRow<Number>::kTaps &&
         problem.boxes <= (kMostBytes - 16) / box_bytes;
}

/// Bytes of the workspace.
template <class Number>
size_t prepared_bytes(const Problem& problem) {
  const size_t footprints = Footprints::bytes(problem);
  if (!prepares_rows<Number>(problem)) return footprints;
  const size_t box_rows = static_cast<size_t>(problem.out_height) + problem.out_width;
  return (footprints + 15) / 16 * 16 +
         static_cast<size_t>(problem.boxes) * box_rows * sizeof(PreparedRow<Number>);
}

/// First and last pixel that an axis can read; false if there is none. Positions are monotone in
/// cell and sample, so the two outermost samples bound all others. If either is NaN then no
/// position of the axis is finite.
template <class T>
GLIMPSE_HD bool axis_reach(const Operator& op, const BoxAxis<T>& line, int32_t* first,
                           int32_t* last) {
  if (line.size <= 0 || line.cells <= 0 || line.axis.samples <= 0) return false;
  const T begin = line.axis.position(0, 0);
  const T end = line.axis.position(line.cells - 1, line.axis.samples - 1);
  const T low = begin < end ? begin : end;
  const T high = begin < end ? end : begin;
  const T reach_low = op.reach_low<T>(0);
  const T reach_high = op.reach_high<T>(line.size - 1, line.size);
  if (!(low <= reach_high && high >= reach_low)) return false;
  const Taps<T> lowest = op.taps(low > reach_low ? low : reach_low, line.size);
  const Taps<T> highest = op.taps(high < reach_high ? high : reach_high, line.size);
  *first = lowest.count > 0 ? lowest.pixel[0] : 0;
  *last = highest.count == 2   ? highest.pixel[1]
          : highest.count == 1 ? highest.pixel[0]
                               : line.size - 1;
  return true;
}

constexpr int32_t kPrepareThreads = 256;

/// One thread: the footprint of one box; or one row of a box, and the footprint if it is the first.
template <class Number, bool kRows>
__global__ void __launch_bounds__(kPrepareThreads, 2)
    prepare_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
  GLIMPSE_SHARED(PreparedRow<Number>, built, [kRows ? kPrepareThreads : 1]);
  const Footprints footprints(problem);
  const int32_t box_rows = kRows ? problem.out_height + problem.out_width : 1;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < problem.boxes * box_rows;
       i += stride) {
    const int64_t k = i / box_rows;
    const auto row = static_cast<int32_t>(i - k * box_rows);
    const Box<Number> box = read_box<Number>(problem, k);
    if constexpr (kRows) {
      if (box.level >= 0) {
        PreparedRow<Number>& own = built[threadIdx.x];
        GLIMPSE_UNROLL
        for (int32_t j = 0; j < PreparedRow<Number>::kTaps; ++j) own.tap[j] = {-1, Number(0)};
        const int32_t direction = row < problem.out_height ? kY : kX;
        const int32_t cell = direction == kY ? row : row - problem.out_height;
        const BoxAxis<Number> line = box_axis(problem, box, direction);
        detail::RowWriter<Number, false> writer{own.tap, nullptr, PreparedRow<Number>::kTaps, 0};
        build_row(problem.op, line.axis, line.weighting, cell, line.size, writer);
        Footprints::rows<Number>(problem)[i] = own;
      }
    }
    if (row > 0) continue;
    int64_t map = -1;
    if (box.level >= 0) {
      Footprint area;
      if (axis_reach(problem.op, box_axis(problem, box, kY), &area.first_y, &area.last_y) &&
          axis_reach(problem.op, box_axis(problem, box, kX), &area.first_x, &area.last_x)) {
        map = box.image * problem.levels + box.level;
        footprints.area[k] = area;
      }
    }
    footprints.map[k] = map;
  }
}

/// Box k on a level that is known already, from its footprint.
template <class Number>
__device__ __forceinline__ Box<Number> box_on_level(const Problem& problem, int64_t k,
                                                    int64_t image, int32_t level) {
  const int64_t edges = k * problem.box_columns + problem.image_column;
  Box<Number> box;
  box.image = image;
  box.level = level;
  box.edges = static_cast<const Number*>(problem.box) + edges;
  box.tangent =
      problem.tangent == nullptr ? nullptr : static_cast<const Number*>(problem.tangent) + edges;
  return box;
}

// ------------------------------------------------------------------------- elements of any dtype

/// Element `i` of an array of `dtype`, which goes with sums of type Number. Kernels whose time does
/// not depend on it are compiled once per kind of sum, and learn the dtype while they run.
template <class Number>
__device__ __forceinline__ Number load_element(Dtype dtype, const void* data, int64_t i) {
  if constexpr (sizeof(Number) == sizeof(double)) {
    return static_cast<const double*>(data)[i];
  } else {
    if (dtype == Dtype::kFloat32) return load_value(static_cast<const float*>(data)[i]);
    if (dtype == Dtype::kFloat16) return load_value(static_cast<const half*>(data)[i]);
    return load_value(static_cast<const bfloat16*>(data)[i]);
  }
}

template <class Number>
__device__ __forceinline__ void store_element(Dtype dtype, void* data, int64_t i, Number value) {
  if constexpr (sizeof(Number) == sizeof(double)) {
    static_cast<double*>(data)[i] = value;
  } else {
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(data)[i] = value;
    } else if (dtype == Dtype::kFloat16) {
      static_cast<half*>(data)[i] = Store<half>::from(value);
    } else {
      static_cast<bfloat16*>(data)[i] = Store<bfloat16>::from(value);
    }
  }
}

// --------------------------------------------------------------------------------- tiles of a map

constexpr int32_t kGatherWarps = 8;
constexpr int32_t kGatherThreads = 32 * kGatherWarps;
constexpr int32_t kQuad = 4;         // pixels whose weights are read at once
constexpr int32_t kFewestLanes = 8;  // that build one direction of one box
constexpr int32_t kMostSlots = kGatherThreads / 2 / kFewestLanes;

/// What a block owns: kWarpRows rows of kColumns pixels in each warp, kVector channels in each
/// lane. kBlocks blocks shall share a multiprocessor, which bounds the registers.
template <class NumberT, int32_t kWarpRowsV, int32_t kColumnsV, int32_t kVectorV, int32_t kBlocksV>
struct Tile {
  using Number = NumberT;
  static constexpr int32_t kWarpRows = kWarpRowsV;
  static constexpr int32_t kRows = kGatherWarps * kWarpRows;
  static constexpr int32_t kColumns = kColumnsV;
  static constexpr int32_t kQuads = kColumns / kQuad;
  static constexpr int32_t kVector = kVectorV;
  static constexpr int32_t kChannels = 32 * kVector;
  static constexpr int32_t kBlocks = kBlocksV;
};

/// How the tiles of all levels and images share one grid, and how much of a box a block holds.
/// Made at launch, from sizes alone.
struct GatherPlan {
  int64_t first_block;             // of this launch
  int64_t first_tile[kMaxLevels];  // of each level
  int32_t tiles_y[kMaxLevels], tiles_x[kMaxLevels];
  int32_t slices;       // of channels
  int32_t group_shift;  // 1 << group_shift lanes build one direction of one box
  int32_t slots;        // boxes whose weights are held at once, a multiple of the groups of a warp
  // Cells of each box that are held at once. All of them, unless there are so many that boxes are
  // taken one by one.
  int32_t cells_y, cells_x;
  int32_t x_offset, weight_bytes;  // of TileWeights
  bool prepared;                   // the rows of boxes are in the workspace
};

/// Which tile this block owns. Kept in shared memory: held in registers all the time it would cost
/// those that the sums need.
struct TilePlace {
  int64_t image;
  int32_t level;
  int32_t slice;  // of channels
  int32_t y, x;   // of the first pixel
};

/// The first channel of this thread.
template <class Tile>
__device__ __forceinline__ int64_t channel_of_thread(const TilePlace& place) {
  return (int64_t{place.slice} * 32 + (threadIdx.x & 31)) * Tile::kVector;
}

/// By one thread.
template <class Tile>
__device__ __forceinline__ TilePlace place_of_block(const Problem& problem,
                                                    const GatherPlan& plan) {
  TilePlace place;
  int32_t tile_y, tile_x;
  int64_t tile = split(plan.first_block + blockIdx.x, plan.slices, &place.slice);
  place.level = 0;
  for (int32_t i = 1; i < problem.levels; ++i) {
    if (tile >= plan.first_tile[i]) place.level = i;
  }
  tile = split(tile - plan.first_tile[place.level], plan.tiles_x[place.level], &tile_x);
  place.image = split(tile, plan.tiles_y[place.level], &tile_y);
  place.y = tile_y * Tile::kRows;
  place.x = tile_x * Tile::kColumns;
  return place;
}

// ------------------------------------------------------------------------------- boxes of a tile

constexpr int32_t kScan = 4;  // boxes that a thread looks at before the block makes a list
constexpr int32_t kChunk = kScan * kGatherThreads;
constexpr int64_t kMostGatherBoxes = 2147483647 - kChunk;  // numbers of boxes are 32-bit here

/// Boxes of a chunk that reach the tile, ascending; in shared memory.
struct BoxList {
  uint64_t warp_hits[kGatherWarps];  // 16 bits for each of kScan steps
  int32_t size;
  int32_t next;  // the first box that has not been looked at
  int32_t box[kChunk];
};

/// Lists those of the next kChunk boxes that reach the tile. All threads of the block call it;
/// barriers inside.
template <class Tile>
__device__ __forceinline__ void list_boxes(const Problem& problem, const TilePlace& place,
                                           BoxList* list) {
  const Footprints footprints(problem);
  const int64_t own_map = place.image * problem.levels + place.level;
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int32_t thread = threadIdx.x;
  const int32_t chunk = list->next;
  bool hit[kScan];
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kScan; ++i) {
    const int32_t k = chunk + i * kGatherThreads + thread;
    hit[i] = k < problem.boxes && load_readonly(footprints.map + k) == own_map;
  }
  uint32_t hits[kScan];
  uint64_t own = 0;
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kScan; ++i) {
    if (hit[i]) {
      const int32_t k = chunk + i * kGatherThreads + thread;
      const int4 area = load_readonly(reinterpret_cast<const int4*>(footprints.area + k));
      // Differences, because the end of a tile may lie beyond the largest int32.
      hit[i] = area.y >= place.y && area.x - place.y < Tile::kRows && area.w >= place.x &&
               area.z - place.x < Tile::kColumns;
    }
    hits[i] = __ballot_sync(kFullWarp, hit[i]);
    own |= static_cast<uint64_t>(__popc(hits[i])) << (16 * i);
  }
  if (lane == 0) list->warp_hits[warp] = own;
  __syncthreads();
  uint64_t before = 0, all = 0;  // hits of lower warps and of all warps, by step
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kGatherWarps; ++i) {
    if (i == warp) before = all;
    all += list->warp_hits[i];
  }
  int32_t size = 0;
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kScan; ++i) {
    if (hit[i]) {
      const int32_t lower_lanes = __popc(hits[i] & ((1u << lane) - 1));
      const auto lower_warps = static_cast<int32_t>(before >> (16 * i) & 0xffff);
      list->box[size + lower_warps + lower_lanes] = chunk + i * kGatherThreads + thread;
    }
    size += static_cast<int32_t>(all >> (16 * i) & 0xffff);
  }
  if (threadIdx.x == 0) {
    list->size = size;
    list->next = chunk + kChunk;
  }
  __syncthreads();
}

// ---------------------------------------------------------------------------- weights of a tile

/// Weights of four neighbouring pixels.
template <class Number>
struct alignas(16) Quad {
  Number weight[kQuad];
};

/// Weights of a batch of boxes at the rows and columns of a tile, in shared memory. Only the cells
/// of a strip (the rows of a warp, a quad of columns) need to be visited for it. These cells are
/// neighbours, because positions are monotone; that is why two numbers describe them.
template <class Tile>
struct TileWeights {
  using Number = typename Tile::Number;
  using NumberQuad = Quad<Number>;
  static constexpr int32_t kRowQuads = Tile::kRows / kQuad;
  /// Of a cell. The same in both directions, so that building them is the same code.
  static constexpr int32_t kCellQuads = kRowQuads > Tile::kQuads ? kRowQuads : Tile::kQuads;
  static constexpr int32_t kRanges = kGatherWarps + 1 + Tile::kQuads + 1;
  static constexpr int32_t kRangeBytes = kMostSlots * kRanges * sizeof(Cells);

  Cells* range;   // [slots][kRanges]: each strip of y, all rows, each quad of x, all columns
  NumberQuad* y;  // [slots][cells_y][kCellQuads]
  NumberQuad* x;  // [slots][cells_x][kCellQuads]

  __device__ __forceinline__ TileWeights(const GatherPlan& plan, char* shared) {
    range = reinterpret_cast<Cells*>(shared);
    y = reinterpret_cast<NumberQuad*>(shared + kRangeBytes);
    x = reinterpret_cast<NumberQuad*>(shared + plan.x_offset);
  }
  /// Sets the sizes of a plan whose slots and cells are known.
  static void lay_out(GatherPlan* plan) {
    constexpr auto kCellBytes = static_cast<int32_t>(kCellQuads * sizeof(NumberQuad));
    plan->x_offset = kRangeBytes + plan->slots * plan->cells_y * kCellBytes;
    plan->weight_bytes = plan->x_offset + plan->slots * plan->cells_x * kCellBytes;
  }

  __device__ __forceinline__ Cells rows_of_warp(int32_t slot, int32_t warp) const {
    return range[slot * kRanges + warp];
  }
  __device__ __forceinline__ Cells rows_of_tile(int32_t slot) const {
    return range[slot * kRanges + kGatherWarps];
  }
  __device__ __forceinline__ Cells columns_of_quad(int32_t slot, int32_t quad) const {
    return range[slot * kRanges + kGatherWarps + 1 + quad];
  }
  __device__ __forceinline__ Cells columns_of_tile(int32_t slot) const {
    return range[slot * kRanges + kGatherWarps + 1 + Tile::kQuads];
  }
};

/// Extends `cells` by the set bits of `mask`, of which there are some; bit 0 is the cell `base`.
__device__ __forceinline__ void extend(Cells* cells, uint32_t mask, int32_t base) {
  const int32_t lowest = __ffs(static_cast<int32_t>(mask)) - 1;
  for (int32_t distance = 1; distance < 32; distance *= 2) mask |= mask >> distance;
  const int32_t highest = __popc(mask) - 1;
  if (cells->first >= cells->end) cells->first = base + lowest;
  cells->end = base + highest + 1;
}

/// The cells of boxes that are visited, `step` of them held at a time; in shared memory.
struct Visit {
  Cells rows, columns;
  int32_t step_y, step_x;
};

/// Some of the boxes that reach the tile, with the weights of some of their cells in shared memory.
/// Holds no more than what for_each_batch counts: everything else is read when it is needed.
struct Batch {
  const BoxList& list;
  const Visit& visit;
  int32_t begin;  // in the list
  int32_t slots;  // at most
  int32_t y, x;   // the first cell whose weights are held

  __device__ __forceinline__ int32_t count() const { return lesser(list.size - begin, slots); }
  __device__ __forceinline__ int64_t box(int32_t slot) const { return list.box[begin + slot]; }
  __device__ __forceinline__ int32_t rows() const {
    return lesser(visit.rows.end - y, visit.step_y);
  }
  __device__ __forceinline__ int32_t columns() const {
    return lesser(visit.columns.end - x, visit.step_x);
  }

 private:
  __device__ __forceinline__ static int32_t lesser(int32_t a, int32_t b) { return a < b ? a : b; }
};

/// What a group of lanes works on: one direction of one box, as the tile sees it. In shared memory,
/// because the sums need the registers.
template <class Number>
struct TileLine {
  BoxAxis<Number> line;
  Number factor;          // of all weights
  int32_t pixel, pixels;  // the first one that the tile owns, and how many it owns
  int32_t cell, cells;    // the first one that is held, and how many are held
  int32_t table, ranges;  // indices in TileWeights
  int32_t strips;         // of pixels
  int32_t strip_pixels;   // of each strip
};

/// A prepared row, by loads of 16 bytes.
template <class Number>
__device__ __forceinline__ PreparedRow<Number> load_row(const PreparedRow<Number>* row) {
  constexpr int32_t kWords = sizeof(PreparedRow<Number>) / sizeof(uint4);
  uint4 word[kWords];
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kWords; ++i) {
    word[i] = load_readonly(reinterpret_cast<const uint4*>(row) + i);
  }
  PreparedRow<Number> loaded;
  memcpy(&loaded, word, sizeof(loaded));
  return loaded;
}

/// Builds the weights of a batch. A group of lanes takes one direction of one box, a lane one cell:
/// it adds the taps of its cell to its own row of weights, the prepared ones or those of the
/// samples that can touch the tile.
template <class Tile>
__device__ __forceinline__ void build_weights(const Problem& problem, const GatherPlan& plan,
                                              const TilePlace& place, const Batch& batch,
                                              const TileWeights<Tile>& weights) {
  using Number = typename Tile::Number;
  constexpr int32_t kQuads = TileWeights<Tile>::kCellQuads;
  GLIMPSE_SHARED(TileLine<Number>, lines, [2 * kMostSlots]);
  const int32_t lane = threadIdx.x & 31;
  const int32_t group = 1 << plan.group_shift;
  const int32_t member = lane & (group - 1);
  // Groups of y come first, those of x follow; there are at least as many groups as directions of
  // boxes. A warp has one direction only, so everything but the samples is uniform in it.
  const int32_t task = static_cast<int32_t>(threadIdx.x) >> plan.group_shift;
  const int32_t warp_task = (static_cast<int32_t>(threadIdx.x) - lane) >> plan.group_shift;
  if (warp_task >= 2 * plan.slots) return;
  TileLine<Number>& own = lines[task];
  const int32_t slot = task < plan.slots ? task : task - plan.slots;
  const bool active = slot < batch.count();
  if (member == 0) {
    const int32_t direction = task < plan.slots ? kY : kX;
    if (active) {
      own.factor = 1;  // prepared rows have it
      if (!plan.prepared) {
        const Box<Number> box =
            box_on_level<Number>(problem, batch.box(slot), place.image, place.level);
        own.line = box_axis(problem, box, direction);
        own.factor = sample_factor(own.line.axis);
      }
      const Level& level = problem.level[place.level];
      own.pixel = direction == kY ? place.y : place.x;
      const int32_t pixels = (direction == kY ? level.height : level.width) - own.pixel;
      const int32_t owned = direction == kY ? Tile::kRows : Tile::kColumns;
      own.pixels = pixels < owned ? pixels : owned;
    }
    own.cell = direction == kY ? batch.y : batch.x;
    own.cells = direction == kY ? batch.rows() : batch.columns();
    own.table = slot * (direction == kY ? plan.cells_y : plan.cells_x) * kQuads;
    own.ranges = slot * TileWeights<Tile>::kRanges + (direction == kY ? 0 : kGatherWarps + 1);
    own.strips = direction == kY ? kGatherWarps : Tile::kQuads;
    own.strip_pixels = direction == kY ? Tile::kWarpRows : kQuad;
  }
  __syncwarp();
  // Lane i of a group keeps the range of strip i, and lane 0 that of the tile.
  if (active && member < own.strips) weights.range[own.ranges + member] = {0, 0};
  if (active && member == 0) weights.range[own.ranges + own.strips] = {0, 0};
  for (int32_t base = 0; base < own.cells; base += group) {
    const int32_t cell = base + member;
    uint32_t touched = 0;  // bit i: the cell reads pixel i of the tile
    if (active && cell < own.cells) {
      Quad<Number>* quad = (task < plan.slots ? weights.y : weights.x) + own.table + cell * kQuads;
      auto* weight_of = reinterpret_cast<Number*>(quad);
      GLIMPSE_UNROLL
      for (int32_t i = 0; i < kQuads; ++i) quad[i] = Quad<Number>{};
      const auto add = [&](int32_t pixel, Number weight) {
        const int32_t i = pixel - own.pixel;
        if (static_cast<uint32_t>(i) < static_cast<uint32_t>(own.pixels)) weight_of[i] += weight;
      };
      if (plan.prepared) {
        const int32_t row = own.cell + cell + (task < plan.slots ? 0 : problem.out_height);
        const int64_t first = batch.box(slot) * (problem.out_height + problem.out_width);
        const PreparedRow<Number> prepared =
            load_row(Footprints::rows<Number>(problem) + first + row);
        GLIMPSE_UNROLL
        for (int32_t i = 0; i < PreparedRow<Number>::kTaps; ++i) {
          add(prepared.tap[i].pixel, prepared.tap[i].weight);
        }
      } else {
        for_each_tap(problem.op, own.line.axis, own.cell + cell, own.pixel,
                     own.pixel + own.pixels - 1, own.line.size,
                     [&](int32_t pixel, Number weight, Number slope, Number progress) {
                       add(pixel, own.line.weighting(weight, slope, progress));
                     });
      }
      GLIMPSE_UNROLL
      for (int32_t i = 0; i < kQuads; ++i) {
        Quad<Number> scaled = quad[i];
        GLIMPSE_UNROLL
        for (int32_t j = 0; j < kQuad; ++j) {
          scaled.weight[j] *= own.factor;
          touched |= static_cast<uint32_t>(scaled.weight[j] != 0) << (i * kQuad + j);
        }
        quad[i] = scaled;
      }
    }
    const int32_t group_base = lane - member;
    const uint32_t group_mask = kFullWarp >> (32 - group);
    const uint32_t tile_cells = __ballot_sync(kFullWarp, touched != 0) >> group_base & group_mask;
    const int32_t strip_pixels = own.strip_pixels;
    uint32_t strip_cells = 0;
    GLIMPSE_UNROLL
    for (int32_t strip = 0; strip < kGatherWarps; ++strip) {
      const uint32_t pixels = touched >> (strip * strip_pixels) & ((1u << strip_pixels) - 1);
      const uint32_t reading = __ballot_sync(kFullWarp, pixels != 0);
      if (member == strip) strip_cells = reading >> group_base & group_mask;
    }
    Cells* ranges = weights.range + own.ranges;
    if (strip_cells != 0) extend(&ranges[member], strip_cells, own.cell + base);
    if (member == 0 && tile_cells != 0) extend(&ranges[own.strips], tile_cells, own.cell + base);
  }
}

// ---------------------------------------------------------------------------------- the sums

/// The sums of a lane. Indexed by constants only, so that they stay in registers.
template <class Tile>
struct TileSums {
  using Number = typename Tile::Number;
  Number value[Tile::kWarpRows][Tile::kColumns][Tile::kVector];

  __device__ __forceinline__ void clear() {
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < Tile::kWarpRows; ++i) {
      GLIMPSE_UNROLL
      for (int32_t j = 0; j < Tile::kColumns; ++j) {
        GLIMPSE_UNROLL
        for (int32_t v = 0; v < Tile::kVector; ++v) value[i][j][v] = 0;
      }
    }
  }

  /// Adds one cell: its pooled gradient times its weights. `quad` are its weights along x, `reads`
  /// the cells of each quad. Pixels that the cell does not read stay as they are even where the
  /// gradient is infinite or NaN.
  __device__ __forceinline__ void add(const Number (&grad)[Tile::kVector],
                                      const Number (&weight_y)[Tile::kWarpRows],
                                      const Quad<Number>* quad, int32_t cell,
                                      const Cells (&reads)[Tile::kQuads]) {
    Number product[Tile::kWarpRows][Tile::kVector];
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < Tile::kWarpRows; ++i) {
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) {
        product[i][v] = weight_y[i] * grad[v];
        // A warp of one row skips the cells that its row does not read.
        if (Tile::kWarpRows > 1 && weight_y[i] == 0) product[i][v] = 0;
      }
    }
    GLIMPSE_UNROLL
    for (int32_t q = 0; q < Tile::kQuads; ++q) {
      if (Tile::kQuads == 1 || (cell >= reads[q].first && cell < reads[q].end)) {
        const Quad<Number> weights = quad[q];
        GLIMPSE_UNROLL
        for (int32_t j = 0; j < kQuad; ++j) {
          if (weights.weight[j] != 0) {
            GLIMPSE_UNROLL
            for (int32_t i = 0; i < Tile::kWarpRows; ++i) {
              GLIMPSE_UNROLL
              for (int32_t v = 0; v < Tile::kVector; ++v) {
                value[i][q * kQuad + j][v] += weights.weight[j] * product[i][v];
              }
            }
          }
        }
      }
    }
  }
};

/// Shared memory of a gather kernel beside its weights and its stage.
template <class Number>
constexpr size_t fixed_shared_bytes() {
  return sizeof(TilePlace) + sizeof(BoxList) + sizeof(Visit) +
         2 * kMostSlots * sizeof(TileLine<Number>) + 64;  // 64: for alignment
}

/// The cells of a box that can touch the pixels first_pixel .. last_pixel, and maybe some more.
template <class Number>
__device__ __forceinline__ Cells cells_reaching(const Operator& op, const BoxAxis<Number>& line,
                                                int32_t first_pixel, int32_t last_pixel) {
  return glimpse::cells_reaching(op, line.axis, {0, line.cells}, first_pixel, last_pixel,
                                 line.size);
}

/// The visit of box k where not all of its cells are held: those that reach the tile, some rows at
/// a time, or, if not even the cells of one row are held, parts of one row at a time.
template <class Tile>
__device__ __forceinline__ Visit visit_of_box(const Problem& problem, const GatherPlan& plan,
                                              const TilePlace& place, int64_t k) {
  using Number = typename Tile::Number;
  const Box<Number> box = box_on_level<Number>(problem, k, place.image, place.level);
  const auto cells_in = [&](int32_t direction, int32_t first, int32_t pixels) {
    const BoxAxis<Number> line = box_axis(problem, box, direction);
    const int32_t last = line.size - first < pixels ? line.size - 1 : first + pixels - 1;
    return cells_reaching(problem.op, line, first, last);
  };
  Visit visit;
  visit.rows = cells_in(kY, place.y, Tile::kRows);
  visit.columns = cells_in(kX, place.x, Tile::kColumns);
  visit.step_x = plan.cells_x;
  visit.step_y = visit.columns.end - visit.columns.first <= plan.cells_x ? plan.cells_y : 1;
  return visit;
}

/// Calls add(batch) until every box that reaches the tile has been added, in order.
template <class Tile, class Add>
__device__ __forceinline__ void for_each_batch(const Problem& problem, const GatherPlan& plan,
                                               const TilePlace& place,
                                               const TileWeights<Tile>& weights, const Add& add) {
  GLIMPSE_SHARED(BoxList, list, );
  GLIMPSE_SHARED(Visit, visit, );
  const bool whole = plan.cells_y == problem.out_height && plan.cells_x == problem.out_width;
  if (threadIdx.x == 0) {
    list.next = 0;
    visit = {{0, problem.out_height}, {0, problem.out_width}, plan.cells_y, plan.cells_x};
  }
  __syncthreads();  // also for what the caller has set up
  while (list.next < problem.boxes) {
    list_boxes<Tile>(problem, place, &list);
    for (int32_t begin = 0; begin < list.size; begin += plan.slots) {
      if (!whole) {
        __syncthreads();  // before the loops below forget the last visit
        if (threadIdx.x == 0) {
          visit = visit_of_box<Tile>(problem, plan, place, list.box[begin]);
        }
        __syncthreads();
      }
      for (int32_t y = visit.rows.first; y < visit.rows.end; y += visit.step_y) {
        for (int32_t x = visit.columns.first; x < visit.columns.end; x += visit.step_x) {
          const Batch batch = {list, visit, begin, plan.slots, y, x};
          build_weights(problem, plan, place, batch, weights);
          __syncthreads();
          add(batch);
          __syncthreads();  // before the next weights take the place of these
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------ channels innermost

/// Adds a batch to the row of pixels of this warp. Of every cell that the row reads, a lane loads
/// the pooled gradient of its channels in one piece, one cell ahead of the sums.
template <class T, class Tile>
__device__ __forceinline__ void add_batch_nhwc(const Problem& problem, const GatherPlan& plan,
                                               const TilePlace& place,
                                               const TileWeights<Tile>& weights, const Batch& batch,
                                               TileSums<Tile>& sums) {
  using Number = typename Tile::Number;
  using GradPack = Pack<T, Tile::kVector>;
  constexpr int32_t kCellQuads = TileWeights<Tile>::kCellQuads;
  const int32_t warp = threadIdx.x >> 5;
  const int64_t channel = channel_of_thread<Tile>(place);
  const bool active = channel < problem.channels;
  for (int32_t slot = 0; slot < batch.count(); ++slot) {
    const Cells rows = weights.rows_of_warp(slot, warp);
    const Cells columns = weights.columns_of_tile(slot);
    if (rows.first >= rows.end || columns.first >= columns.end) continue;
    Cells reads[Tile::kQuads];
    GLIMPSE_UNROLL
    for (int32_t q = 0; q < Tile::kQuads; ++q) reads[q] = weights.columns_of_quad(slot, q);

    const int64_t cell =
        (batch.box(slot) * problem.out_height + rows.first) * problem.out_width + columns.first;
    const T* grad_row = static_cast<const T*>(problem.pooled) + cell * problem.channels + channel;
    const Quad<Number>* weight_y =
        weights.y + (slot * plan.cells_y + rows.first - batch.y) * kCellQuads;
    for (int32_t cell_y = rows.first; cell_y < rows.end; ++cell_y) {
      const Number row_weight[1] = {reinterpret_cast<const Number*>(weight_y)[warp]};
      weight_y += kCellQuads;
      const T* grad = grad_row;
      grad_row += problem.channels * problem.out_width;
      if (row_weight[0] == 0) continue;
      const Quad<Number>* weight_x =
          weights.x + (slot * plan.cells_x + columns.first - batch.x) * kCellQuads;
      GradPack next = active ? GradPack::load(grad) : GradPack::zero();
      for (int32_t cell_x = columns.first; cell_x < columns.end; ++cell_x) {
        const GradPack current = next;
        grad += problem.channels;
        if (active && cell_x + 1 < columns.end) next = GradPack::load(grad);
        Number value[Tile::kVector];
        current.unpack(value);
        sums.add(value, row_weight, weight_x, cell_x, reads);
        weight_x += kCellQuads;
      }
    }
  }
}

/// Block: a tile by 32 * kVector channels. Warp: one row of pixels. Lane: kVector channels of
/// kColumns pixels, summed in registers.
template <class T, class Tile>
__global__ void __launch_bounds__(kGatherThreads, Tile::kBlocks)
    gather_nhwc_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                       GLIMPSE_GRID_CONSTANT GatherPlan plan) {
  static_assert(Tile::kWarpRows == 1, "the loop over cell rows is that of one row of pixels");
  GLIMPSE_DYNAMIC_SHARED(shared);
  GLIMPSE_SHARED(TilePlace, place, );
  if (threadIdx.x == 0) place = place_of_block<Tile>(problem, plan);
  const TileWeights<Tile> weights(plan, shared);
  TileSums<Tile> sums;
  sums.clear();
  for_each_batch(problem, plan, place, weights, [&](const Batch& batch) {
    add_batch_nhwc<T>(problem, plan, place, weights, batch, sums);
  });

  const Level& level = problem.level[place.level];
  const int64_t channel = channel_of_thread<Tile>(place);
  const int32_t y = place.y + static_cast<int32_t>(threadIdx.x >> 5);
  if (channel >= problem.channels || y >= level.height) return;
  T* row = static_cast<T*>(level.data) + place.image * level.stride_n + y * level.stride_h +
           channel * level.stride_c;
  GLIMPSE_UNROLL
  for (int32_t j = 0; j < Tile::kColumns; ++j) {
    const int32_t x = place.x + j;
    if (x < level.width) {
      Pack<T, Tile::kVector>::from(sums.value[0][j]).store(row + x * level.stride_w);
    }
  }
}

// --------------------------------------------------------------------------------- rows innermost

/// Shared memory of gather_nchw_kernel: a run of cells of 32 channels. The distance of channels is
/// odd, so that 32 lanes reading one cell of 32 channels use 32 banks.
template <class Tile>
struct Stage {
  using Number = typename Tile::Number;
  static constexpr int32_t kCells = sizeof(Number) == 8 ? 96 : 196;  // 196 = 14 * 14
  static constexpr int32_t kStride = kCells + 1;
  static constexpr size_t kBytes = (32 * kStride * sizeof(Number) + 15) / 16 * 16;

  // At the end, what follows from `shared` turns the sums of a warp from lane = channel to
  // lane = pixel.
  static constexpr int32_t kPixels = Tile::kWarpRows * Tile::kColumns;
  static constexpr int32_t kPixelStride = kPixels + 1;
  static constexpr size_t kTurnBytes = kGatherWarps * 32 * kPixelStride * sizeof(Number);
};

/// Where a run starts. Cells are staged in their order in memory, y * out_width + x, and a run may
/// hold the end of one box and the begin of the next.
struct RunStart {
  int32_t slot;
  int32_t cell;  // cells before it are done
};

/// A part of a run: neighbouring cells of one box.
struct Piece {
  int32_t slot;
  int32_t first, cells;
  int32_t position;  // of the first cell in the run
};

/// Calls visit(piece) for the run at `start` and returns where the next one starts. Uniform over
/// the block.
template <class Tile, class Visit>
__device__ __forceinline__ RunStart for_each_piece(const TileWeights<Tile>& weights,
                                                   int32_t out_width, int32_t count, RunStart start,
                                                   const Visit& visit) {
  int32_t used = 0;
  while (start.slot < count && used < Stage<Tile>::kCells) {
    const Cells rows = weights.rows_of_tile(start.slot);
    const Cells columns = weights.columns_of_tile(start.slot);
    const bool any = rows.first < rows.end && columns.first < columns.end;
    const int32_t first = any ? rows.first * out_width + columns.first : 0;
    const int32_t end = any ? (rows.end - 1) * out_width + columns.end : 0;
    const int32_t begin = start.cell > first ? start.cell : first;
    const int32_t room = Stage<Tile>::kCells - used;
    const int32_t cells = end - begin < room ? end - begin : room;
    if (cells > 0) visit(Piece{start.slot, begin, cells, used});
    used += cells;
    start.cell = begin + cells;
    if (start.cell >= end) start = {start.slot + 1, 0};
  }
  return start;
}

/// Starts to copy the cells of a piece, of channels first_channel .. first_channel + 31. One warp:
/// every eighth channel; lanes are cells. Complete after copy_async_wait_all and a barrier.
template <class T, class Tile>
__device__ __forceinline__ void stage_piece(const Problem& problem, int64_t box,
                                            int64_t first_channel, const Piece& piece,
                                            typename Tile::Number* stage) {
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  for (int32_t i = warp; i < 32; i += kGatherWarps) {
    const int64_t channel = first_channel + i;
    if (channel >= problem.channels) break;
    const T* source = static_cast<const T*>(problem.pooled) +
                      (box * problem.channels + channel) * plane + piece.first;
    typename Tile::Number* target = stage + i * Stage<Tile>::kStride + piece.position;
    for (int32_t cell = lane; cell < piece.cells; cell += 32) {
      if constexpr (sizeof(T) == 4) {
        copy_async4(target + cell, source + cell);
      } else {
        target[cell] = load_value(source[cell]);
      }
    }
  }
}

/// Adds a piece to the rows of pixels of this warp.
template <class Tile>
__device__ __forceinline__ void add_piece(const Problem& problem, const GatherPlan& plan,
                                          const TileWeights<Tile>& weights, const Batch& batch,
                                          const Piece& piece, const typename Tile::Number* stage,
                                          TileSums<Tile>& sums) {
  using Number = typename Tile::Number;
  constexpr int32_t kCellQuads = TileWeights<Tile>::kCellQuads;
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Cells rows = weights.rows_of_warp(piece.slot, warp);
  const Cells columns = weights.columns_of_tile(piece.slot);
  Cells reads[Tile::kQuads];
  GLIMPSE_UNROLL
  for (int32_t q = 0; q < Tile::kQuads; ++q) reads[q] = weights.columns_of_quad(piece.slot, q);
  const Number* channel = stage + lane * Stage<Tile>::kStride + piece.position;
  for (int32_t cell_y = rows.first; cell_y < rows.end; ++cell_y) {
    // Columns of this row of cells that are in the piece.
    const int32_t piece_x = piece.first - cell_y * problem.out_width;
    const int32_t begin = columns.first > piece_x ? columns.first : piece_x;
    const int32_t end = columns.end < piece_x + piece.cells ? columns.end : piece_x + piece.cells;
    if (begin >= end) continue;
    const auto* weight_y = reinterpret_cast<const Number*>(
        weights.y + (piece.slot * plan.cells_y + cell_y - batch.y) * kCellQuads);
    Number row_weight[Tile::kWarpRows];
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < Tile::kWarpRows; ++i) {
      row_weight[i] = weight_y[warp * Tile::kWarpRows + i];
    }
    const Quad<Number>* weight_x =
        weights.x + (piece.slot * plan.cells_x + begin - batch.x) * kCellQuads;
    for (int32_t cell_x = begin; cell_x < end; ++cell_x) {
      const Number value[1] = {channel[cell_x - piece_x]};
      sums.add(value, row_weight, weight_x, cell_x, reads);
      weight_x += kCellQuads;
    }
  }
}

/// Block: a tile by 32 channels. Warp: kWarpRows rows of pixels. Lane: one channel of kWarpRows *
/// kColumns pixels, summed in registers, so that all weights are the same for the whole warp.
/// Pooled gradients pass through shared memory, from lanes that are cells to lanes that are
/// channels; results go back the same way, so that neighbouring lanes store neighbouring pixels.
template <class Tile>
__global__ void __launch_bounds__(kGatherThreads, Tile::kBlocks)
    gather_nchw_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                       GLIMPSE_GRID_CONSTANT GatherPlan plan) {
  using Number = typename Tile::Number;
  static_assert(Tile::kVector == 1, "a lane is a channel");
  GLIMPSE_DYNAMIC_SHARED(shared);
  GLIMPSE_SHARED(TilePlace, place, );
  if (threadIdx.x == 0) place = place_of_block<Tile>(problem, plan);
  auto* stage = reinterpret_cast<Number*>(shared);
  const TileWeights<Tile> weights(plan, shared + Stage<Tile>::kBytes);
  TileSums<Tile> sums;
  sums.clear();
  for_each_batch(problem, plan, place, weights, [&](const Batch& batch) {
    RunStart start = {0, 0};
    while (start.slot < batch.count()) {
      for_each_piece(weights, problem.out_width, batch.count(), start, [&](const Piece& piece) {
        const int64_t first_channel = int64_t{place.slice} * 32;
        const int64_t box = batch.box(piece.slot);
        if constexpr (sizeof(Number) == sizeof(double)) {
          stage_piece<double, Tile>(problem, box, first_channel, piece, stage);
        } else if (problem.dtype == Dtype::kFloat32) {
          stage_piece<float, Tile>(problem, box, first_channel, piece, stage);
        } else if (problem.dtype == Dtype::kFloat16) {
          stage_piece<half, Tile>(problem, box, first_channel, piece, stage);
        } else {
          stage_piece<bfloat16, Tile>(problem, box, first_channel, piece, stage);
        }
      });
      copy_async_wait_all();
      __syncthreads();
      start =
          for_each_piece(weights, problem.out_width, batch.count(), start, [&](const Piece& piece) {
            add_piece(problem, plan, weights, batch, piece, stage, sums);
          });
      __syncthreads();  // before the next run takes the place of this one
    }
  });

  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Number* turn = stage + warp * 32 * Stage<Tile>::kPixelStride;
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < Tile::kWarpRows; ++i) {
    GLIMPSE_UNROLL
    for (int32_t j = 0; j < Tile::kColumns; ++j) {
      turn[lane * Stage<Tile>::kPixelStride + i * Tile::kColumns + j] = sums.value[i][j][0];
    }
  }
  __syncwarp();
  const Level& level = problem.level[place.level];
  for (int32_t i = lane; i < 32 * Stage<Tile>::kPixels; i += 32) {
    const int32_t own_channel = i / Stage<Tile>::kPixels, pixel = i % Stage<Tile>::kPixels;
    const int64_t channel = int64_t{place.slice} * 32 + own_channel;
    const int32_t y = place.y + warp * Tile::kWarpRows + pixel / Tile::kColumns;
    const int32_t x = place.x + pixel % Tile::kColumns;
    if (channel < problem.channels && y < level.height && x < level.width) {
      store_element(problem.dtype, level.data,
                    place.image * level.stride_n + channel * level.stride_c + y * level.stride_h +
                        x * level.stride_w,
                    turn[own_channel * Stage<Tile>::kPixelStride + pixel]);
    }
  }
}

// ------------------------------------------------------------------------------------ simple

/// The merged weight of one pixel in a cell.
template <class Number>
__device__ __forceinline__ Number pixel_weight(const Operator& op, const BoxAxis<Number>& line,
                                               int32_t cell, int32_t pixel) {
  Number sum = 0;
  for_each_tap(op, line.axis, cell, pixel, pixel, line.size,
               [&](int32_t touched, Number weight, Number slope, Number progress) {
                 if (touched == pixel) sum += line.weighting(weight, slope, progress);
               });
  return sum * sample_factor(line.axis);
}

/// Thread: one element of a gradient at a time; nothing is shared. The formula as it stands, and
/// what the kernels above are compared with: they add the same numbers in the same order.
template <class Number>
__global__ void __launch_bounds__(256, sizeof(Number) == 8 ? 1 : 2)
    gather_simple_kernel(GLIMPSE_GRID_CONSTANT Problem problem) {
  const Footprints footprints(problem);
  const bool nhwc = problem.layout == Layout::kNhwc;
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  const int64_t cell_stride = nhwc ? problem.channels : 1;
  const int64_t channel_stride = nhwc ? 1 : plane;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    const int64_t pixels = int64_t{level.height} * level.width;
    const int64_t elements = problem.batch * problem.channels * pixels;
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < elements; i += stride) {
      const int64_t image = i / (problem.channels * pixels);
      const int64_t rest = i % (problem.channels * pixels);
      const int64_t channel = nhwc ? rest % problem.channels : rest / pixels;
      const int64_t pixel = nhwc ? rest / problem.channels : rest % pixels;
      const int32_t y = static_cast<int32_t>(pixel / level.width);
      const int32_t x = static_cast<int32_t>(pixel % level.width);
      Number sum = 0;
      for (int64_t k = 0; k < problem.boxes; ++k) {
        if (footprints.map[k] != image * problem.levels + l) continue;
        const Footprint area = footprints.area[k];
        if (y < area.first_y || y > area.last_y || x < area.first_x || x > area.last_x) continue;
        const Box<Number> box = box_on_level<Number>(problem, k, image, l);
        const BoxAxis<Number> along_y = box_axis(problem, box, kY);
        const BoxAxis<Number> along_x = box_axis(problem, box, kX);
        const Cells rows = cells_reaching(problem.op, along_y, y, y);
        const Cells columns = cells_reaching(problem.op, along_x, x, x);
        for (int32_t cell_y = rows.first; cell_y < rows.end; ++cell_y) {
          const Number weight_y = pixel_weight(problem.op, along_y, cell_y, y);
          if (weight_y == 0) continue;
          for (int32_t cell_x = columns.first; cell_x < columns.end; ++cell_x) {
            const Number weight_x = pixel_weight(problem.op, along_x, cell_x, x);
            if (weight_x == 0) continue;
            const int64_t cell = int64_t{cell_y} * problem.out_width + cell_x;
            const Number grad = load_element<Number>(
                problem.dtype, problem.pooled,
                k * problem.channels * plane + channel * channel_stride + cell * cell_stride);
            sum += weight_x * (weight_y * grad);
          }
        }
      }
      store_element(problem.dtype, level.data,
                    image * level.stride_n + channel * level.stride_c + y * level.stride_h +
                        x * level.stride_w,
                    sum);
    }
  }
}

}  // namespace glimpse::cuda
