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
///   gather_pixels_kernel  few channels, any layout: lanes are pixels
///   gather_simple_kernel  a thread per element; sizes beyond 32-bit counts
///
/// Points of images have two kernels of their own: grad_points.cuh.
namespace glimpse::cuda {

// Note [Gather backward]
// grad[y, x] = sum over boxes k, cells i, j of  Wy_k[i, y] * Wx_k[j, x] * pooled_grad_k[i, j].
// Writing that box by box would make boxes meet in memory. Here blocks own pixels instead: a block
// keeps the sums of one tile in registers, looks up which boxes reach the tile, and adds them. Each
// element is stored once, zeros included: no atomics, no memset, no read of the result.
//
// Order of additions of an element: boxes ascending, then bands of kBand cell rows, then cell
// columns ascending, one term  Wx * (sum over the rows of the band, ascending, of Wy * pooled_grad)
// at a time, skipping cells with a weight of zero. Nothing else decides it: not the tile, not the
// block, not the other boxes. Weights are the merged weights of build_row, bit for bit, because
// samples that miss the tile add nothing to it.

constexpr int32_t kBand = 16;  // cell rows that are summed before their weights along x apply

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
constexpr int32_t kQuad = 4;            // pixels whose weights are read at once
constexpr int32_t kFewestLanes = 8;     // that build one direction of one box
constexpr int32_t kMostHeldCells = 32;  // along an axis: a lane and a bit for each
constexpr int32_t kMostSlots = kGatherThreads / 2 / kFewestLanes;

/// What a block owns: a row of kColumns pixels in each warp, kVector channels in each lane. kBlocks
/// blocks shall share a multiprocessor, which bounds the registers.
template <class NumberT, int32_t kColumnsV, int32_t kVectorV, int32_t kBlocksV>
struct Tile {
  using Number = NumberT;
  static constexpr int32_t kRows = kGatherWarps;
  static constexpr int32_t kRowQuads = kRows / kQuad;
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
  // taken one by one; then cells_y is a multiple of kBand.
  int32_t cells_y, cells_x;
  int32_t x_offset, touched_offset, weight_bytes;  // of TileWeights
  bool prepared;                                   // the rows of boxes are in the workspace
  bool flat;  // channels of a block that follow each other are staged in one piece
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

/// Weights of a batch of boxes at the rows and columns of a tile, in shared memory, and which
/// pixels of the tile each cell touches: bit i for row or column i.
template <class Tile>
struct TileWeights {
  using Number = typename Tile::Number;
  using NumberQuad = Quad<Number>;

  NumberQuad* y;        // [slots][cells_y][kRowQuads]
  NumberQuad* x;        // [slots][cells_x][kQuads]
  uint32_t* touched_y;  // [slots][cells_y]
  uint32_t* touched_x;  // [slots][cells_x]

