// SPDX-License-Identifier: BSD-3-Clause
#ifndef GLIMPSE_EMULATED
#define GLIMPSE_EMULATED 1
#endif
#include "testing/cuda_races.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace glimpse::emulation::races {

Clock now;

namespace {

thread_local bool launching = false;

constexpr uint32_t kNobody = ~0u;
constexpr uint32_t kSeveral = ~0u - 1;  // reads only: several threads of one warp in one phase
constexpr uint32_t kWarp = 32;

struct Access {
  uint32_t launch = 0;
  uint32_t block = 0;
  uint32_t thread = kNobody;
  uint32_t block_phase = 0;
  uint32_t warp_phase = 0;
  uint32_t warp = 0;
};

struct Cell {
  Access write;
  Access read;                 // the latest
  bool several_warps = false;  // read has company from other warps of the same block phase
};

/// Whether nothing orders `before` and the running thread, which is another one of the same block.
bool unordered_in_block(const Access& before) {
  if (before.thread == kNobody || before.launch != now.launch) return false;
  if (before.thread == now.thread || before.block_phase != now.block_phase) return false;
  return before.warp != now.thread / kWarp || before.warp_phase == now.warp_phase;
}

bool unordered(const Access& before) {
  if (before.thread == kNobody || before.launch != now.launch) return false;
  return before.block != now.block || unordered_in_block(before);
}

Access here() {
  return {now.launch, now.block, now.thread, now.block_phase, now.warp_phase, now.thread / kWarp};
}

class Watch {
 public:
  bool enabled = kCompiledIn;

  void begin_launch() {
    ++now.launch;
    if (pages_.size() > kMostPages) {
      pages_.clear();
      last_page_number_ = ~uintptr_t{0};
    }
  }

  void watch_shared(const void* begin, std::size_t bytes) {
    shared_begin_ = address(begin);
    shared_.assign(bytes, Cell{});
  }

  void access(const void* memory, std::size_t bytes, bool write, const void* code) {
    if (!enabled || !report_.empty()) return;
    const uintptr_t first = address(memory);
    if (first - shared_begin_ < shared_.size()) {
      for (std::size_t i = 0; i < bytes && first - shared_begin_ + i < shared_.size(); ++i) {
        if (shared(shared_[first - shared_begin_ + i], write)) {
          return report("shared memory", first - shared_begin_ + i, write, code);
        }
      }
      return;
    }
    if (first - address(now.stack) < now.stack_bytes) return;
    for (uintptr_t at = first / kGranule; at <= (first + bytes - 1) / kGranule; ++at) {
      Page* page = find_page(at / kPageCells, write);
      if (page == nullptr) continue;
      Access& last = (*page)[at % kPageCells];
      if (unordered(last)) {
        other_ = last.thread;
        other_block_ = last.block;
        other_wrote_ = true;
        return report("global memory", at * kGranule, write, code);
      }
      if (write) last = here();
    }
  }

  std::string take_report() {
    std::string text;
    text.swap(report_);
    return text;
  }

 private:
  // Elements of global memory have at least two bytes, except uint8, which is only read.
  static constexpr uintptr_t kGranule = 2;
  static constexpr uintptr_t kPageCells = 2048;
  static constexpr std::size_t kMostPages = 4096;  // that are kept from launch to launch
  using Page = std::array<Access, kPageCells>;

  static uintptr_t address(const void* memory) { return reinterpret_cast<uintptr_t>(memory); }

  /// True for a race.
  bool shared(Cell& cell, bool write) {
    const bool races_with_write = unordered_in_block(cell.write);
    const bool races_with_read = write && reads_race(cell);
    if (races_with_write || races_with_read) {
      const Access& other = races_with_write ? cell.write : cell.read;
      other_ = other.thread;
      other_block_ = other.block;
      other_wrote_ = races_with_write;
      return true;
    }
    if (write) {
      cell.write = here();
      cell.read.thread = kNobody;
      cell.several_warps = false;
      return false;
    }
    Access& read = cell.read;
    const uint32_t warp = now.thread / kWarp;
    const bool same_phase =
        read.thread != kNobody && read.launch == now.launch && read.block_phase == now.block_phase;
    if (same_phase && (cell.several_warps || read.warp != warp)) {
      cell.several_warps = true;
    } else if (same_phase && read.warp_phase == now.warp_phase && read.thread != now.thread) {
      read.thread = kSeveral;
    } else {
      read = here();
      cell.several_warps = false;
    }
    return false;
  }

