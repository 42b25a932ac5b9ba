// SPDX-License-Identifier: BSD-3-Clause
/// The engine of the CUDA emulation: fibers, their scheduler, barriers, warp collectives, shared
/// memory, asynchronous copies and the sites that mutation testing switches off.
///
/// Note [Threads and fibers]
/// A Thread is one CUDA thread of the running block; a Fiber is a stack. A thread that has never
/// run has no fiber, and a fiber whose thread returned takes the next new thread in a loop. So a
/// kernel without barriers runs on a single warm stack, and starting a thread costs no switch. A
/// thread that has to wait continues another one directly; the launcher only runs between blocks
/// and when nothing can continue, which is how a deadlock is seen.

#ifndef GLIMPSE_EMULATED
#define GLIMPSE_EMULATED 1
#endif
#include "testing/cuda_emulation.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "testing/cuda_races.h"

#if defined(__SANITIZE_ADDRESS__)
#define GLIMPSE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GLIMPSE_ASAN 1
#endif
#endif
#if defined(GLIMPSE_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// -------------------------------------------------------------------------------- switching stacks

#if defined(__x86_64__) && !defined(GLIMPSE_EMULATION_UCONTEXT)
// Saves the callee-saved registers on the running stack and continues on another one. The floating
// point control words are the same everywhere, so they are not saved.
extern "C" void glimpse_emulation_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.type glimpse_emulation_switch, @function
.hidden glimpse_emulation_switch
.globl glimpse_emulation_switch
glimpse_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size glimpse_emulation_switch, .-glimpse_emulation_switch
)");
#else
#include <ucontext.h>
#define GLIMPSE_EMULATION_UCONTEXT 1
#endif

namespace glimpse::emulation {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStackBytes = 512 * 1024;  // committed page by page
constexpr unsigned kMaxThreads = 1024;           // of a block
constexpr unsigned kWarp = 32;
constexpr std::size_t kMaxSharedBytes = 227 * 1024;     // of a block, on the largest device
constexpr std::size_t kDefaultSharedBytes = 48 * 1024;  // of a block that does not ask for more
constexpr std::size_t kGuardBytes = 64;                 // behind each piece of shared memory
constexpr unsigned char kGuard = 0xA5;

void entry();

/// A stack and where it stopped. The launcher's own stack is one, too.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (memory_ != nullptr) munmap(memory_, kStackBytes);
  }

  /// A fiber that begins in entry() when it first runs.
  static std::unique_ptr<Fiber> create() {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    fiber->memory_ = memory;
    // The lowest page faults, so a stack overflow does not run into a neighbour.
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mprotect(memory, page, PROT_NONE);
    fiber->bottom_ = static_cast<char*>(memory) + page;
    fiber->bytes_ = kStackBytes - page;
#if defined(GLIMPSE_EMULATION_UCONTEXT)
    getcontext(&fiber->context_);
    fiber->context_.uc_stack.ss_sp = const_cast<void*>(fiber->bottom_);
    fiber->context_.uc_stack.ss_size = fiber->bytes_;
    fiber->context_.uc_link = nullptr;
    makecontext(&fiber->context_, entry, 0);
#else
    // As if entry() had been called: its own return address is zero, which ends stack traces, and
    // below wait its address and six registers for the switch to pop.
    auto** top = reinterpret_cast<void**>(static_cast<char*>(memory) + page + fiber->bytes_);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber->stack_pointer_ = top;
#endif
    return fiber;
  }

  const void* bottom() const { return bottom_; }
  std::size_t bytes() const { return bytes_; }

  /// Stops here and continues `next`; returns when something continues this fiber.
  void switch_to(Fiber& next) {
    previous_ = this;
#if defined(GLIMPSE_ASAN)
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
#endif
#if defined(GLIMPSE_EMULATION_UCONTEXT)
    swapcontext(&context_, &next.context_);
#else
    glimpse_emulation_switch(&stack_pointer_, next.stack_pointer_);
#endif
    arrived();
  }

  /// The first thing that runs on this fiber after a switch.
  void arrived() {
#if defined(GLIMPSE_ASAN)
    // Leaving the launcher's stack is the only way to learn where it is.
    __sanitizer_finish_switch_fiber(fake_stack_, &previous_->bottom_, &previous_->bytes_);
#endif
  }

 private:
  static inline Fiber* previous_ = nullptr;
  void* memory_ = nullptr;  // null for the launcher's stack
  const void* bottom_ = nullptr;
  std::size_t bytes_ = 0;
