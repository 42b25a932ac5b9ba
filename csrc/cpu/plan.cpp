// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/plan.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace glimpse {

void Arena::grow(size_t bytes) {
  const size_t size = std::max<size_t>(bytes, blocks_.empty() ? 1 << 12 : 1 << 18);
  blocks_.emplace_back(new char[size]);
  next_ = blocks_.back().get();
  left_ = size;
}

namespace {

/// The merged rows of all cells of an axis, as build_row gives them. Reused from box to box.
template <class A>
class RowBuffer {
 public:
  void build(const Operator& op, const BoxAxis<A>& line) {
    pixels.clear();
    weight.clear();
    slope_origin.clear();
    slope_step.clear();
    // Of a large output most cells may be out of reach of the map.
    constexpr int32_t kFew = 64;
    Cells reached = {0, line.cells};
    if (line.cells > kFew && line.axis.samples > 0) {
      reached = cells_reaching(op, line.axis, reached, 0, line.size - 1, line.size);
    }
    start.assign(static_cast<size_t>(reached.first) + 1, 0);
    for (int32_t cell = reached.first; cell < reached.end; ++cell) {
      row_ = pixels.size();
      build_row(op, line.axis, line.weighting, cell, line.size, *this);
      start.push_back(static_cast<int32_t>(pixels.size()));
    }
    finish(line.cells);
  }

  /// The same of cells that weigh pixels.
  void build(const FilterLine& filter, const BoxAxis<A>& line) {
    pixels.clear();
    weight.clear();
    slope_origin.clear();
    slope_step.clear();
    const FilterCells reached = filter.cells_reading(0, line.size - 1);
    const int32_t first = std::min(reached.first, reached.end);
    start.assign(static_cast<size_t>(first) + 1, 0);
    for (int32_t cell = first; cell < reached.end; ++cell) {
      FilterSlopes<A> slopes;
      const FilterRow<A> row = filter.row<A>(cell, &slopes);
      for (int32_t i = 0; i < row.count; ++i) {
        A origin, step;
        row.slopes(i, slopes, &origin, &step);
        push(row.first + i, line.weighting.of(row.weight(i), origin, step), origin, step);
      }
      start.push_back(static_cast<int32_t>(pixels.size()));
    }
    finish(line.cells);
  }

  int32_t cells() const { return static_cast<int32_t>(start.size()) - 1; }
  int32_t taps() const { return static_cast<int32_t>(pixels.size()); }

  // What build_row asks for.
  int32_t size() const { return static_cast<int32_t>(pixels.size() - row_); }
  int32_t pixel(int32_t i) const { return pixels[row_ + i]; }
  void add(int32_t i, A w, A origin, A step) {
    weight[row_ + i] += w;
    slope_origin[row_ + i] += origin;
    slope_step[row_ + i] += step;
  }
  void push(int32_t pixel, A w, A origin, A step) {
    pixels.push_back(pixel);
    weight.push_back(w);
    slope_origin.push_back(origin);
    slope_step.push_back(step);
  }
  void scale(int32_t i, A factor) {
    weight[row_ + i] *= factor;
    slope_origin[row_ + i] *= factor;
    slope_step[row_ + i] *= factor;
  }

  std::vector<int32_t> start;  // [cells + 1]
  std::vector<int32_t> pixels;
  std::vector<A> weight, slope_origin, slope_step;
  int32_t low = 0, high = 0;  // first and last pixel that is touched

 private:
  void finish(int32_t cells) {
    start.resize(static_cast<size_t>(cells) + 1, static_cast<int32_t>(pixels.size()));
    low = high = 0;
    if (!pixels.empty()) {
      const auto range = std::minmax_element(pixels.begin(), pixels.end());
      low = *range.first;
      high = *range.second;
    }
  }