  __device__ __forceinline__ TileWeights(const GatherPlan& plan, char* shared) {
    y = reinterpret_cast<NumberQuad*>(shared);
    x = reinterpret_cast<NumberQuad*>(shared + plan.x_offset);
    touched_y = reinterpret_cast<uint32_t*>(shared + plan.touched_offset);
    touched_x = touched_y + plan.slots * plan.cells_y;
  }
  /// Sets the sizes of a plan whose slots and cells are known.
  static void lay_out(GatherPlan* plan) {
    constexpr auto kBytes = static_cast<int32_t>(sizeof(NumberQuad));
    plan->x_offset = plan->slots * plan->cells_y * Tile::kRowQuads * kBytes;
    plan->touched_offset = plan->x_offset + plan->slots * plan->cells_x * Tile::kQuads * kBytes;
    plan->weight_bytes = plan->touched_offset + plan->slots * (plan->cells_y + plan->cells_x) *
                                                    static_cast<int32_t>(sizeof(uint32_t));
  }
};

/// Lanes from the lowest to the highest set bit.
__device__ __forceinline__ Cells span_of(uint32_t mask) {
  if (mask == 0) return {0, 0};
  const auto bits = static_cast<int32_t>(mask);
  return {__ffs(bits) - 1, 32 - __clz(bits)};
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

/// What a group of lanes works on where rows are not prepared: one direction of one box. In shared
/// memory, because the sums need the registers.
template <class Number>
struct TileLine {
  BoxAxis<Number> line;
  Number factor;  // of all weights
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
  constexpr int32_t kMostQuads = Tile::kRowQuads > Tile::kQuads ? Tile::kRowQuads : Tile::kQuads;
  GLIMPSE_SHARED(TileLine<Number>, lines, [2 * kMostSlots]);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t cell = thread & ((1 << plan.group_shift) - 1);
  // Groups of y come first, those of x follow; there are at least as many groups as directions of
  // boxes, and a warp has one direction only.
  const int32_t task = thread >> plan.group_shift;
  const bool along_y = task < plan.slots;
  const int32_t slot = along_y ? task : task - plan.slots;
  const bool active = slot < batch.count();
  if (!plan.prepared) {
    if (cell == 0 && active) {
      const Box<Number> box =
          box_on_level<Number>(problem, batch.box(slot), place.image, place.level);
      lines[task].line = box_axis(problem, box, along_y ? kY : kX);
      lines[task].factor = sample_factor(lines[task].line.axis);
    }
    __syncwarp();
  }
  const int32_t cells = along_y ? batch.rows() : batch.columns();
  if (!active || cell >= cells) return;

  const Level& level = problem.level[place.level];
  const int32_t first_pixel = along_y ? place.y : place.x;
  const int32_t left = (along_y ? level.height : level.width) - first_pixel;
  const int32_t owned = along_y ? Tile::kRows : Tile::kColumns;
  const int32_t pixels = left < owned ? left : owned;
  const int32_t quads = along_y ? Tile::kRowQuads : Tile::kQuads;
  const int32_t index = slot * (along_y ? plan.cells_y : plan.cells_x) + cell;
  Quad<Number>* quad = (along_y ? weights.y : weights.x) + index * quads;
  auto* weight_of = reinterpret_cast<Number*>(quad);
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kMostQuads; ++i) {
    if (i < quads) quad[i] = Quad<Number>{};
  }
  uint32_t touched = 0;
  if (plan.prepared) {
    const int32_t row = along_y ? batch.y + cell : problem.out_height + batch.x + cell;
    const int64_t first = batch.box(slot) * (problem.out_height + problem.out_width);
    const PreparedRow<Number> prepared = load_row(Footprints::rows<Number>(problem) + first + row);
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < PreparedRow<Number>::kTaps; ++i) {
      const Tap<Number> tap = prepared.tap[i];
      const int32_t pixel = tap.pixel - first_pixel;
      if (static_cast<uint32_t>(pixel) < static_cast<uint32_t>(pixels) && tap.weight != 0) {
        weight_of[pixel] = tap.weight;
        touched |= 1u << pixel;
      }
    }
  } else {
    const TileLine<Number>& own = lines[task];
    for_each_tap(problem.op, own.line.axis, (along_y ? batch.y : batch.x) + cell, first_pixel,
                 first_pixel + pixels - 1, own.line.size,
                 [&](int32_t tapped, Number weight, Number slope, Number progress) {
                   const int32_t pixel = tapped - first_pixel;
                   if (static_cast<uint32_t>(pixel) < static_cast<uint32_t>(pixels)) {
                     weight_of[pixel] += own.line.weighting(weight, slope, progress);
                   }
                 });
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < kMostQuads; ++i) {
      if (i >= quads) continue;
      Quad<Number> scaled = quad[i];
      GLIMPSE_UNROLL
      for (int32_t j = 0; j < kQuad; ++j) {
        scaled.weight[j] *= own.factor;
        touched |= static_cast<uint32_t>(scaled.weight[j] != 0) << (i * kQuad + j);
      }
      quad[i] = scaled;
    }
  }
  (along_y ? weights.touched_y : weights.touched_x)[index] = touched;
}

/// What this warp has to do for one box: the cells that its row of pixels and the tile's columns
/// read, numbered from the first one that is held. All lanes call it.
struct WarpCells {
  uint32_t rows;  // a bit for each
  Cells columns;  // some may touch nothing
};

template <class Tile>
__device__ __forceinline__ WarpCells cells_of_warp(const GatherPlan& plan,
                                                   const TileWeights<Tile>& weights,
                                                   const Batch& batch, int32_t slot) {
  const auto lane = static_cast<int32_t>(threadIdx.x & 31),
             warp = static_cast<int32_t>(threadIdx.x >> 5);
  uint32_t touched_y = 0, touched_x = 0;
  if (lane < batch.rows()) touched_y = weights.touched_y[slot * plan.cells_y + lane];
  if (lane < batch.columns()) touched_x = weights.touched_x[slot * plan.cells_x + lane];
  return {__ballot_sync(kFullWarp, (touched_y >> warp & 1) != 0),
          span_of(__ballot_sync(kFullWarp, touched_x != 0))};
}

// ---------------------------------------------------------------------------------- the sums

/// The sums of a lane. Indexed by constants only, so that they stay in registers.
template <class Tile>
struct TileSums {
  using Number = typename Tile::Number;
  Number value[Tile::kColumns][Tile::kVector];

  __device__ __forceinline__ void clear() {
    GLIMPSE_UNROLL
    for (int32_t j = 0; j < Tile::kColumns; ++j) {
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) value[j][v] = 0;
    }
  }

  /// Adds a column of cells: `sum` of its rows times its weights along x. Pixels that the column
  /// does not touch stay as they are even where the gradient is infinite or NaN.
  __device__ __forceinline__ void add(const Number (&sum)[Tile::kVector], const Quad<Number>* quad,
                                      uint32_t touched) {
    GLIMPSE_UNROLL
    for (int32_t q = 0; q < Tile::kQuads; ++q) {
      if ((touched >> (q * kQuad) & 15) == 0) continue;
      const Quad<Number> weights = quad[q];
      GLIMPSE_UNROLL
      for (int32_t j = 0; j < kQuad; ++j) {
        if (weights.weight[j] != 0) {
          GLIMPSE_UNROLL
          for (int32_t v = 0; v < Tile::kVector; ++v) {
            value[q * kQuad + j][v] += weights.weight[j] * sum[v];
          }
        }
      }
    }
  }
};