#if defined(GLIMPSE_EMULATION_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(GLIMPSE_ASAN)
  void* fake_stack_ = nullptr;
#endif
};

// ------------------------------------------------------------------------------------------- sites

const char* name_of(Call call) {
  switch (call) {
    case Call::kSyncThreads:
      return "__syncthreads";
    case Call::kSyncWarp:
      return "__syncwarp";
    case Call::kBallot:
      return "__ballot_sync";
    case Call::kShuffle:
      return "__shfl_sync";
    case Call::kShuffleDown:
      return "__shfl_down_sync";
    case Call::kShuffleXor:
      return "__shfl_xor_sync";
    case Call::kCopyCommit:
      return "copy_async_commit";
    case Call::kCopyWait:
      return "copy_async_wait";
    case Call::kCopyWaitAll:
      return "copy_async_wait_all";
  }
  return "?";
}

/// "csrc/cuda/forward.cu:120", wherever the sources lie.
std::string place(const char* file, int line) {
  std::string name = file;
  const std::size_t root = name.rfind("csrc/");
  const std::size_t slash = name.rfind('/');
  if (root != std::string::npos) {
    name = name.substr(root);
  } else if (slash != std::string::npos) {
    name = name.substr(slash + 1);
  }
  return name + ":" + std::to_string(line);
}

struct SiteState {
  std::string name;
  Call call;
  uint64_t reached = 0;
  bool skipped = false;
};

class Sites {
 public:
  Sites() {
    if (const char* name = std::getenv("GLIMPSE_MUTATE")) skipped_ = name;
    if (const char* path = std::getenv("GLIMPSE_REACHED_SITES")) report_ = path;
  }

  ~Sites() {
    if (report_.empty()) return;
    if (std::FILE* file = std::fopen(report_.c_str(), "a")) {
      for (const Site& site : list()) {
        std::fprintf(file, "%s %s %llu\n", site.name.c_str(), site.call.c_str(),
                     static_cast<unsigned long long>(site.reached));
      }
      std::fclose(file);
    }
  }

  /// Called for every barrier of every thread: a direct-mapped table finds the site without
  /// looking at the name.
  SiteState& at(Call call, const char* file, int line) {
    const auto key = reinterpret_cast<uintptr_t>(file) * 31 + static_cast<unsigned>(line) * 4 +
                     static_cast<unsigned>(call);
    Entry& entry = recent_[key % kRecent];
    if (entry.file != file || entry.line != line || entry.call != call) {
      entry = {file, line, call, &find(call, file, line)};
    }
    ++entry.site->reached;
    return *entry.site;
  }

  std::string skip(const std::string& name) {
    const std::string before = std::exchange(skipped_, name);
    for (auto& [key, site] : sites_) site.skipped = is_skipped(site);
    return before;
  }

  std::vector<Site> list() const {
    std::vector<Site> sites;
    for (const auto& [key, site] : sites_) {
      sites.push_back({site.name, name_of(site.call), site.reached});
    }
    return sites;
  }

 private:
  struct Entry {
    const char* file = nullptr;
    int line = 0;
    Call call{};
    SiteState* site = nullptr;
  };
  static constexpr std::size_t kRecent = 256;

  SiteState& find(Call call, const char* file, int line) {
    SiteState& site = sites_[{place(file, line), call}];
    if (site.name.empty()) {
      site.name = place(file, line);
      site.call = call;
      site.skipped = is_skipped(site);
    }
    return site;
  }

  bool is_skipped(const SiteState& site) const {
    const bool gives_value = site.call == Call::kBallot || site.call == Call::kShuffle ||
                             site.call == Call::kShuffleDown || site.call == Call::kShuffleXor;
    return !gives_value && site.name == skipped_;
  }

  std::map<std::pair<std::string, Call>, SiteState> sites_;
  Entry recent_[kRecent];
  std::string skipped_;
  std::string report_;
};

Sites& sites() {
  static Sites all;
  return all;
}

// ----------------------------------------------------------------------------------------- threads

/// A copy that has been started. The source is read when it starts, so that a bad address is found
/// at the call that names it.
struct Copy {
  void* target;
  unsigned bytes;
  unsigned char data[16];
};

