// SPDX-License-Identifier: BSD-3-Clause
/// Data races between CUDA threads, found exactly at barrier granularity.
///
/// Note [Races]
/// With GLIMPSE_RACE_CHECK the emulated kernels are compiled with -fsanitize=thread, which makes
/// the compiler report every load and store; the functions that it calls are defined in
/// cuda_races.cpp instead of in the sanitizer's library. For each piece of memory the last write
/// and the last reads are kept with the clocks of their threads. Two accesses of different threads,
/// one of them a write, are ordered only by
///
///   __syncthreads   between threads of one block
///   __syncwarp      between threads of one warp; shuffles and ballots order no memory
///   a launch        between everything before and after it
///
/// so the order in which fibers happen to run does not matter. Shared memory is watched for both
/// kinds of races. In global memory a write is held against earlier writes and a read against
/// earlier writes, which also shows two threads that own the same output element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace glimpse::emulation::races {

#if defined(GLIMPSE_RACE_CHECK)
constexpr bool kCompiledIn = true;
#else
constexpr bool kCompiledIn = false;
#endif

/// When the running CUDA thread is. The engine keeps it up to date.
struct Clock {
  uint32_t launch = 0;
  uint32_t block = 0;
  uint32_t thread = 0;
  uint32_t block_phase = 0;     // counts __syncthreads; never the same in two blocks
  uint32_t warp_phase = 0;      // counts __syncwarp of this warp
  const void* stack = nullptr;  // the thread's own
  std::size_t stack_bytes = 0;
};
extern Clock now;

/// While one exists, accesses of this thread of the host are those of CUDA threads. What happened
/// before does not race with them.
class Launch {
 public:
  Launch();
  ~Launch();
};

/// Where the memory that the block shares is.
void watch_shared(const void* begin, std::size_t bytes);

void access(const void* memory, std::size_t bytes, bool write);

/// What was found since the last call, or "".
std::string take_report();

/// Turns the check off for kernels that race on purpose; returns whether it was on.
bool enable(bool on);

}  // namespace glimpse::emulation::races