/// Calls add(rows, span) for each band of the rows that are set in `rows`. One or two rows with
/// nothing between them are the usual case.
template <class Add>
__device__ __forceinline__ void for_each_band(uint32_t rows, const Add& add) {
  constexpr uint32_t kBandRows = (1u << kBand) - 1;
  GLIMPSE_NO_UNROLL
  for (uint32_t band = kBandRows; band != 0; band <<= kBand) {
    if ((rows & band) != 0) add(span_of(rows & band));
  }
}

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

/// The visit of box k where not all of its cells are held: those that reach the tile, whole bands
/// of rows at a time, and some columns of them at a time.
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
  visit.rows.first -= visit.rows.first % kBand;
  visit.step_y = plan.cells_y;
  visit.step_x = plan.cells_x;
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

/// Adds the cells of `columns` in kReads rows of cells, or in any number if kReads is 0. `grad` is
/// the first of them, `weight_y` and the pointers along x belong to it. Of every cell, a lane loads
/// the pooled gradient of its channels in one piece, one column ahead of the sums.
template <class T, class Tile, int32_t kReads>
__device__ __forceinline__ void add_columns_nhwc(const T* grad, int64_t column_stride,
                                                 int64_t row_stride, bool active, int32_t rows,
                                                 int32_t columns,
                                                 const typename Tile::Number* weight_y,
                                                 const Quad<typename Tile::Number>* weight_x,
                                                 const uint32_t* touched_x, TileSums<Tile>& sums) {
  using Number = typename Tile::Number;
  using GradPack = Pack<T, Tile::kVector>;
  constexpr int32_t kRows = kReads > 0 ? kReads : 1;
  // With 8 channels in each lane the second row has no registers to be ahead.
  constexpr int32_t kAhead = Tile::kVector == 8 ? 1 : kRows;
  Number row_weight[kRows];
  GradPack next[kRows];
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kRows; ++i) {
    row_weight[i] = weight_y[i * Tile::kRows];
    next[i] = active && i < kAhead ? GradPack::load(grad + i * row_stride) : GradPack::zero();
  }
  GLIMPSE_NO_UNROLL
  for (int32_t x = 0; x < columns; ++x) {
    Number sum[Tile::kVector] = {};
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < kRows; ++i) {
      if (i >= kAhead && active) next[i] = GradPack::load(grad + i * row_stride);
      const GradPack current = next[i];
      if (i < kAhead && active && x + 1 < columns) {
        next[i] = GradPack::load(grad + column_stride + i * row_stride);
      }
      Number value[Tile::kVector];
      current.unpack(value);
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) sum[v] += row_weight[i] * value[v];
    }
    if constexpr (kReads == 0) {
      const T* below = grad;
      GLIMPSE_NO_UNROLL
      for (int32_t i = 1; i < rows; ++i) {
        below += row_stride;
        const Number weight = weight_y[i * Tile::kRows];
        if (weight == 0 || !active) continue;
        Number value[Tile::kVector];
        GradPack::load(below).unpack(value);
        GLIMPSE_UNROLL
        for (int32_t v = 0; v < Tile::kVector; ++v) sum[v] += weight * value[v];
      }
    }
    sums.add(sum, weight_x, touched_x[x]);
    weight_x += Tile::kQuads;
    grad += column_stride;
  }
}

/// Adds a batch to the row of pixels of this warp.
template <class T, class Tile>
__device__ __forceinline__ void add_batch_nhwc(const Problem& problem, const GatherPlan& plan,
                                               const TilePlace& place,
                                               const TileWeights<Tile>& weights, const Batch& batch,
                                               TileSums<Tile>& sums) {
  using Number = typename Tile::Number;
  const int32_t warp = threadIdx.x >> 5;
  const int64_t channel = channel_of_thread<Tile>(place);
  const bool active = channel < problem.channels;
  const int64_t row_stride = problem.channels * problem.out_width;
  for (int32_t slot = 0; slot < batch.count(); ++slot) {
    const WarpCells own = cells_of_warp(plan, weights, batch, slot);
    if (own.rows == 0 || own.columns.end == 0) continue;
    for_each_band(own.rows, [&](Cells rows) {
      const int64_t cell =
          (batch.box(slot) * problem.out_height + batch.y + rows.first) * problem.out_width +
          batch.x + own.columns.first;
      const T* grad = static_cast<const T*>(problem.pooled) + cell * problem.channels + channel;
      const auto* weight_y = reinterpret_cast<const Number*>(weights.y) +
                             (slot * plan.cells_y + rows.first) * Tile::kRows + warp;
      const int32_t column = slot * plan.cells_x + own.columns.first;
      const Quad<Number>* weight_x = weights.x + column * Tile::kQuads;
      const uint32_t* touched_x = weights.touched_x + column;
      const int32_t read = rows.end - rows.first;
      const int32_t columns = own.columns.end - own.columns.first;
      if (read == 1) {
        add_columns_nhwc<T, Tile, 1>(grad, problem.channels, row_stride, active, read, columns,
                                     weight_y, weight_x, touched_x, sums);
      } else if (read == 2) {
        add_columns_nhwc<T, Tile, 2>(grad, problem.channels, row_stride, active, read, columns,
                                     weight_y, weight_x, touched_x, sums);
      } else {
        add_columns_nhwc<T, Tile, 0>(grad, problem.channels, row_stride, active, read, columns,
                                     weight_y, weight_x, touched_x, sums);
      }
    });
  }
}