struct Thread {
  Fiber* fiber = nullptr;  // null before it has run and after it has returned
  const SiteState* waits_at = nullptr;
  bool returned = false;
  std::vector<Copy> copies;         // started and not landed, oldest first
  std::vector<std::size_t> groups;  // copies up to here belong to group i
};

struct Warp {
  unsigned arrived = 0;
  const SiteState* site = nullptr;
  unsigned generation = 0;
  // Lanes read the values of one collective while others already give those of the next.
  uint64_t values[2][kWarp];
  uint32_t phase = 0;  // see Note [Races]
};

/// Thrown into waiting threads to unwind them after a failure elsewhere.
struct Cancelled {};

/// Note [Order of threads]
/// Seed 0 is first in, first out. Even seeds draw among all threads that can run, so that threads
/// meet in every constellation, but none gets far ahead of the others. Odd seeds draw an order of
/// the warps for each block and always continue the first one that can run: it goes as far as
/// barriers let it before the next one starts, as a warp can whose neighbours wait for memory.
class ReadyList {
 public:
  void begin_block(uint64_t seed, unsigned threads, uint64_t draw) {
    mode_ = seed == 0 ? Mode::kInOrder : seed % 2 == 0 ? Mode::kAnyThread : Mode::kWarpFirst;
    head_ = size_ = 0;
    warps_ready_ = 0;
    const unsigned warps = (threads + kWarp - 1) / kWarp;
    for (unsigned i = 0; i < warps; ++i) {
      lanes_ready_[i] = 0;
      const auto place = static_cast<unsigned>(draw % (i + 1));
      draw = draw * 0x9e3779b97f4a7c15ull >> 3;
      warp_at_[i] = warp_at_[place];
      warp_at_[place] = i;
    }
    for (unsigned i = 0; i < warps; ++i) place_of_[warp_at_[i]] = i;
  }

  bool empty() const { return size_ == 0; }

  void push(unsigned thread) {
    if (mode_ == Mode::kWarpFirst) {
      lanes_ready_[thread / kWarp] |= 1u << thread % kWarp;
      warps_ready_ |= 1u << place_of_[thread / kWarp];
    } else {
      ring_[(head_ + size_) % kMaxThreads] = thread;
    }
    ++size_;
  }

  unsigned pop(uint64_t draw) {
    --size_;
    if (mode_ == Mode::kWarpFirst) {
      const auto place = static_cast<unsigned>(__builtin_ctz(warps_ready_));
      const unsigned warp = warp_at_[place];
      unsigned& lanes = lanes_ready_[warp];
      const auto turn = static_cast<unsigned>(draw % kWarp);
      const unsigned turned = lanes >> turn | lanes << (kWarp - turn) % kWarp;
      const unsigned lane = (static_cast<unsigned>(__builtin_ctz(turned)) + turn) % kWarp;
      lanes &= ~(1u << lane);
      if (lanes == 0) warps_ready_ &= ~(1u << place);
      return warp * kWarp + lane;
    }
    unsigned& front = ring_[head_];
    if (mode_ == Mode::kAnyThread) {
      std::swap(front, ring_[(head_ + draw % (size_ + 1)) % kMaxThreads]);
    }
    head_ = (head_ + 1) % kMaxThreads;
    return front;
  }

 private:
  enum class Mode { kInOrder, kAnyThread, kWarpFirst };
  static constexpr unsigned kMostWarps = kMaxThreads / kWarp;
  static_assert(kMostWarps <= 32, "one bit per warp");

  Mode mode_ = Mode::kInOrder;
  unsigned size_ = 0;
  unsigned ring_[kMaxThreads];
  unsigned head_ = 0;
  unsigned warp_at_[kMostWarps], place_of_[kMostWarps];  // the order of the warps and its inverse
  unsigned warps_ready_ = 0;                             // by place
  unsigned lanes_ready_[kMostWarps];
};