  size_t row_ = 0;
};

enum class Padding { kNone, kZeroSlot, kSplit };

/// The length that all rows start[i]..start[i + 1] get, or 0 where they keep their own.
int32_t uniform_length(const int32_t* start, int32_t rows, Padding padding) {
  if (padding == Padding::kNone || rows == 0) return 0;
  int32_t longest = 2, shortest = kMaxUniform;
  for (int32_t row = 0; row < rows; ++row) {
    longest = std::max(longest, start[row + 1] - start[row]);
    shortest = std::min(shortest, start[row + 1] - start[row]);
  }
  if (longest > kMaxUniform || (padding == Padding::kSplit && shortest == 0)) return 0;
  return longest;
}

/// Copies rows into the arena, padding them to one length where that is wanted and worth it.
template <class A>
Table<A> make_table(const int32_t* start, int32_t first, int32_t end, const int32_t* index,
                    const A* weight, int32_t origin, Padding padding, int32_t zero_slot,
                    Arena& arena) {
  Table<A> table;
  table.first = first;
  table.end = end;
  start += first;
  const int32_t rows = end - first;
  table.uniform = uniform_length(start, rows, padding);
  const int64_t taps = table.uniform != 0 ? int64_t{rows} * table.uniform : start[rows] - start[0];
  auto* new_index = arena.allocate<int32_t>(taps);
  auto* new_weight = arena.allocate<A>(taps);
  table.index = new_index;
  table.weight = new_weight;
  if (table.uniform == 0) {
    auto* new_start = arena.allocate<int32_t>(rows + 1);
    table.start = new_start;
    for (int32_t row = 0; row <= rows; ++row) new_start[row] = start[row] - start[0];
    for (int64_t i = 0; i < taps; ++i) new_index[i] = index[start[0] + i] - origin;
    std::copy_n(weight + start[0], taps, new_weight);
    return table;
  }
  for (int32_t row = 0; row < rows; ++row) {
    const int32_t count = start[row + 1] - start[row];
    int32_t* i = new_index + int64_t{row} * table.uniform;
    A* w = new_weight + int64_t{row} * table.uniform;
    for (int32_t tap = 0; tap < count; ++tap) {
      i[tap] = index[start[row] + tap] - origin;
      w[tap] = weight[start[row] + tap];
    }
    for (int32_t tap = count; tap < table.uniform; ++tap) {
      if (padding == Padding::kSplit) {
        i[tap] = i[tap - 1];
        w[tap] = w[tap - 1] = w[tap - 1] / 2;
      } else {
        i[tap] = zero_slot;
        w[tap] = A(0);
      }
    }
  }
  return table;
}

/// Rows of a table and of its transpose for one axis at a time.
template <class A>
class Planner {
 public:
  Planner(const Problem& problem, Purpose purpose, int32_t lanes, int32_t sources, Arena& arena)
      : problem_(problem), purpose_(purpose), lanes_(lanes), sources_(sources), arena_(arena) {}

  void plan(int64_t k, BoxPlan<A>& plan) {
    const Box<A> box = read_box<A>(problem_, k);
    plan.box = k;
    plan.image = box.image;
    plan.level = box.level;
    plan.empty = true;
    plan.direct = false;
    plan.column_mask = nullptr;
    plan.unread_count = 0;
    plan.narrow = plan.planar = false;
    if (box.level < 0) return;
    const Level& level = problem_.level[box.level];
    const BoxAxis<A> along_y = box_axis(problem_, box, kY);
    const BoxAxis<A> along_x = box_axis(problem_, box, kX);
    plan.axis[kY] = along_y.axis;
    plan.axis[kX] = along_x.axis;
    const auto build = [&](int32_t direction, const BoxAxis<A>& line, RowBuffer<A>& buffer) {
      if (problem_.filter.used) {
        buffer.build(filter_line(problem_, box, direction, line.size), line);
      } else {
        buffer.build(problem_.op, line);
      }
      return buffer.taps() > 0;
    };
    if (!build(kY, along_y, rows_) || !build(kX, along_x, columns_)) return;
    plan.empty = false;
    if (plan_narrow(level, plan)) return;
    choose_window(along_x.size, plan);
    if (plan_planar(plan)) return;
    const bool transpose = purpose_ != Purpose::kSample && !plan.direct;
    const bool nchw = problem_.layout == Layout::kNchw;
    const bool pad = nchw && !plan.direct && purpose_ == Purpose::kSample;
    if (purpose_ != Purpose::kGradFeatures || plan.direct) {
      const Cells rows = tapped_cells(rows_);
      // The kernels that serve cell by cell skip columns too.
      const Cells columns = plan.direct ? tapped_cells(columns_) : Cells{0, columns_.cells()};
      plan.y =
          make_table(rows_.start.data(), rows.first, rows.end, rows_.pixels.data(),
                     rows_.weight.data(), 0, pad ? Padding::kSplit : Padding::kNone, 0, arena_);
      plan.x = make_table(columns_.start.data(), columns.first, columns.end, columns_.pixels.data(),
                          columns_.weight.data(), plan.first_column,
                          pad ? Padding::kZeroSlot : Padding::kNone, plan.vectors * lanes_, arena_);
      if (pad) list_unread(1, plan);
      if (purpose_ == Purpose::kGradBoxes) {
        add_slopes(rows_, plan.y);
        add_slopes(columns_, plan.x);
      }
    }
    if (transpose) {
      plan.y_transposed = transposed(rows_, true);
      if (nchw) {
        plan.x_transposed = transposed_window(plan);
        if (purpose_ == Purpose::kGradBoxes) plan.column_mask = column_mask(plan);
      } else {
        plan.x_transposed = transposed(columns_, true);
        plan.slots = plan.x_transposed.end;
        if (purpose_ == Purpose::kGradBoxes) index_by_slot(plan);
      }
    }
  }