/// Block: a tile by 32 * kVector channels. Warp: one row of pixels. Lane: kVector channels of
/// kColumns pixels, summed in registers.
template <class T, class Tile>
__global__ void __launch_bounds__(kGatherThreads, Tile::kBlocks)
    gather_nhwc_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                       GLIMPSE_GRID_CONSTANT GatherPlan plan) {
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
  row += place.x * level.stride_w;
  const int32_t left = level.width - place.x;
  GLIMPSE_UNROLL
  for (int32_t j = 0; j < Tile::kColumns; ++j) {
    if (j < left) Pack<T, Tile::kVector>::from(sums.value[j]).store(row);
    row += level.stride_w;
  }
}

// --------------------------------------------------------------------------------- rows innermost

/// Shared memory of gather_nchw_kernel: the cells of some boxes, of all channels of the block. The
/// distance of channels is an odd number of words, so that 32 lanes reading one cell of 32 channels
/// use 32 banks.
template <class T, class Tile>
struct Stage {
  static constexpr auto kSize = static_cast<int32_t>(sizeof(T));
  static constexpr int32_t kCells = 25088 / (Tile::kChannels * kSize);  // of a channel
  static constexpr int32_t kStride = kCells + (kSize == 2 ? 2 : 1);
  static constexpr size_t kBytes = (Tile::kChannels * kStride * kSize + 15) / 16 * 16;

  // At the end, what follows from `shared` turns the sums of a warp from lane = channel to
  // lane = pixel.
  static constexpr int32_t kTurned = 32 * Tile::kColumns;  // of a warp
  static constexpr size_t kTurnBytes = kGatherWarps * kTurned * sizeof(typename Tile::Number);
};

/// Which cells of a box are staged: `cells` neighbours in each channel of the stage, rows of
/// `width` cells from the held row `row`.
struct Piece {
  int32_t row, cells, width;
};

template <class Tile>
__device__ __forceinline__ Piece piece_of_box(const Problem& problem, const GatherPlan& plan,
                                              const TileWeights<Tile>& weights, const Batch& batch,
                                              int32_t slot) {
  if (plan.flat) return {0, problem.out_height * problem.out_width, problem.out_width};
  const auto lane = static_cast<int32_t>(threadIdx.x & 31);
  uint32_t touched = 0;
  if (lane < batch.rows()) touched = weights.touched_y[slot * plan.cells_y + lane];
  const Cells rows = span_of(__ballot_sync(kFullWarp, touched != 0));
  const int32_t width = batch.columns();
  return {rows.first, (rows.end - rows.first) * width, width};
}

/// Starts to copy the channels of a box that are stored one behind the other, all of their cells,
/// by the whole block.
template <class T, class Tile>
__device__ __forceinline__ void stage_flat(const Problem& problem, int64_t box,
                                           int64_t first_channel, T* stage) {
  constexpr int32_t kPack = 16 / static_cast<int32_t>(sizeof(T));
  const int32_t plane = problem.out_height * problem.out_width;
  const int64_t left = problem.channels - first_channel;
  const int32_t channels = left < Tile::kChannels ? static_cast<int32_t>(left) : Tile::kChannels;
  const T* source =
      static_cast<const T*>(problem.pooled) + (box * problem.channels + first_channel) * plane;
  for (int32_t i = static_cast<int32_t>(threadIdx.x) * kPack; i < channels * plane;
       i += kGatherThreads * kPack) {
    copy_async16(stage + i, source + i);
  }
}

/// Starts to copy the cells of a piece, of all channels of the block. One warp: every eighth
/// channel; lanes are cells.
template <class T, class Tile>
__device__ __forceinline__ void stage_piece(const Problem& problem, const Batch& batch,
                                            int32_t slot, int64_t first_channel, const Piece& piece,
                                            T* stage) {
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  const int64_t left = problem.channels - first_channel;
  const int32_t channels = left < Tile::kChannels ? static_cast<int32_t>(left) : Tile::kChannels;
  const T* first = static_cast<const T*>(problem.pooled) +
                   (batch.box(slot) * problem.channels + first_channel + warp) * plane +
                   int64_t{batch.y + piece.row} * problem.out_width + batch.x;
  for (int32_t cell = lane; cell < piece.cells; cell += 32) {
    const int32_t skipped = problem.out_width - piece.width;  // from row to row
    const T* source = first + cell + (skipped > 0 ? cell / piece.width * skipped : 0);
    T* target = stage + warp * Stage<T, Tile>::kStride + cell;
    for (int32_t i = warp; i < channels; i += kGatherWarps) {
      if constexpr (sizeof(T) == 4) {
        copy_async4(target, source);
      } else {
        *target = *source;
      }
      source += kGatherWarps * plane;
      target += kGatherWarps * Stage<T, Tile>::kStride;
    }
  }
}