/// Memory that the block shares. Each piece is followed by a guard: under AddressSanitizer any
/// access to it is reported, otherwise a write is found at the end of the block.
class SharedMemory {
 public:
  SharedMemory() {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, kBytes) != 0) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    if (races::kCompiledIn) races::watch_shared(memory_, kBytes);
  }
  ~SharedMemory() {
    protect(0, kBytes, false);
    std::free(memory_);
  }

  void begin_launch(std::size_t dynamic_bytes) {
    protect(0, end_, false);
    pieces_.clear();
    end_ = 0;
    add(nullptr, dynamic_bytes, 16);
  }

  void begin_block(unsigned char poison) {
    poison_ = poison;
    for (const Piece& piece : pieces_) std::memset(memory_ + piece.begin, poison, piece.bytes);
  }

  void* dynamic() { return memory_; }

  void* variable(const void* tag, std::size_t bytes, std::size_t alignment) {
    for (const Piece& piece : pieces_) {
      if (piece.tag == tag) return memory_ + piece.begin;
    }
    // launch() asks for more than the default by the dynamic part alone.
    const bool asked = pieces_.front().bytes > kDefaultSharedBytes;
    if (used_ + bytes > (asked ? kMaxSharedBytes : kDefaultSharedBytes)) {
      throw EmulationError(std::to_string(used_ + bytes) + " bytes of shared memory");
    }
    void* memory = add(tag, bytes, alignment);
    std::memset(memory, poison_, bytes);
    return memory;
  }

  bool contains(const void* memory, std::size_t bytes) const {
    const auto* first = static_cast<const unsigned char*>(memory);
    for (const Piece& piece : pieces_) {
      const unsigned char* begin = memory_ + piece.begin;
      if (first >= begin && first + bytes <= begin + piece.bytes) return true;
    }
    return false;
  }

  bool guards_are_intact() const {
#if !defined(GLIMPSE_ASAN)
    for (const Piece& piece : pieces_) {
      for (std::size_t i = piece.begin + piece.bytes; i < piece.end; ++i) {
        if (memory_[i] != kGuard) return false;
      }
    }
#endif
    return true;
  }

  unsigned char poison_byte() const { return poison_; }

 private:
  struct Piece {
    const void* tag;
    std::size_t begin, bytes, end;  // the guard lies between begin + bytes and end
  };
  static constexpr std::size_t kBytes = 2 * kMaxSharedBytes;

  void* add(const void* tag, std::size_t bytes, std::size_t alignment) {
    const std::size_t begin = (end_ + alignment - 1) / alignment * alignment;
    const std::size_t end = (begin + bytes + kGuardBytes + 15) / 16 * 16;
    if (end > kBytes) throw EmulationError("too many shared variables");
    used_ = (tag == nullptr ? 0 : used_) + bytes;
    std::memset(memory_ + begin + bytes, kGuard, end - begin - bytes);
    protect(begin + bytes, end, true);
    pieces_.push_back({tag, begin, bytes, end});
    end_ = end;
    return memory_ + begin;
  }

  void protect([[maybe_unused]] std::size_t begin, [[maybe_unused]] std::size_t end,
               [[maybe_unused]] bool on) {
#if defined(GLIMPSE_ASAN)
    if (on) {
      ASAN_POISON_MEMORY_REGION(memory_ + begin, end - begin);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(memory_ + begin, end - begin);
    }
#endif
  }

  unsigned char* memory_;
  std::vector<Piece> pieces_;  // the dynamic piece first
  std::size_t end_ = 0, used_ = 0;
  unsigned char poison_ = 0xff;
};

// -------------------------------------------------------------------------------------- the engine

class Engine {
 public:
  uint64_t seed = 1;