 private:
  /// Which columns a kernel reads as vectors. They may include columns that no cell taps.
  void choose_window(int32_t width, BoxPlan<A>& plan) {
    plan.slots = 0;
    if (problem_.layout == Layout::kNhwc) {
      plan.first_column = 0;
      plan.vectors = plan.last_valid = 0;
      plan.direct = purpose_ == Purpose::kGradBoxes &&
                    (columns_.taps() > kMaxColumns || problem_.out_width > kMaxColumns);
      return;
    }
    const int64_t columns = int64_t{columns_.high} - columns_.low + 1;
    const int64_t padded = (columns + lanes_ - 1) / lanes_ * lanes_;
    // Where a row of the map has room, the window moves left until it ends inside: whole vectors
    // are loaded faster than parts.
    const int64_t first = std::clamp<int64_t>(width - padded, 0, columns_.low);
    plan.first_column = static_cast<int32_t>(first);
    plan.vectors = static_cast<int32_t>(padded / lanes_);
    plan.last_valid =
        static_cast<int32_t>(std::min<int64_t>(lanes_, width - first - (padded - lanes_)));
    const bool sparse = columns > 4 * int64_t{columns_.taps()} + 64;
    plan.direct = sparse || padded > kMaxColumns || problem_.out_width > kMaxColumns ||
                  problem_.out_height > kMaxColumns;
  }

  /// The cells from the first to the last one that read something. There is one.
  static Cells tapped_cells(const RowBuffer<A>& buffer) {
    Cells cells = {0, buffer.cells()};
    while (buffer.start[cells.first + 1] == buffer.start[cells.first]) ++cells.first;
    while (buffer.start[cells.end - 1] == buffer.start[cells.end]) --cells.end;
    return cells;
  }

  /// Lists the cells of a row that read nothing, each as `interleave` elements.
  void list_unread(int32_t interleave, BoxPlan<A>& plan) {
    if (problem_.fill == 0) return;
    auto* unread = arena_.template allocate<int32_t>(int64_t{columns_.cells()} * interleave);
    for (int32_t cell = 0; cell < columns_.cells(); ++cell) {
      if (columns_.start[cell] != columns_.start[cell + 1]) continue;
      for (int32_t c = 0; c < interleave; ++c) {
        unread[plan.unread_count++] = cell * interleave + c;
      }
    }
    plan.unread = unread;
  }