/// As add_columns_nhwc, of cells that are staged.
template <class T, class Tile, int32_t kReads>
__device__ __forceinline__ void add_columns_nchw(const T* cell, int32_t channel_stride,
                                                 int32_t width, int32_t rows, int32_t columns,
                                                 const typename Tile::Number* weight_y,
                                                 const Quad<typename Tile::Number>* weight_x,
                                                 const uint32_t* touched_x, TileSums<Tile>& sums) {
  using Number = typename Tile::Number;
  constexpr int32_t kKept = kReads > 0 ? kReads : 1;
  Number row_weight[kKept];
  const T* row[kKept][Tile::kVector];
  GLIMPSE_UNROLL
  for (int32_t i = 0; i < kKept; ++i) {
    row_weight[i] = weight_y[i * Tile::kRows];
    GLIMPSE_UNROLL
    for (int32_t v = 0; v < Tile::kVector; ++v) row[i][v] = cell + i * width + v * channel_stride;
  }
  GLIMPSE_NO_UNROLL
  for (int32_t x = 0; x < columns; ++x) {
    Number sum[Tile::kVector] = {};
    GLIMPSE_UNROLL
    for (int32_t i = 0; i < kKept; ++i) {
      GLIMPSE_UNROLL
      for (int32_t v = 0; v < Tile::kVector; ++v) {
        sum[v] += row_weight[i] * load_value(row[i][v][x]);
      }
    }
    if constexpr (kReads == 0) {
      const T* below = cell + x;
      GLIMPSE_NO_UNROLL
      for (int32_t i = 1; i < rows; ++i) {
        below += width;
        const Number weight = weight_y[i * Tile::kRows];
        if (weight == 0) continue;
        GLIMPSE_UNROLL
        for (int32_t v = 0; v < Tile::kVector; ++v) {
          sum[v] += weight * load_value(below[v * channel_stride]);
        }
      }
    }
    sums.add(sum, weight_x, touched_x[x]);
    weight_x += Tile::kQuads;
  }
}

/// Adds a box whose piece is at `stage` to the row of pixels of this warp. Channels are
/// `channel_distance` apart.
template <class T, class Tile>
__device__ __forceinline__ void add_piece(const GatherPlan& plan, const TileWeights<Tile>& weights,
                                          const Batch& batch, int32_t slot, const Piece& piece,
                                          const T* stage, int32_t channel_distance,
                                          TileSums<Tile>& sums) {
  using Number = typename Tile::Number;
  const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const WarpCells own = cells_of_warp(plan, weights, batch, slot);
  if (own.rows == 0 || own.columns.end == 0) return;
  for_each_band(own.rows, [&](Cells rows) {
    const T* cell = stage + lane * channel_distance + (rows.first - piece.row) * piece.width +
                    own.columns.first;
    const auto* weight_y = reinterpret_cast<const Number*>(weights.y) +
                           (slot * plan.cells_y + rows.first) * Tile::kRows + warp;
    const int32_t column = slot * plan.cells_x + own.columns.first;
    const Quad<Number>* weight_x = weights.x + column * Tile::kQuads;
    const uint32_t* touched_x = weights.touched_x + column;
    const int32_t read = rows.end - rows.first;
    const int32_t columns = own.columns.end - own.columns.first;
    if (read == 1) {
      add_columns_nchw<T, Tile, 1>(cell, 32 * channel_distance, piece.width, read, columns,
                                   weight_y, weight_x, touched_x, sums);
    } else if (read == 2) {
      add_columns_nchw<T, Tile, 2>(cell, 32 * channel_distance, piece.width, read, columns,
                                   weight_y, weight_x, touched_x, sums);
    } else {
      add_columns_nchw<T, Tile, 0>(cell, 32 * channel_distance, piece.width, read, columns,
                                   weight_y, weight_x, touched_x, sums);
    }
  });
}

