// SPDX-License-Identifier: BSD-3-Clause
/// CUDA without a GPU: cuda/device.cuh includes this header when GLIMPSE_EMULATED is defined, and
/// the kernel sources then compile as plain C++. The engine is in cuda_emulation.cpp.
///
/// Every CUDA thread runs on a fiber until it reaches a barrier or a warp collective, where it
/// waits for the others; blocks run one after another. What a GPU leaves open is made hostile:
///
///   order of threads and blocks   random, a different one for every set_seed
///   shared memory                 poisoned before every block, guarded behind its end
///   asynchronous copies           the target is poisoned at once, the data lands at the wait
///
/// and what a GPU leaves undefined throws EmulationError, which names the launch, the block and the
/// threads: a barrier that some threads never reach, threads at different barriers, collectives of
/// part of a warp, misaligned vector loads. An exception out of a kernel is reported the same way.
///
/// Not covered: relaxed memory between blocks, speed, fused multiply-adds, limits of one device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define GLIMPSE_GRID_CONSTANT const
#define GLIMPSE_UNROLL

#define GLIMPSE_SHARED(type, name, dimensions)                             \
  auto& name = ::glimpse::emulation::shared_variable<type dimensions>([] { \
    static const char tag = 0;                                             \
    return &tag;                                                           \
  }())

#define GLIMPSE_DYNAMIC_SHARED(name) char* const name = ::glimpse::emulation::dynamic_shared()

#define GLIMPSE_ASSERT(condition)     \
  ((condition) ? static_cast<void>(0) \
               : ::glimpse::emulation::fail("assertion failed: " #condition, __FILE__, __LINE__))

// ------------------------------------------------------------------------------------ CUDA's types

/// Remembers where it was made: a grid is how an error knows its launch.
struct dim3 {
  unsigned x, y, z;
  const char* file;
  int line;

  // Implicit, as in CUDA.
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1, const char* file = __builtin_FILE(),
       int line = __builtin_LINE())
      : x(x), y(y), z(z), file(file), line(line) {}
};

// Kernels view arrays of numbers as vectors, which C++ allows only with may_alias.
#define GLIMPSE_VECTOR2(name, scalar)                          \
  struct [[gnu::may_alias]] alignas(2 * sizeof(scalar)) name { \
    scalar x, y;                                               \
  };                                                           \
  inline name make_##name(scalar x, scalar y) { return {x, y}; }
#define GLIMPSE_VECTOR4(name, scalar)                          \
  struct [[gnu::may_alias]] alignas(4 * sizeof(scalar)) name { \
    scalar x, y, z, w;                                         \
  };                                                           \
  inline name make_##name(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
GLIMPSE_VECTOR2(float2, float)
GLIMPSE_VECTOR2(double2, double)
GLIMPSE_VECTOR2(int2, int)
GLIMPSE_VECTOR2(uint2, unsigned)
GLIMPSE_VECTOR2(short2, short)
GLIMPSE_VECTOR2(ushort2, unsigned short)
GLIMPSE_VECTOR4(float4, float)
GLIMPSE_VECTOR4(int4, int)
GLIMPSE_VECTOR4(uint4, unsigned)
GLIMPSE_VECTOR4(short4, short)
GLIMPSE_VECTOR4(ushort4, unsigned short)
#undef GLIMPSE_VECTOR2
#undef GLIMPSE_VECTOR4

namespace glimpse::emulation {

// ------------------------------------------------------------------------------ control, for tests

/// What is undefined on a GPU, or an exception that left a kernel.
class EmulationError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The order in which threads and blocks run, from the next launch on. Seed 0 is the natural order,
/// even seeds mix all threads, odd ones let single warps run ahead. Shared memory is poisoned with
/// NaN for seeds 0 and 1, with large numbers for 2 and 3, and so on in turn.
void set_seed(uint64_t seed);
uint64_t seed();

/// A barrier, a commit or a wait of an asynchronous copy, or a warp collective in a kernel source.
struct Site {
  std::string name;  // "csrc/cuda/forward.cu:120"
  std::string call;  // "__syncthreads"
  uint64_t reached;  // by single threads, since the program started
};

/// Every site that a thread has reached, sorted by name.
std::vector<Site> reached_sites();

/// Turn the barrier, commit or wait at this site into nothing ("" for none) and return the site
/// that was skipped before. Collectives that give a value stay. The environment variable
/// GLIMPSE_MUTATE is the initial value, and GLIMPSE_REACHED_SITES names a file to which
/// reached_sites() is appended when the program ends.
std::string skip_site(const std::string& name);

/// One launch as its kernel would get it: parameter i has size[i] bytes, aligned to alignment[i].
struct KernelLaunch {
  const void* kernel;
  unsigned grid[3];
  unsigned block;
  uint64_t shared_bytes;
  uint64_t parameters;
  const void* const* parameter;
  const uint64_t* size;
  const uint64_t* alignment;
};

/// Hands every launch from now on to `launcher` instead of running it here; nullptr ends that. It
/// returns what went wrong, or nullptr. benchmarks/gpu_model.py runs the machine code this way.
using Launcher = const char* (*)(const KernelLaunch* launch);
void set_launcher(Launcher launcher);
Launcher launcher();

/// Fill memory with NaN (in every floating-point type of this package).
void poison(void* memory, std::size_t bytes);

// --------------------------------------------------------------- what the kernels' names stand for

enum class Call : uint8_t {
  kSyncThreads,
  kSyncWarp,
  kBallot,
  kShuffle,
  kShuffleDown,
  kShuffleXor,
  kCopyCommit,
  kCopyWait,
  kCopyWaitAll,
};

struct Index {
  unsigned x, y, z;
};

/// The running thread's own indices: the engine writes them whenever another thread continues.
extern Index thread_index, block_index;
extern Index block_size, grid_size;

[[noreturn]] void fail(const std::string& what, const char* file, int line);

void sync_threads(const char* file, int line);

/// Wait for all 32 lanes. The result holds what each lane has given, until this lane's next
/// collective.
const uint64_t* exchange(Call call, uint64_t value, unsigned mask, const char* file, int line);

void copy_async(void* shared, const void* global, unsigned bytes, const char* file, int line);
void copy_commit(const char* file, int line);
/// Lands every group but the newest `pending`; kCopyWaitAll also lands what is in no group.
void copy_wait(Call call, std::size_t pending, const char* file, int line);

char* dynamic_shared();
void* shared_variable(const void* tag, std::size_t bytes, std::size_t alignment);

/// One variable per tag and block.
template <class T>
T& shared_variable(const void* tag) {
  static_assert(std::is_trivial<T>::value, "a shared variable has no constructor");
  return *static_cast<T*>(shared_variable(tag, sizeof(T), alignof(T)));
}

/// Runs `body(context)` once per thread of the grid; serialises callers.
void run(const dim3& grid, unsigned block, std::size_t shared_bytes, void (*body)(void*),
         void* context);

template <class T>
T shuffle(Call call, T value, int source_lane, unsigned mask, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value,
                "a lane exchanges at most 8 bytes");
  uint64_t given = 0;
  std::memcpy(&given, &value, sizeof(T));
  const uint64_t* lanes = exchange(call, given, mask, file, line);
  T taken;
  std::memcpy(&taken, &lanes[source_lane], sizeof(T));
  return taken;
}

inline int lane() { return static_cast<int>(thread_index.x & 31u); }

}  // namespace glimpse::emulation