  /// Plans a box for kernels that take cells for lanes, if that suits: channels fill less than half
  /// a vector and lie apart (kNchw), or without gaps between pixels (kNhwc).
  bool plan_narrow(const Level& level, BoxPlan<A>& plan) {
    constexpr int64_t kMostScratch = int64_t{1} << 22;  // elements
    const bool nchw = problem_.layout == Layout::kNchw;
    if (2 * problem_.channels > lanes_) return false;
    const auto interleave = static_cast<int32_t>(nchw ? 1 : problem_.channels);
    if (!nchw && level.width > 1 && level.stride_w != problem_.channels) return false;
    const int64_t columns = int64_t{columns_.high} - columns_.low + 1;
    const int64_t padded = (columns * interleave + lanes_ - 1) / lanes_ * lanes_;
    const int64_t rows = purpose_ == Purpose::kGradFeatures ? problem_.out_height : 4;
    // Few cells of a wide window are better read one by one.
    if (columns > 8 * int64_t{columns_.taps()} + 64 || padded * rows > kMostScratch ||
        int64_t{problem_.out_width} * interleave > kMostScratch) {
      return false;
    }
    const int64_t elements = int64_t{level.width} * interleave;
    const int64_t first =
        std::clamp<int64_t>(elements - padded, 0, int64_t{columns_.low} * interleave);
    plan.narrow = true;
    plan.slots = 0;
    plan.first_column = static_cast<int32_t>(first);
    plan.vectors = static_cast<int32_t>(padded / lanes_);
    plan.last_valid =
        static_cast<int32_t>(std::min<int64_t>(lanes_, elements - first - (padded - lanes_)));
    if (purpose_ == Purpose::kGradFeatures) {
      plan.y_transposed = transposed(rows_, false);
      const int32_t pixels = columns_.high - columns_.low + 1;
      sort_by_pixel(columns_, columns_.low, pixels);
      plan.lanes = lane_table(start_.data(), pixels, cell_.data(), weight_.data(), nullptr, nullptr,
                              interleave, columns_.low * interleave - plan.first_column, 0);
      return true;
    }
    const Cells tapped = tapped_cells(rows_);
    const bool slopes = purpose_ == Purpose::kGradBoxes;
    // As where lanes are channels, so that a channel has the same bits alone and among many.
    plan.y =
        make_table(rows_.start.data(), tapped.first, tapped.end, rows_.pixels.data(),
                   rows_.weight.data(), 0, slopes ? Padding::kNone : Padding::kSplit, 0, arena_);
    if (slopes) add_slopes(rows_, plan.y);
    plan.lanes =
        lane_table(columns_.start.data(), columns_.cells(), columns_.pixels.data(),
                   columns_.weight.data(), slopes ? columns_.slope_origin.data() : nullptr,
                   slopes ? columns_.slope_step.data() : nullptr, interleave, 0, plan.first_column);
    list_unread(interleave, plan);
    return true;
  }

  /// Plans a box for kernels that take a plane after the other, if a row of its window (sample) or
  /// of its cells (gradients) fits into the vectors that lanes pick from.
  bool plan_planar(BoxPlan<A>& plan) {
    if (problem_.layout == Layout::kNhwc || plan.direct) return false;
    const bool sample = purpose_ == Purpose::kSample, slopes = purpose_ == Purpose::kGradBoxes;
    const int32_t cells = problem_.out_width;
    if (sample ? plan.vectors > sources_ : cells > std::min(sources_, 2) * lanes_) return false;
    plan.planar = true;
    if (purpose_ != Purpose::kGradFeatures) {
      const Cells rows = tapped_cells(rows_);
      plan.y = make_table(rows_.start.data(), rows.first, rows.end, rows_.pixels.data(),
                          rows_.weight.data(), 0, Padding::kSplit, 0, arena_);
    }
    if (sample) {
      plan.packed = plan.vectors == 1 && 2 * cells <= lanes_ && sources_ > 1 ? 2 : 1;
      plan.picks =
          pick_table(columns_.start.data(), cells, columns_.pixels.data(), columns_.weight.data(),
                     nullptr, nullptr, plan.first_column, plan.packed);
      list_unread(1, plan);
      return true;
    }
    const int32_t columns = plan.vectors * lanes_;
    sort_by_pixel(columns_, plan.first_column, columns);
    plan.picks = pick_table(start_.data(), columns, cell_.data(), weight_.data(),
                            slopes ? slope_origin_.data() : nullptr,
                            slopes ? slope_step_.data() : nullptr, 0, 1);
    if (slopes) {
      add_slopes(rows_, plan.y);
      plan.column_mask = column_mask(plan);
    } else {
      plan.y_transposed = transposed(rows_, true);
    }
    return true;
  }