  static bool reads_race(const Cell& cell) {
    if (cell.several_warps) {
      return cell.read.launch == now.launch && cell.read.block_phase == now.block_phase;
    }
    return unordered_in_block(cell.read);
  }

  Page* find_page(uintptr_t number, bool create) {
    if (number == last_page_number_) return last_page_;
    auto found = pages_.find(number);
    if (found == pages_.end()) {
      if (!create) return nullptr;
      found = pages_.emplace(number, std::make_unique<Page>()).first;
    }
    last_page_number_ = number;
    last_page_ = found->second.get();
    return last_page_;
  }

  void report(const char* kind, uintptr_t where, bool write, const void* code) {
    const std::string who =
        other_ == kSeveral ? "several threads" : "thread " + std::to_string(other_);
    const std::string block =
        other_block_ == now.block ? "" : " of block number " + std::to_string(other_block_);
    char place[64];
    std::snprintf(place, sizeof(place), "%#llx", static_cast<unsigned long long>(where));
    report_ = std::string("race on ") + kind + " at " + place + ": thread " +
              std::to_string(now.thread) + (write ? " writes" : " reads") + " what " + who + block +
              (other_wrote_ ? " wrote" : " read") + " with no barrier between them";
    Dl_info info;
    if (code != nullptr && dladdr(code, &info) != 0) {
      std::snprintf(place, sizeof(place), "%#llx",
                    static_cast<unsigned long long>(address(code) - address(info.dli_fbase)) - 1);
      report_ += std::string(" (addr2line -Cfie ") + info.dli_fname + " " + place + ")";
    }
  }

  uintptr_t shared_begin_ = 0;
  std::vector<Cell> shared_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_page_number_ = ~uintptr_t{0};
  Page* last_page_ = nullptr;
  std::string report_;
  uint32_t other_ = kNobody, other_block_ = 0;
  bool other_wrote_ = false;
};

Watch& watch() {
  static Watch one;
  return one;
}

}  // namespace

Launch::Launch() {
  watch().begin_launch();
  launching = true;
}

Launch::~Launch() { launching = false; }

void watch_shared(const void* begin, std::size_t bytes) { watch().watch_shared(begin, bytes); }

void access(const void* memory, std::size_t bytes, bool write) {
  watch().access(memory, bytes, write, nullptr);
}

std::string take_report() { return watch().take_report(); }

bool enable(bool on) { return std::exchange(watch().enabled, on && kCompiledIn); }

}  // namespace glimpse::emulation::races

#if defined(GLIMPSE_RACE_CHECK)

// What gcc and clang call under -fsanitize=thread.
namespace {
void note(const void* memory, std::size_t bytes, bool write, const void* code) {
  using namespace glimpse::emulation::races;
  if (launching) watch().access(memory, bytes, write, code);
}
}  // namespace

#define GLIMPSE_TSAN_ACCESS(prefix, bytes)              \
  void __tsan_##prefix##read##bytes(void* p) {          \
    note(p, bytes, false, __builtin_return_address(0)); \
  }                                                     \
  void __tsan_##prefix##write##bytes(void* p) { note(p, bytes, true, __builtin_return_address(0)); }
#define GLIMPSE_TSAN_ACCESSES(prefix) \
  GLIMPSE_TSAN_ACCESS(prefix, 1)      \
  GLIMPSE_TSAN_ACCESS(prefix, 2)      \
  GLIMPSE_TSAN_ACCESS(prefix, 4)      \
  GLIMPSE_TSAN_ACCESS(prefix, 8)      \
  GLIMPSE_TSAN_ACCESS(prefix, 16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, std::size_t n) { note(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, std::size_t n) { note(p, n, true, __builtin_return_address(0)); }
GLIMPSE_TSAN_ACCESSES()
GLIMPSE_TSAN_ACCESSES(volatile_)
GLIMPSE_TSAN_ACCESSES(unaligned_)
// Guards of static variables.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}

#endif