#define threadIdx (::glimpse::emulation::thread_index)
#define blockIdx (::glimpse::emulation::block_index)
#define blockDim (::glimpse::emulation::block_size)
#define gridDim (::glimpse::emulation::grid_size)

// The default arguments are the place of the call: it identifies the site.

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ::glimpse::emulation::sync_threads(file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  using namespace ::glimpse::emulation;
  exchange(Call::kSyncWarp, 0, mask, file, line);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  using namespace ::glimpse::emulation;
  const uint64_t* lanes = exchange(Call::kBallot, predicate ? 1 : 0, mask, file, line);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(lanes[i]) << i;
  return ballot;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  using namespace ::glimpse::emulation;
  return shuffle(Call::kShuffle, value, source_lane & 31, mask, file, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  using namespace ::glimpse::emulation;
  // Lanes without a partner keep their own value.
  const int source = lane() + static_cast<int>(delta);
  return shuffle(Call::kShuffleDown, value, source < 32 ? source : lane(), mask, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  using namespace ::glimpse::emulation;
  return shuffle(Call::kShuffleXor, value, (lane() ^ lane_mask) & 31, mask, file, line);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

namespace glimpse::cuda {

using Stream = void*;

template <class T>
T load_readonly(const T* source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "1 to 16 bytes");
  if (reinterpret_cast<uintptr_t>(source) % sizeof(T) != 0) {
    emulation::fail("load_readonly: the address is not aligned to the " +
                        std::to_string(sizeof(T)) + " bytes that it reads",
                    file, line);
  }
  T value;
  std::memcpy(&value, source, sizeof(T));
  return value;
}

inline void copy_async4(void* shared, const void* global, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  emulation::copy_async(shared, global, 4, file, line);
}
inline void copy_async16(void* shared, const void* global, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emulation::copy_async(shared, global, 16, file, line);
}
inline void copy_async_commit(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::copy_commit(file, line);
}
template <int kPending>
void copy_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::copy_wait(emulation::Call::kCopyWait, kPending, file, line);
}
inline void copy_async_wait_all(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::copy_wait(emulation::Call::kCopyWaitAll, 0, file, line);
}

/// As in device.cuh; returns when the grid has finished. Every thread gets its own copy of the
/// arguments.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const dim3& grid, unsigned block,
            std::size_t shared_bytes, Stream /*stream*/, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument per parameter");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  struct Launch {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  Launch launch{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  if (const emulation::Launcher launcher = emulation::launcher()) {
    constexpr std::size_t kCount = sizeof...(Parameters);
    const void* parameter[kCount + 1] = {};
    std::size_t next = 0;
    std::apply([&](const auto&... value) { ((parameter[next++] = &value), ...); },
               launch.parameters);
    const uint64_t size[] = {sizeof(Parameters)..., 0};
    const uint64_t alignment[] = {alignof(Parameters)..., 0};
    const emulation::KernelLaunch described{reinterpret_cast<const void*>(kernel),
                                            {grid.x, grid.y, grid.z},
                                            block,
                                            shared_bytes,
                                            kCount,
                                            parameter,
                                            size,
                                            alignment};
    if (const char* wrong = launcher(&described)) throw emulation::EmulationError(wrong);
    return;
  }
  emulation::run(
      grid, block, shared_bytes,
      [](void* context) {
        const auto* launch = static_cast<const Launch*>(context);
        std::apply(launch->kernel, launch->parameters);
      },
      &launch);
}

}  // namespace glimpse::cuda