/// Stores the row of pixels of this warp, 32 channels at a time. The sums pass through `turn`, so
/// that neighbouring lanes store neighbouring pixels, four of them at once where these are aligned.
template <class T, class Tile>
__device__ __forceinline__ void store_nchw(const Problem& problem, const TilePlace& place,
                                           typename Tile::Number* turn, TileSums<Tile>& sums) {
  using Number = typename Tile::Number;
  constexpr int32_t kQuads = Tile::kQuads;
  const int32_t lane = threadIdx.x & 31;
  const Level& level = problem.level[place.level];
  const int32_t y = place.y + static_cast<int32_t>(threadIdx.x >> 5);
  const bool row_exists = y < level.height;
  const int32_t width = level.width - place.x;
  auto* quads = reinterpret_cast<Quad<Number>*>(turn);
  // Quads change their places with the channel, so that all lanes of an access use other banks.
  const auto place_of = [](int32_t channel, int32_t quad) {
    return channel * kQuads + (quad ^ (channel * kQuads / 8 & (kQuads - 1)));
  };
  const bool vectors = sizeof(Number) == 4 && level.stride_w == 1 && level.width % kQuad == 0 &&
                       level.stride_h % kQuad == 0 && level.stride_c % kQuad == 0 &&
                       level.stride_n % kQuad == 0 &&
                       reinterpret_cast<uintptr_t>(level.data) % (kQuad * sizeof(T)) == 0;
  T* const tile = static_cast<T*>(level.data) + place.image * level.stride_n + y * level.stride_h +
                  place.x * level.stride_w;
  GLIMPSE_UNROLL
  for (int32_t v = 0; v < Tile::kVector; ++v) {
    GLIMPSE_UNROLL
    for (int32_t q = 0; q < kQuads; ++q) {
      Quad<Number> quad;
      GLIMPSE_UNROLL
      for (int32_t j = 0; j < kQuad; ++j) quad.weight[j] = sums.value[q * kQuad + j][v];
      quads[place_of(lane, q)] = quad;
    }
    __syncwarp();
    const int64_t first_channel = (int64_t{place.slice} * Tile::kVector + v) * 32;
    const int64_t left = problem.channels - first_channel;
    const int32_t channels = !row_exists ? 0 : left < 32 ? static_cast<int32_t>(left) : 32;
    if (vectors) {
      constexpr int32_t kStep = 32 / kQuads;  // channels that are stored at once
      const int32_t q = lane % kQuads;
      T* target = tile + (first_channel + lane / kQuads) * level.stride_c + q * kQuad;
      GLIMPSE_UNROLL
      for (int32_t base = 0; base < 32; base += kStep) {
        const int32_t channel = base + lane / kQuads;
        if (channel < channels && q * kQuad < width) {
          // Not by a Pack::store: the compiler would take it apart.
          const Quad<Number>* quad = quads + place_of(channel, q);
          if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(quad);
          } else if constexpr (sizeof(T) == 2) {
            uint64_t word;
            const auto pack = Pack<T, kQuad>::from(quad->weight);
            memcpy(&word, &pack, sizeof(word));
            *reinterpret_cast<uint64_t*>(target) = word;
          }
        }
        target += kStep * level.stride_c;
      }
    } else {
      constexpr int32_t kStep = 32 / Tile::kColumns;
      const int32_t x = lane % Tile::kColumns;
      T* target =
          tile + (first_channel + lane / Tile::kColumns) * level.stride_c + x * level.stride_w;
      for (int32_t channel = lane / Tile::kColumns; channel < channels; channel += kStep) {
        if (x < width) {
          *target = Store<T>::from(quads[place_of(channel, x / kQuad)].weight[x % kQuad]);
        }
        target += kStep * level.stride_c;
      }
    }
    __syncwarp();
  }
}

/// Block: a tile by kChannels channels. Warp: a row of pixels. Lane: kVector channels of kColumns
/// pixels, summed in registers, so that all weights are the same for the whole warp. Pooled
/// gradients pass through shared memory, from lanes that are cells to lanes that are channels;
/// results go back the same way.
template <class T, class Tile>
__global__ void __launch_bounds__(kGatherThreads, Tile::kBlocks)
    gather_nchw_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                       GLIMPSE_GRID_CONSTANT GatherPlan plan) {
  GLIMPSE_DYNAMIC_SHARED(shared);
  GLIMPSE_SHARED(TilePlace, place, );
  if (threadIdx.x == 0) place = place_of_block<Tile>(problem, plan);
  auto* stage = reinterpret_cast<T*>(shared);
  const TileWeights<Tile> weights(plan, shared + Stage<T, Tile>::kBytes);
  TileSums<Tile> sums;
  sums.clear();
  for_each_batch(problem, plan, place, weights, [&](const Batch& batch) {
    const int64_t first_channel = int64_t{place.slice} * Tile::kChannels;
    const int32_t channel_distance =
        plan.flat ? problem.out_height * problem.out_width : Stage<T, Tile>::kStride;
    // Of a piece in the stage; flat ones have all channels of one box before those of the next.
    const int32_t cell_distance = plan.flat ? Tile::kChannels : 1;
    for (int32_t begin = 0; begin < batch.count();) {
      int32_t used = 0, end = begin;
      for (; end < batch.count(); ++end) {
        const Piece piece = piece_of_box(problem, plan, weights, batch, end);
        if (used + piece.cells > Stage<T, Tile>::kCells) break;
        T* target = stage + used * cell_distance;
        if (plan.flat) {
          stage_flat<T, Tile>(problem, batch.box(end), first_channel, target);
        } else {
          stage_piece<T, Tile>(problem, batch, end, first_channel, piece, target);
        }
        used += piece.cells;
      }
      copy_async_wait_all();
      __syncthreads();
      used = 0;
      for (; begin < end; ++begin) {
        const Piece piece = piece_of_box(problem, plan, weights, batch, begin);
        add_piece<T>(plan, weights, batch, begin, piece, stage + used * cell_distance,
                     channel_distance, sums);
        used += piece.cells;
      }
      __syncthreads();  // before the next run takes the place of this one
    }
  });
  store_nchw<T>(problem, place,
                reinterpret_cast<typename Tile::Number*>(shared) +
                    (threadIdx.x >> 5) * Stage<T, Tile>::kTurned,
                sums);
}