  /// Rows start[i]..start[i + 1] as lanes that pick index - origin. Where rows are packed, a vector
  /// holds `packed` times all of them, and each time they pick from the next source.
  PickTable<A> pick_table(const int32_t* start, int32_t rows, const int32_t* index, const A* weight,
                          const A* slope_origin, const A* slope_step, int32_t origin,
                          int32_t packed) {
    PickTable<A> table;
    table.blocks = (rows + lanes_ - 1) / lanes_;
    table.taps = 1;
    for (int32_t row = 0; row < rows; ++row) {
      table.taps = std::max(table.taps, start[row + 1] - start[row]);
    }
    const int64_t vectors = int64_t{table.blocks} * table.taps;
    const A* sources[3] = {weight, slope_origin, slope_step};
    A* numbers[3] = {};
    for (int32_t s = 0; s < 3; ++s) {
      if (sources[s] == nullptr) continue;
      numbers[s] = arena_.template allocate<A>(vectors * lanes_);
      std::fill_n(numbers[s], vectors * lanes_, A(0));
    }
    auto* lane_index = arena_.template allocate<uint8_t>(vectors * lanes_);
    auto* mask = arena_.template allocate<uint16_t>(vectors);
    std::fill_n(lane_index, vectors * lanes_, uint8_t{0});
    std::fill_n(mask, vectors, uint16_t{0});
    for (int32_t copy = 0; copy < packed; ++copy) {
      for (int32_t row = 0; row < rows; ++row) {
        const int32_t lane = (copy * rows + row) % lanes_, block = row / lanes_;
        for (int32_t tap = start[row]; tap < start[row + 1]; ++tap) {
          const int64_t v = int64_t{block} * table.taps + tap - start[row];
          lane_index[v * lanes_ + lane] = static_cast<uint8_t>(index[tap] - origin + copy * lanes_);
          mask[v] = static_cast<uint16_t>(mask[v] | 1u << lane);
          for (int32_t s = 0; s < 3; ++s) {
            if (numbers[s] != nullptr) numbers[s][v * lanes_ + lane] = sources[s][tap];
          }
        }
      }
    }
    table.index = lane_index;
    table.mask = mask;
    table.weight = numbers[0];
    table.slope_origin = numbers[1];
    table.slope_step = numbers[2];
    return table;
  }

  /// Rows start[i]..start[i + 1] as lanes. Each row becomes `interleave` lanes, and a tap at index
  /// i one at i * interleave + lane - origin. `before` empty lanes come first.
  LaneTable<A> lane_table(const int32_t* start, int32_t rows, const int32_t* index, const A* weight,
                          const A* slope_origin, const A* slope_step, int32_t interleave,
                          int32_t before, int32_t origin) {
    const int32_t elements = before + rows * interleave;
    const auto row_of = [&](int32_t element) {
      return element < before || element >= elements ? -1 : (element - before) / interleave;
    };
    LaneTable<A> table;
    table.blocks = (elements + lanes_ - 1) / lanes_;
    auto* block_start = arena_.template allocate<int32_t>(table.blocks + 1);
    auto* mask = arena_.template allocate<A>(int64_t{table.blocks} * lanes_);
    std::memset(mask, 0, sizeof(A) * table.blocks * lanes_);
    block_start[0] = 0;
    for (int32_t block = 0; block < table.blocks; ++block) {
      int32_t longest = 0;
      for (int32_t lane = 0; lane < lanes_; ++lane) {
        const int32_t row = row_of(block * lanes_ + lane);
        if (row < 0 || start[row] == start[row + 1]) continue;
        longest = std::max(longest, start[row + 1] - start[row]);
        std::memset(mask + block * lanes_ + lane, 0xff, sizeof(A));
      }
      block_start[block + 1] = block_start[block] + longest;
    }
    const int64_t vectors = block_start[table.blocks];
    auto* base = arena_.template allocate<int32_t>(vectors);
    auto* kind = arena_.template allocate<uint8_t>(vectors);
    auto* tap_mask = arena_.template allocate<A>(vectors * lanes_);
    std::memset(tap_mask, 0, sizeof(A) * vectors * lanes_);
    auto* lane_index = arena_.template allocate<int32_t>(vectors * lanes_);
    A* numbers[3] = {};
    const A* sources[3] = {weight, slope_origin, slope_step};
    for (int32_t s = 0; s < 3; ++s) {
      if (sources[s] != nullptr) numbers[s] = arena_.template allocate<A>(vectors * lanes_);
    }
    for (int32_t block = 0; block < table.blocks; ++block) {
      for (int32_t v = block_start[block]; v < block_start[block + 1]; ++v) {
        const int32_t tap = v - block_start[block];
        int32_t low = 0, high = 0, found = 0;
        for (int32_t lane = 0; lane < lanes_; ++lane) {
          const int32_t element = block * lanes_ + lane;
          const int32_t row = row_of(element);
          const int64_t at = int64_t{v} * lanes_ + lane;
          lane_index[at] = -1;
          for (A* number : numbers) {
            if (number != nullptr) number[at] = A(0);
          }
          if (row < 0 || tap >= start[row + 1] - start[row]) continue;
          const int32_t own = start[row] + tap;
          lane_index[at] = index[own] * interleave + (element - before) % interleave - origin;
          for (int32_t s = 0; s < 3; ++s) {
            if (numbers[s] != nullptr) numbers[s][at] = sources[s][own];
          }
          std::memset(tap_mask + at, 0xff, sizeof(A));
          low = found == 0 ? lane_index[at] : std::min(low, lane_index[at]);
          high = found == 0 ? lane_index[at] : std::max(high, lane_index[at]);
          ++found;
        }
        base[v] = low;
        kind[v] = (high - low >= 2 * lanes_ ? LaneTable<A>::kFar : 0) |
                  (found < lanes_ ? LaneTable<A>::kPartial : 0);
        for (int32_t lane = 0; lane < lanes_; ++lane) {
          int32_t& i = lane_index[int64_t{v} * lanes_ + lane];
          i = i < 0 ? 0 : i - low;
        }
      }
    }
    table.start = block_start;
    table.base = base;
    table.kind = kind;
    table.tap_mask = tap_mask;
    table.index = lane_index;
    table.weight = numbers[0];
    table.slope_origin = numbers[1];
    table.slope_step = numbers[2];
    table.row_mask = mask;
    return table;
  }