  void run(const dim3& grid, unsigned block, std::size_t shared_bytes, void (*body)(void*),
           void* context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launched_ = &grid;
    check_launch(grid, block, shared_bytes);
    threads_ = block;
    body_ = body;
    context_ = context;
    random_ = seed * 0x9e3779b97f4a7c15ull + 1;
    grid_size = {grid.x, grid.y, grid.z};
    block_size = {block, 1, 1};
    Fiber launcher;
    launcher_ = &launcher;
    shared_.begin_launch(shared_bytes);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    const BlockOrder order(blocks, seed, draw());
    const races::Launch watched;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t index = order.at(i);
      races::now.block = static_cast<uint32_t>(index);
      block_index = {static_cast<unsigned>(index % grid.x),
                     static_cast<unsigned>(index / grid.x % grid.y),
                     static_cast<unsigned>(index / grid.x / grid.y)};
      run_block();
    }
  }

  /// The life of a fiber: one thread after another.
  void live() {
    for (;;) {
      run_thread();
      if (ready_.empty() || failed_) {
        idle_.push_back(fiber_);
        continue_launcher();
      } else {
        const unsigned next = pop();
        if (thread_[next].fiber == nullptr) {
          thread_[next].fiber = fiber_;
          enter(next);
        } else {
          idle_.push_back(fiber_);
          continue_thread(next);
        }
      }
    }
  }

  void sync_threads(const char* file, int line) {
    const SiteState& site = sites().at(Call::kSyncThreads, file, line);
    if (site.skipped) return;
    if (barrier_arrived_ != 0 && barrier_site_ != &site) {
      throw EmulationError("threads of one block wait at different barriers: " +
                           describe(*barrier_site_) + " and " + describe(site));
    }
    barrier_site_ = &site;
    if (++barrier_arrived_ == threads_) {
      barrier_arrived_ = 0;
      ++races::now.block_phase;
      for (unsigned i = 0; i < threads_; ++i) ready_.push(i);
    }
    wait(site);
  }

  const uint64_t* exchange(Call call, uint64_t value, unsigned mask, const char* file, int line) {
    const SiteState& site = sites().at(call, file, line);
    if (site.skipped) return nullptr;
    if (mask != 0xffffffffu) throw EmulationError(describe(site) + ": the mask must be kFullWarp");
    Warp& warp = warp_[current_ / kWarp];
    if ((current_ | (kWarp - 1)) >= threads_) {
      throw EmulationError(describe(site) + ": the last warp of the block is not full");
    }
    if (warp.arrived != 0 && warp.site != &site) {
      throw EmulationError("lanes of one warp wait at different collectives: " +
                           describe(*warp.site) + " and " + describe(site));
    }
    warp.site = &site;
    uint64_t* values = warp.values[warp.generation % 2];
    values[current_ % kWarp] = value;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      ++warp.generation;
      if (call == Call::kSyncWarp) ++warp.phase;
      const unsigned first = current_ / kWarp * kWarp;
      for (unsigned i = 0; i < kWarp; ++i) ready_.push(first + i);
    }
    wait(site);
    return values;
  }

  void copy_async(void* target, const void* source, unsigned bytes, const char* file, int line) {
    const auto misaligned = [&](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % bytes != 0;
    };
    if (misaligned(target) || misaligned(source)) {
      fail("copy_async: both addresses must be aligned to the " + std::to_string(bytes) +
               " bytes that it copies",
           file, line);
    }
    if (!shared_.contains(target, bytes)) {
      fail("copy_async: the target is not in the block's shared memory", file, line);
    }
    Thread& thread = thread_[current_];
    Copy copy{target, bytes, {}};
    std::memcpy(copy.data, source, bytes);
    thread.copies.push_back(copy);
    // The data may land at any time from here on, so what was there is already lost.
    std::memset(target, shared_.poison_byte(), bytes);
    races::access(source, bytes, false);
    races::access(target, bytes, true);
  }

  void copy_commit(const char* file, int line) {
    if (sites().at(Call::kCopyCommit, file, line).skipped) return;
    Thread& thread = thread_[current_];
    thread.groups.push_back(thread.copies.size());
  }

  void copy_wait(Call call, std::size_t pending, const char* file, int line) {
    if (sites().at(call, file, line).skipped) return;
    Thread& thread = thread_[current_];
    if (call == Call::kCopyWaitAll) {
      thread.groups.push_back(thread.copies.size());
      pending = 0;
    }
    if (thread.groups.size() <= pending) return;
    const std::size_t done = thread.groups.size() - pending;
    const std::size_t landed = thread.groups[done - 1];
    for (std::size_t i = 0; i < landed; ++i) {
      const Copy& copy = thread.copies[i];
      std::memcpy(copy.target, copy.data, copy.bytes);
      races::access(copy.target, copy.bytes, true);
    }
    thread.copies.erase(thread.copies.begin(),
                        thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
    thread.groups.erase(thread.groups.begin(),
                        thread.groups.begin() + static_cast<std::ptrdiff_t>(done));
    for (std::size_t& end : thread.groups) end -= landed;
  }

  SharedMemory& shared() { return shared_; }

  /// The fiber that runs.
  Fiber& fiber() { return *fiber_; }

 private:
  /// Visits every block once: in order for seed 0, else from a random start with a random stride.
  class BlockOrder {
   public:
    BlockOrder(uint64_t blocks, uint64_t seed, uint64_t draw) : blocks_(blocks) {
      if (seed == 0) return;
      start_ = draw % blocks;
      stride_ = (draw >> 20) % blocks | 1;
      while (common_divisor(stride_, blocks) != 1) stride_ += 2;
    }
    uint64_t at(uint64_t i) const {
      return static_cast<uint64_t>((start_ + static_cast<__uint128_t>(stride_) * i) % blocks_);
    }

   private:
    static uint64_t common_divisor(uint64_t a, uint64_t b) {
      while (b != 0) {
        a %= b;
        std::swap(a, b);
      }
      return a;
    }
    uint64_t blocks_, start_ = 0, stride_ = 1;
  };

  void check_launch(const dim3& grid, unsigned block, std::size_t shared_bytes) const {
    if (block == 0 || block > kMaxThreads) {
      throw EmulationError(launched() + ": a block of " + std::to_string(block) + " threads");
    }
    if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) {
      throw EmulationError(launched() + ": a grid of " + std::to_string(grid.x) + "x" +
                           std::to_string(grid.y) + "x" + std::to_string(grid.z) + " blocks");
    }
    if (shared_bytes > kMaxSharedBytes) {
      throw EmulationError(launched() + ": " + std::to_string(shared_bytes) +
                           " bytes of dynamic shared memory");
    }
  }

  void run_block() {
    if (thread_.size() < threads_) thread_.resize(threads_);
    warp_.resize((threads_ + kWarp - 1) / kWarp);
    ready_.begin_block(seed, threads_, draw());
    for (unsigned i = 0; i < threads_; ++i) {
      Thread& thread = thread_[i];
      thread.waits_at = nullptr;
      thread.returned = false;
      thread.copies.clear();
      thread.groups.clear();
      ready_.push(i);
    }
    for (Warp& warp : warp_) warp.arrived = 0;
    barrier_arrived_ = 0;
    ++races::now.block_phase;
    failed_ = false;
    failure_.clear();
    shared_.begin_block(seed / 2 % 2 == 0 ? 0xff : 0xcd);

    start_or_continue(pop());

    if (!failed_) {
      const std::string stuck = stuck_threads();
      if (!stuck.empty()) {
        failed_ = true;
        failure_ = in_block() + ": some threads wait for others that never come: " + stuck;
      } else if (!shared_.guards_are_intact()) {
        failed_ = true;
        failure_ = in_block() + ": a write behind the end of shared memory";
      }
    }
    const std::string race = races::take_report();
    if (!failed_ && !race.empty()) {
      failed_ = true;
      failure_ = in_block() + ": " + race;
    }
    if (failed_) {
      // Unwinds every thread that waits, so that its stack can be used again.
      for (unsigned i = 0; i < threads_; ++i) {
        if (thread_[i].fiber != nullptr) continue_thread(i);
      }
      throw EmulationError(failure_);
    }
  }

  void run_thread() {
    const unsigned index = current_;
    try {
      body_(context_);
    } catch (const Cancelled&) {
    } catch (const std::exception& error) {
      record_failure(error.what());
    } catch (...) {
      record_failure("an exception that is no std::exception");
    }
    thread_[index].fiber = nullptr;
    thread_[index].returned = true;
  }

  void record_failure(const std::string& what) {
    if (failed_) return;
    failed_ = true;
    failure_ = in_block() + ", thread " + std::to_string(current_) + ": " + what;
  }

  /// Lets others run until someone has put this thread back on the ready list.
  void wait(const SiteState& site) {
    const unsigned self = current_;
    thread_[self].waits_at = &site;
    if (ready_.empty()) {
      continue_launcher();
    } else {
      const unsigned next = pop();
      if (next == self) {
        enter(self);
      } else {
        start_or_continue(next);
      }
    }
    if (failed_) throw Cancelled{};
    thread_[self].waits_at = nullptr;
  }

  unsigned pop() { return ready_.pop(draw()); }

  void enter(unsigned thread) {
    current_ = thread;
    thread_index.x = thread;
    fiber_ = thread_[thread].fiber;
    races::now.thread = thread;
    races::now.warp_phase = warp_[thread / kWarp].phase;
    races::now.stack = fiber_->bottom();
    races::now.stack_bytes = fiber_->bytes();
  }

  void start_or_continue(unsigned thread) {
    if (thread_[thread].fiber == nullptr) {
      if (idle_.empty()) {
        fibers_.push_back(Fiber::create());
        idle_.push_back(fibers_.back().get());
      }
      thread_[thread].fiber = idle_.back();
      idle_.pop_back();
    }
    continue_thread(thread);
  }

  void continue_thread(unsigned thread) {
    Fiber* from = fiber_ != nullptr ? fiber_ : launcher_;
    enter(thread);
    from->switch_to(*fiber_);
  }

  void continue_launcher() {
    Fiber* from = fiber_;
    fiber_ = nullptr;
    from->switch_to(*launcher_);
  }

  std::string launched() const {
    return "kernel launched at " + place(launched_->file, launched_->line);
  }

  std::string in_block() const {
    return launched() + ", block (" + std::to_string(block_index.x) + ", " +
           std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")";
  }

  static std::string describe(const SiteState& site) {
    return std::string(name_of(site.call)) + " (" + site.name + ")";
  }

  std::string state_of(const Thread& thread) const {
    if (thread.returned) return "returned";
    return thread.waits_at != nullptr ? "at " + describe(*thread.waits_at) : "not started";
  }

  /// Empty when every thread has returned; else who is where, as ranges of threads.
  std::string stuck_threads() const {
    std::string text;
    bool stuck = false;
    for (unsigned first = 0; first < threads_;) {
      const std::string state = state_of(thread_[first]);
      unsigned last = first;
      while (last + 1 < threads_ && state_of(thread_[last + 1]) == state) ++last;
      stuck = stuck || !thread_[first].returned;
      text += (text.empty() ? "threads " : "; threads ") + std::to_string(first) +
              (last > first ? "-" + std::to_string(last) : "") + " " + state;
      first = last + 1;
    }
    return stuck ? text : "";
  }

  uint64_t draw() {  // xorshift64*
    random_ ^= random_ >> 12;
    random_ ^= random_ << 25;
    random_ ^= random_ >> 27;
    return random_ * 0x2545f4914f6cdd1dull >> 16;
  }

  std::mutex mutex_;
  uint64_t random_ = 1;

  const dim3* launched_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  unsigned threads_ = 0;

  std::vector<Thread> thread_;
  std::vector<Warp> warp_;
  ReadyList ready_;
  unsigned barrier_arrived_ = 0;
  const SiteState* barrier_site_ = nullptr;
  SharedMemory shared_;

  bool failed_ = false;
  std::string failure_;

  unsigned current_ = 0;    // the running thread
  Fiber* fiber_ = nullptr;  // its fiber; null while the launcher runs
  Fiber* launcher_ = nullptr;
  std::vector<Fiber*> idle_;  // without a thread
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