// ------------------------------------------------------------------------------- few channels

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

/// What a block of gather_pixels_kernel owns: a column of kWarpRows pixels in each lane, of up to
/// kChannels channels.
template <class NumberT>
struct PixelTile {
  using Number = NumberT;
  static constexpr int32_t kWarpRows = 4;
  static constexpr int32_t kRows = kWarpRows * kGatherWarps;
  static constexpr int32_t kColumns = 32;
  static constexpr int32_t kChannels = 4;
};

/// The cells that read one row or column of pixels, with the weights of the first of them.
template <class Number>
struct PixelLine {
  static constexpr int32_t kKept = 5;  // odd, so that lanes use different banks
  Cells cells;
  Number weight[kKept];
};

/// Thread: kWarpRows pixels below each other, all channels. For images, where lanes that are
/// channels would be idle. Boxes are taken one by one; the block first looks up which cells read
/// each of its rows and columns.
template <class T>
__global__ void __launch_bounds__(kGatherThreads, sizeof(T) == sizeof(double) ? 1 : 2)
    gather_pixels_kernel(GLIMPSE_GRID_CONSTANT Problem problem,
                         GLIMPSE_GRID_CONSTANT GatherPlan plan) {
  using Number = acc_t<T>;
  using Tile = PixelTile<Number>;
  using Line = PixelLine<Number>;
  constexpr int32_t kLines = Tile::kRows + Tile::kColumns;
  static_assert(kGatherThreads % kLines == 0, "a warp builds one weight of 32 lines");
  GLIMPSE_SHARED(TilePlace, place, );
  GLIMPSE_SHARED(BoxList, list, );
  GLIMPSE_SHARED(Line, lines, [kLines]);
  // For weights that no line keeps, which is rare: a box with far more cells than pixels.
  GLIMPSE_SHARED(BoxAxis<Number>, axes, [2]);
  if (threadIdx.x == 0) {
    place = place_of_block<Tile>(problem, plan);
    list.next = 0;
  }
  __syncthreads();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t lane = thread & 31, warp = thread >> 5;
  const Level& level = problem.level[place.level];
  const int32_t x = place.x + lane, first_y = place.y + warp * Tile::kWarpRows;
  const int64_t first_channel = int64_t{place.slice} * Tile::kChannels;
  const int64_t left = problem.channels - first_channel;
  const int32_t channels = left < Tile::kChannels ? static_cast<int32_t>(left) : Tile::kChannels;
  const bool nhwc = problem.layout == Layout::kNhwc;
  const int64_t plane = int64_t{problem.out_height} * problem.out_width;
  const int64_t cell_stride = nhwc ? problem.channels : 1;
  const int64_t channel_stride = nhwc ? 1 : plane;
  const T* pooled = static_cast<const T*>(problem.pooled) + first_channel * channel_stride;

  Number value[Tile::kWarpRows][Tile::kChannels] = {};
  while (list.next < problem.boxes) {
    list_boxes<Tile>(problem, place, &list);
    for (int32_t i = 0; i < list.size; ++i) {
      const int64_t k = list.box[i];
      {
        const int32_t own = thread % kLines;
        const bool along_y = own < Tile::kRows;
        const Box<Number> box = box_on_level<Number>(problem, k, place.image, place.level);
        const BoxAxis<Number> line = box_axis(problem, box, along_y ? kY : kX);
        const int32_t pixel = along_y ? place.y + own : place.x + own - Tile::kRows;
        Cells cells = {0, 0};
        if (pixel < line.size) cells = cells_reaching(problem.op, line, pixel, pixel);
        if (thread < kLines) lines[own].cells = cells;
        if (thread == 0 || thread == Tile::kRows) axes[along_y ? kY : kX] = line;
        GLIMPSE_NO_UNROLL
        for (int32_t j = thread / kLines; j < Line::kKept; j += kGatherThreads / kLines) {
          Number weight = 0;
          if (cells.first + j < cells.end) {
            weight = pixel_weight(problem.op, line, cells.first + j, pixel);
          }
          lines[own].weight[j] = weight;
        }
      }
      __syncthreads();
      const T* grad = pooled + k * problem.channels * plane;
      const Line& column = lines[Tile::kRows + lane];
      const Cells columns = column.cells;
      GLIMPSE_UNROLL
      for (int32_t r = 0; r < Tile::kWarpRows; ++r) {
        const Line& row = lines[warp * Tile::kWarpRows + r];
        const Cells rows = row.cells;
        GLIMPSE_NO_UNROLL
        for (int32_t band = rows.first; band < rows.end;) {
          const int32_t next_band = band - band % kBand + kBand;
          const int32_t band_end = next_band < rows.end ? next_band : rows.end;
          GLIMPSE_NO_UNROLL
          for (int32_t cell_x = columns.first; cell_x < columns.end; ++cell_x) {
            const int32_t j = cell_x - columns.first;
            const Number weight_x =
                j < Line::kKept ? column.weight[j] : pixel_weight(problem.op, axes[kX], cell_x, x);
            if (weight_x == 0) continue;
            Number sum[Tile::kChannels] = {};
            const T* cell = grad + (int64_t{band} * problem.out_width + cell_x) * cell_stride;
            GLIMPSE_NO_UNROLL
            for (int32_t cell_y = band; cell_y < band_end; ++cell_y) {
              const int32_t i_y = cell_y - rows.first;
              const Number weight_y = i_y < Line::kKept
                                          ? row.weight[i_y]
                                          : pixel_weight(problem.op, axes[kY], cell_y, first_y + r);
              if (weight_y != 0) {
                GLIMPSE_UNROLL
                for (int32_t c = 0; c < Tile::kChannels; ++c) {
                  if (c < channels) {
                    Number grad_of_cell[1];
                    Pack<T, 1>::load(cell + c * channel_stride).unpack(grad_of_cell);
                    sum[c] += weight_y * grad_of_cell[0];
                  }
                }
              }
              cell += problem.out_width * cell_stride;
            }
            GLIMPSE_UNROLL
            for (int32_t c = 0; c < Tile::kChannels; ++c) value[r][c] += weight_x * sum[c];
          }
          band = band_end;
        }
      }
      __syncthreads();  // before the next lines take the place of these
    }
  }

  if (x >= level.width) return;
  T* target = static_cast<T*>(level.data) + place.image * level.stride_n +
              first_channel * level.stride_c + first_y * level.stride_h + x * level.stride_w;
  GLIMPSE_UNROLL
  for (int32_t r = 0; r < Tile::kWarpRows; ++r) {
    if (first_y + r < level.height) {
      GLIMPSE_UNROLL
      for (int32_t c = 0; c < Tile::kChannels; ++c) {
        if (c < channels) target[c * level.stride_c] = Store<T>::from(value[r][c]);
      }
    }
    target += level.stride_h;
  }
}