  void add_slopes(const RowBuffer<A>& buffer, Table<A>& table) {
    const int32_t taps = table.tap_end(table.end - 1);
    auto* origin = arena_.template allocate<A>(taps);
    auto* step = arena_.template allocate<A>(taps);
    for (int32_t row = table.first; row < table.end; ++row) {
      // A tap that pads a row has no slope of its own.
      const int32_t from = buffer.start[row], count = buffer.start[row + 1] - from;
      const int32_t to = table.tap_begin(row), padded = table.tap_end(row) - to;
      std::copy_n(buffer.slope_origin.data() + from, count, origin + to);
      std::copy_n(buffer.slope_step.data() + from, count, step + to);
      std::fill_n(origin + to + count, padded - count, A(0));
      std::fill_n(step + to + count, padded - count, A(0));
    }
    table.slope_origin = origin;
    table.slope_step = step;
  }

  /// Sorts the taps of `buffer` by pixel - first, cells ascending within a pixel.
  void sort_by_pixel(const RowBuffer<A>& buffer, int32_t first, int32_t count) {
    start_.assign(static_cast<size_t>(count) + 1, 0);
    for (const int32_t pixel : buffer.pixels) ++start_[pixel - first + 1];
    for (int32_t i = 0; i < count; ++i) start_[i + 1] += start_[i];
    next_.assign(start_.begin(), start_.end() - 1);
    cell_.resize(buffer.pixels.size());
    weight_.resize(buffer.pixels.size());
    slope_origin_.resize(buffer.pixels.size());
    slope_step_.resize(buffer.pixels.size());
    for (int32_t cell = 0; cell < buffer.cells(); ++cell) {
      for (int32_t tap = buffer.start[cell]; tap < buffer.start[cell + 1]; ++tap) {
        const int32_t at = next_[buffer.pixels[tap] - first]++;
        cell_[at] = cell;
        weight_[at] = buffer.weight[tap];
        slope_origin_[at] = buffer.slope_origin[tap];
        slope_step_[at] = buffer.slope_step[tap];
      }
    }
  }

  /// The transpose, with a row for each touched pixel only.
  Table<A> transposed(const RowBuffer<A>& buffer, bool pad) {
    const int32_t count = buffer.high - buffer.low + 1;
    sort_by_pixel(buffer, buffer.low, count);
    targets_.clear();
    next_.clear();
    for (int32_t i = 0; i < count; ++i) {
      if (start_[i] == start_[i + 1]) continue;
      targets_.push_back(buffer.low + i);
      next_.push_back(start_[i]);
    }
    next_.push_back(start_[count]);
    const int32_t rows = static_cast<int32_t>(targets_.size());
    Table<A> table = make_table(next_.data(), 0, rows, cell_.data(), weight_.data(), 0,
                                pad ? Padding::kZeroSlot : Padding::kNone, buffer.cells(), arena_);
    auto* target = arena_.template allocate<int32_t>(rows);
    std::copy(targets_.begin(), targets_.end(), target);
    table.target = target;
    return table;
  }