Engine& engine() {
  static Engine one;
  return one;
}

/// Where every fiber begins.
void entry() {
  engine().fiber().arrived();
  engine().live();
}

}  // namespace

void set_seed(uint64_t seed) { engine().seed = seed; }

uint64_t seed() { return engine().seed; }

std::vector<Site> reached_sites() { return sites().list(); }

std::string skip_site(const std::string& name) { return sites().skip(name); }

namespace {
Launcher current_launcher = nullptr;
}  // namespace

void set_launcher(Launcher launcher) { current_launcher = launcher; }

Launcher launcher() { return current_launcher; }

void poison(void* memory, std::size_t bytes) { std::memset(memory, 0xff, bytes); }

void fail(const std::string& what, const char* file, int line) {
  throw EmulationError(what + " (" + place(file, line) + ")");
}

void sync_threads(const char* file, int line) { engine().sync_threads(file, line); }

const uint64_t* exchange(Call call, uint64_t value, unsigned mask, const char* file, int line) {
  return engine().exchange(call, value, mask, file, line);
}

void copy_async(void* shared, const void* global, unsigned bytes, const char* file, int line) {
  engine().copy_async(shared, global, bytes, file, line);
}

void copy_commit(const char* file, int line) { engine().copy_commit(file, line); }

void copy_wait(Call call, std::size_t pending, const char* file, int line) {
  engine().copy_wait(call, pending, file, line);
}

char* dynamic_shared() { return static_cast<char*>(engine().shared().dynamic()); }

void* shared_variable(const void* tag, std::size_t bytes, std::size_t alignment) {
  return engine().shared().variable(tag, bytes, alignment);
}

void run(const dim3& grid, unsigned block, std::size_t shared_bytes, void (*body)(void*),
         void* context) {
  engine().run(grid, block, shared_bytes, body, context);
}

}  // namespace glimpse::emulation