// ------------------------------------------------------------------------------------ simple

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
        for (int32_t band = rows.first; band < rows.end;) {
          const int32_t next_band = band - band % kBand + kBand;
          const int32_t band_end = next_band < rows.end ? next_band : rows.end;
          for (int32_t cell_x = columns.first; cell_x < columns.end; ++cell_x) {
            const Number weight_x = pixel_weight(problem.op, along_x, cell_x, x);
            if (weight_x == 0) continue;
            Number column = 0;
            for (int32_t cell_y = band; cell_y < band_end; ++cell_y) {
              const Number weight_y = pixel_weight(problem.op, along_y, cell_y, y);
              if (weight_y == 0) continue;
              const int64_t cell = int64_t{cell_y} * problem.out_width + cell_x;
              column += weight_y *
                        load_element<Number>(problem.dtype, problem.pooled,
                                             k * problem.channels * plane +
                                                 channel * channel_stride + cell * cell_stride);
            }
            sum += weight_x * column;
          }
          band = band_end;
        }
      }
      store_element(problem.dtype, level.data,
                    image * level.stride_n + channel * level.stride_c + y * level.stride_h +
                        x * level.stride_w,
                    sum);
    }
  }
}

// ------------------------------------------------------------------------------------ launches

constexpr int64_t kMostBlocks = 2147483647;
constexpr int64_t kFewBlocks = 264;  // two for each multiprocessor of a large GPU

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Blocks over `items`, one thread each; kernels loop where that is not enough.
inline dim3 blocks_of_256(int64_t items) {
  const int64_t blocks = ceil_div(items, 256);
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
}

/// Divides all levels into tiles and returns the number of blocks.
template <class Tile>
int64_t lay_tiles(const Problem& problem, GatherPlan* plan_of) {
  GatherPlan& plan = *plan_of;
  plan.slices = static_cast<int32_t>(ceil_div(problem.channels, Tile::kChannels));
  int64_t tiles = 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    plan.first_tile[l] = tiles;
    plan.tiles_y[l] = static_cast<int32_t>(ceil_div(problem.level[l].height, Tile::kRows));
    plan.tiles_x[l] = static_cast<int32_t>(ceil_div(problem.level[l].width, Tile::kColumns));
    tiles += problem.batch * plan.tiles_y[l] * plan.tiles_x[l];
  }
  return tiles * plan.slices;
}

/// Whether tiles make so few blocks that smaller ones end earlier.
template <class Tile>
bool few_blocks(const Problem& problem) {
  GatherPlan plan = {};
  return lay_tiles<Tile>(problem, &plan) < kFewBlocks;
}

template <class Kernel>
void launch_blocks(const Problem& problem, Kernel kernel, int64_t blocks, size_t bytes,
                   GatherPlan plan) {
  for (; plan.first_block < blocks; plan.first_block += kMostBlocks) {
    const int64_t left = blocks - plan.first_block;
    launch(kernel, dim3(static_cast<unsigned>(left < kMostBlocks ? left : kMostBlocks)),
           kGatherThreads, bytes, static_cast<Stream>(problem.stream), problem, plan);
  }
}

}  // namespace glimpse::cuda