  /// The transpose, with a row for each column of the window.
  Table<A> transposed_window(const BoxPlan<A>& plan) {
    const int32_t count = plan.vectors * lanes_;
    sort_by_pixel(columns_, plan.first_column, count);
    return make_table(start_.data(), 0, count, cell_.data(), weight_.data(), 0, Padding::kZeroSlot,
                      columns_.cells(), arena_);
  }

  const A* column_mask(const BoxPlan<A>& plan) {
    const int32_t count = plan.vectors * lanes_;
    auto* mask = arena_.template allocate<A>(count);
    std::memset(mask, 0, sizeof(A) * count);
    for (const int32_t pixel : columns_.pixels) {
      std::memset(mask + (pixel - plan.first_column), 0xff, sizeof(A));
    }
    return mask;
  }

  /// Renames the columns of plan.x to their places in plan.x_transposed.
  void index_by_slot(BoxPlan<A>& plan) {
    const Table<A>& columns = plan.x_transposed;
    const int32_t taps = columns_.taps();
    auto* slot = arena_.template allocate<int32_t>(taps);
    for (int32_t i = 0; i < taps; ++i) {
      const int32_t* end = columns.target + columns.end;
      slot[i] = static_cast<int32_t>(std::lower_bound(columns.target, end, columns_.pixels[i]) -
                                     columns.target);
    }
    plan.x.index = slot;
  }

  const Problem& problem_;
  const Purpose purpose_;
  const int32_t lanes_, sources_;
  Arena& arena_;
  RowBuffer<A> rows_, columns_;
  std::vector<int32_t> start_, next_, cell_, targets_;
  std::vector<A> weight_, slope_origin_, slope_step_;
};

}  // namespace

template <class A>
PlanSet<A>::PlanSet(const Problem& problem, Purpose purpose, int64_t first, int64_t end,
                    int32_t lanes, int32_t sources)
    : boxes_(static_cast<size_t>(end - first)) {
  const int64_t count = end - first;
  constexpr int64_t kGrain = 64;
  arenas_.resize(static_cast<size_t>((count + kGrain - 1) / kGrain));
  parallel_for(0, static_cast<int64_t>(arenas_.size()), 1, [&](int64_t begin, int64_t stop) {
    for (int64_t part = begin; part < stop; ++part) {
      Planner<A> planner(problem, purpose, lanes, sources, arenas_[part]);
      for (int64_t i = part * kGrain; i < std::min(count, (part + 1) * kGrain); ++i) {
        planner.plan(first + i, boxes_[i]);
      }
    }
  });

  order_.reserve(boxes_.size());
  for (const BoxPlan<A>& plan : boxes_) order_.push_back(&plan);
  const auto key_less = [](const BoxPlan<A>* a, const BoxPlan<A>* b) {
    if (a->empty != b->empty) return b->empty;
    if (a->empty) return false;
    if (a->level != b->level) return a->level < b->level;
    return a->image < b->image;
  };
  if (!std::is_sorted(order_.begin(), order_.end(), key_less)) {
    std::stable_sort(order_.begin(), order_.end(), key_less);
  }
  for (int64_t i = 0; i < count; ++i) {
    const BoxPlan<A>& plan = *order_[i];
    if (i == 0 || key_less(order_[i - 1], order_[i])) {
      groups_.push_back({i, i, plan.empty ? -1 : plan.level, plan.empty ? 0 : plan.image});
    }
    groups_.back().end = i + 1;
    if (plan.empty) continue;
    if (plan.narrow) {
      max_narrow_vectors_ = std::max(max_narrow_vectors_, plan.vectors);
    } else if (plan.planar) {
      max_planar_vectors_ = std::max(max_planar_vectors_, plan.vectors);
    } else if (!plan.direct) {
      max_vectors_ = std::max(max_vectors_, plan.vectors);
      max_slots_ = std::max(max_slots_, plan.slots);
    }
  }
}

template class PlanSet<float>;
template class PlanSet<double>;

}  // namespace glimpse
