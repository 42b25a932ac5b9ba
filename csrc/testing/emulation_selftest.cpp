// SPDX-License-Identifier: BSD-3-Clause
#ifndef GLIMPSE_EMULATED
#define GLIMPSE_EMULATED 1
#endif
#include "testing/emulation_selftest.h"

#include <cstdint>
#include <functional>
#include <set>
#include <thread>

#include "cuda/device.cuh"
#include "testing/cuda_races.h"

namespace glimpse::testing {
namespace {

using namespace glimpse::cuda;
using emulation::EmulationError;

constexpr int kSeeds = 8;

void check(bool condition, const std::string& otherwise) {
  if (!condition) throw std::logic_error(otherwise);
}

/// The message of the EmulationError that `action` must throw; it must contain every one of
/// `parts`.
void check_refused(const std::function<void()>& action, const std::vector<std::string>& parts) {
  try {
    action();
  } catch (const EmulationError& error) {
    const std::string message = error.what();
    for (const std::string& part : parts) {
      check(message.find(part) != std::string::npos,
            "the error does not say '" + part + "': " + message);
    }
    return;
  }
  throw std::logic_error("nothing was reported");
}

/// Puts the seed back, whatever happens.
class EachSeed {
 public:
  EachSeed() : before_(emulation::seed()) {}
  ~EachSeed() { emulation::set_seed(before_); }
  void run(const std::function<void(uint64_t)>& action) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      emulation::set_seed(seed);
      action(seed);
    }
  }

 private:
  uint64_t before_;
};

void for_each_seed(const std::function<void(uint64_t)>& action) { EachSeed().run(action); }

/// For kernels that race on purpose.
class RacesAllowed {
 public:
  RacesAllowed() : before_(emulation::races::enable(false)) {}
  ~RacesAllowed() { emulation::races::enable(before_); }

 private:
  bool before_;
};

// -------------------------------------------------------------------------------- right kernels

__global__ void block_sum_kernel(const int* input, int* sums) {
  GLIMPSE_DYNAMIC_SHARED(bytes);
  int* partial = reinterpret_cast<int*>(bytes);
  partial[threadIdx.x] = load_readonly(input + blockIdx.x * blockDim.x + threadIdx.x);
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

void sums_with_barriers() {
  constexpr int kBlocks = 5, kThreads = 256;
  std::vector<int> input(kBlocks * kThreads);
  for (std::size_t i = 0; i < input.size(); ++i) input[i] = static_cast<int>(i * i % 1009);
  for_each_seed([&](uint64_t seed) {
    std::vector<int> sums(kBlocks, -1);
    launch(block_sum_kernel, kBlocks, kThreads, kThreads * sizeof(int), nullptr, input.data(),
           sums.data());
    for (int b = 0; b < kBlocks; ++b) {
      int expected = 0;
      for (int t = 0; t < kThreads; ++t) expected += input[b * kThreads + t];
      check(sums[b] == expected, "seed " + std::to_string(seed) + ", block " + std::to_string(b));
    }
  });
}

__global__ void warp_collectives_kernel(int* down, int* from_lane, double* butterfly,
                                        unsigned* ballots, int* ranks) {
  const int t = static_cast<int>(threadIdx.x);
  int sum = t;
  for (unsigned delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kFullWarp, sum, delta);
  down[t] = sum;
  from_lane[t] = __shfl_sync(kFullWarp, t * t, 7);
  double total = t;
  for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(kFullWarp, total, mask);
  butterfly[t] = total;
  const bool odd = t % 3 == 1;
  const unsigned ballot = __ballot_sync(kFullWarp, odd);
  ballots[t] = ballot;
  ranks[t] = odd ? __popc(ballot & ((1u << (t % 32)) - 1)) : -__ffs(static_cast<int>(ballot));
}

void warp_collectives() {
  constexpr int kThreads = 96;
  for_each_seed([&](uint64_t) {
    std::vector<int> down(kThreads), from_lane(kThreads), ranks(kThreads);
    std::vector<double> butterfly(kThreads);
    std::vector<unsigned> ballots(kThreads);
    launch(warp_collectives_kernel, 1, kThreads, 0, nullptr, down.data(), from_lane.data(),
           butterfly.data(), ballots.data(), ranks.data());
    for (int t = 0; t < kThreads; ++t) {
      const int first = t / 32 * 32;
      int sum = 0, rank = 0;
      unsigned ballot = 0;
      for (int i = 0; i < 32; ++i) {
        sum += first + i;
        const bool odd = (first + i) % 3 == 1;
        ballot |= static_cast<unsigned>(odd) << i;
        if (odd && first + i < t) ++rank;
      }
      if (t == first) check(down[t] == sum, "__shfl_down_sync");
      check(from_lane[t] == (first + 7) * (first + 7), "__shfl_sync");
      check(butterfly[t] == sum, "__shfl_xor_sync");
      check(ballots[t] == ballot, "__ballot_sync");
      check(ranks[t] == (t % 3 == 1 ? rank : -__builtin_ffs(static_cast<int>(ballot))),
            "__popc or __ffs");
    }
  });
}

__global__ void where_am_i_kernel(int* visits) {
  const std::size_t block =
      (std::size_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  ++visits[block * blockDim.x + threadIdx.x];
}

void every_thread_runs_once() {
  for_each_seed([](uint64_t) {
    for (const dim3& grid : {dim3(1), dim3(2), dim3(7, 3, 2), dim3(64, 1, 5)}) {
      for (const unsigned block : {1u, 33u, 128u, 1024u}) {
        std::vector<int> visits(std::size_t{grid.x} * grid.y * grid.z * block);
        launch(where_am_i_kernel, grid, block, 0, nullptr, visits.data());
        for (const int count : visits) check(count == 1, "a thread ran more or less than once");
      }
    }
    launch(where_am_i_kernel, 0, 32, 0, nullptr, nullptr);  // an empty grid is nothing to do
  });
}

__global__ void pipeline_kernel(const float* input, int tiles, float* output) {
  GLIMPSE_SHARED(float, buffer, [2][128]);
  const unsigned t = threadIdx.x;
  const auto start = [&](int tile) {
    if (t < 32) copy_async16(&buffer[tile % 2][4 * t], input + 128 * tile + 4 * t);
    copy_async_commit();
  };
  start(0);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      start(tile + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    sum += buffer[tile % 2][127 - t];
    __syncthreads();
  }
  output[blockIdx.x * blockDim.x + t] = sum;
}

void pipelined_copies() {
  constexpr int kTiles = 5;
  alignas(16) float input[kTiles * 128];
  for (int i = 0; i < kTiles * 128; ++i) input[i] = static_cast<float>(i * 7 % 101);
  for_each_seed([&](uint64_t) {
    std::vector<float> output(3 * 128);
    launch(pipeline_kernel, 3, 128, 0, nullptr, input, kTiles, output.data());
    for (int i = 0; i < 3 * 128; ++i) {
      float expected = 0;
      for (int tile = 0; tile < kTiles; ++tile) expected += input[tile * 128 + 127 - i % 128];
      check(output[i] == expected, "thread " + std::to_string(i));
    }
  });
}

void launches_from_two_threads() {
  std::vector<int> input(64 * 128, 1);
  const auto many = [&](std::string* wrong) {
    try {
      for (int i = 0; i < 20; ++i) {
        std::vector<int> sums(64);
        launch(block_sum_kernel, 64, 128, 128 * sizeof(int), nullptr, input.data(), sums.data());
        for (const int sum : sums) check(sum == 128, "concurrent launches disturb each other");
      }
    } catch (const std::exception& error) {
      *wrong = error.what();
    }
  };
  std::string wrong[2];
  std::thread other(many, &wrong[0]);
  many(&wrong[1]);
  other.join();
  for (const std::string& message : wrong) check(message.empty(), message);
}

// --------------------------------------------------------------------------- what stays undefined

__global__ void read_uninitialised_kernel(unsigned* fixed, unsigned* dynamic) {
  GLIMPSE_SHARED(unsigned, value, );
  GLIMPSE_DYNAMIC_SHARED(bytes);
  unsigned* first = reinterpret_cast<unsigned*>(bytes);
  fixed[blockIdx.x] = value;
  dynamic[blockIdx.x] = *first;
  value = *first = 42;  // the next block must not see it
}

void shared_memory_is_poisoned() {
  for_each_seed([](uint64_t seed) {
    unsigned fixed[3], dynamic[3];
    launch(read_uninitialised_kernel, 3, 1, 16, nullptr, fixed, dynamic);
    const unsigned poison = seed / 2 % 2 == 0 ? 0xffffffffu : 0xcdcdcdcdu;
    for (int b = 0; b < 3; ++b) {
      check(fixed[b] == poison, "static shared memory");
      check(dynamic[b] == poison, "dynamic shared memory");
    }
  });
}

__global__ void far_ahead_kernel(int* seen) {
  GLIMPSE_SHARED(int, cell, );
  const bool first_warp = threadIdx.x < 32;
  if (threadIdx.x == 32) cell = 42;
  for (int i = 0; i < 20; ++i) __shfl_sync(kFullWarp, i, 0);
  if (first_warp && threadIdx.x == 0) *seen = cell;
}

void warps_run_ahead() {
  const RacesAllowed allowed;
  bool late = false, early = false;
  for_each_seed([&](uint64_t) {
    int seen = 0;
    launch(far_ahead_kernel, 1, 64, 0, nullptr, &seen);
    (seen == 42 ? late : early) = true;
  });
  check(late && early, "no warp gets 20 collectives ahead of another");
}

__global__ void last_writer_kernel(unsigned* thread, unsigned* block) {
  *thread = threadIdx.x;
  *block = blockIdx.x;
}

void races_show() {
  const RacesAllowed allowed;
  std::set<unsigned> threads, blocks;
  for_each_seed([&](uint64_t seed) {
    unsigned thread, block;
    launch(last_writer_kernel, 9, 64, 0, nullptr, &thread, &block);
    threads.insert(thread);
    blocks.insert(block);
    unsigned again, block_again;
    launch(last_writer_kernel, 9, 64, 0, nullptr, &again, &block_again);
    check(again == thread && block_again == block, "one seed gives two orders");
    check(seed != 0 || (thread == 63 && block == 8), "seed 0 is not the natural order");
  });
  check(threads.size() > 3, "the order of threads hardly changes");
  check(blocks.size() > 3, "the order of blocks hardly changes");
}

/// `waits`: bit 0 commit, bit 1 wait for the group, bit 2 wait for all.
__global__ void copy_kernel(const float* input, int waits, float* output) {
  GLIMPSE_DYNAMIC_SHARED(bytes);
  float* staged = reinterpret_cast<float*>(bytes);
  staged[threadIdx.x] = 1;
  copy_async4(staged + threadIdx.x, input + threadIdx.x);
  if ((waits & 1) != 0) copy_async_commit();
  if ((waits & 2) != 0) copy_async_wait<0>();
  if ((waits & 4) != 0) copy_async_wait_all();
  __syncthreads();
  output[threadIdx.x] = staged[31 - threadIdx.x];
}

void copies_land_at_the_wait() {
  std::vector<float> input(32);
  for (int i = 0; i < 32; ++i) input[i] = static_cast<float>(100 + i);
  for_each_seed([&](uint64_t) {
    for (int waits = 0; waits < 8; ++waits) {
      std::vector<float> output(32);
      launch(copy_kernel, 1, 32, 32 * sizeof(float), nullptr, input.data(), waits, output.data());
      const bool landed = (waits & 4) != 0 || (waits & 3) == 3;
      for (int t = 0; t < 32; ++t) {
        check((output[t] == input[31 - t]) == landed,
              landed ? "a copy has not landed" : "a copy landed before the wait");
        check(output[t] != 1, "the target still holds what was there before the copy");
      }
    }
  });
}

// ------------------------------------------------------------------------------------- faults

__global__ void early_return_kernel(int first) {
  if (static_cast<int>(threadIdx.x) >= first) return;
  __syncthreads();
}

void early_return_is_reported() {
  for_each_seed([](uint64_t) {
    check_refused([] { launch(early_return_kernel, dim3(1, 2), 64, 0, nullptr, 40); },
                  {"launched at csrc/testing/emulation_selftest.cpp:", "block (0, ",
                   "threads 0-39 at __syncthreads", "threads 40-63 returned"});
  });
  launch(early_return_kernel, 1, 64, 0, nullptr, 64);  // all of them wait
  launch(early_return_kernel, 1, 64, 0, nullptr, 0);   // none of them does
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void different_barriers_are_reported() {
  for_each_seed([](uint64_t) {
    check_refused([] { launch(two_barriers_kernel, 1, 32, 0, nullptr); },
                  {"wait at different barriers", "thread "});
  });
}

__global__ void barrier_against_ballot_kernel(unsigned* output) {
  if (threadIdx.x < 5) {
    __syncthreads();
  } else {
    *output = __ballot_sync(kFullWarp, true);
  }
}

void barrier_against_ballot_is_reported() {
  for_each_seed([](uint64_t) {
    unsigned output = 0;
    check_refused([&] { launch(barrier_against_ballot_kernel, 1, 32, 0, nullptr, &output); },
                  {"threads 0-4 at __syncthreads", "threads 5-31 at __ballot_sync"});
  });
}

__global__ void two_collectives_kernel(int* output) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < 16) {
    output[t] = __shfl_sync(kFullWarp, t, 0);
  } else {
    output[t] = __shfl_xor_sync(kFullWarp, t, 1);
  }
}

__global__ void partial_mask_kernel(unsigned* output) {
  if (threadIdx.x < 16) *output = __ballot_sync(0xffffu, true);
}

__global__ void plain_ballot_kernel(unsigned* output) { *output = __ballot_sync(kFullWarp, true); }

void divergent_collectives_are_reported() {
  int output[32];
  unsigned ballot;
  check_refused([&] { launch(two_collectives_kernel, 1, 32, 0, nullptr, output); },
                {"lanes of one warp wait at different collectives"});
  check_refused([&] { launch(partial_mask_kernel, 1, 32, 0, nullptr, &ballot); },
                {"mask must be kFullWarp"});
  check_refused([&] { launch(plain_ballot_kernel, 1, 40, 0, nullptr, &ballot); },
                {"last warp of the block is not full"});
}

__global__ void throwing_kernel(int block, int thread) {
  __syncthreads();
  GLIMPSE_ASSERT(static_cast<int>(blockIdx.x) != block || static_cast<int>(threadIdx.x) != thread);
  __syncthreads();
}

void exceptions_name_the_thread() {
  for_each_seed([](uint64_t) {
    check_refused([] { launch(throwing_kernel, 4, 64, 0, nullptr, 2, 33); },
                  {"block (2, 0, 0), thread 33", "assertion failed: static_cast<int>(blockIdx.x)"});
    launch(throwing_kernel, 4, 64, 0, nullptr, -1, 0);  // the engine still works
  });
}

__global__ void misaligned_load_kernel(const float* input, float* output) {
  *output = load_readonly(reinterpret_cast<const float4*>(input + 1)).x;
}

__global__ void misaligned_copy_kernel(const float* input) {
  GLIMPSE_DYNAMIC_SHARED(bytes);
  copy_async16(bytes, input + 1);
}

__global__ void copy_to_global_kernel(const float* input, float* output) {
  copy_async4(output, input);
}

void bad_addresses_are_reported() {
  alignas(16) float input[8] = {};
  float output;
  check_refused([&] { launch(misaligned_load_kernel, 1, 1, 0, nullptr, input, &output); },
                {"load_readonly", "16 bytes"});
  check_refused([&] { launch(misaligned_copy_kernel, 1, 1, 16, nullptr, input); },
                {"copy_async", "16 bytes"});
  check_refused([&] { launch(copy_to_global_kernel, 1, 1, 16, nullptr, input, &output); },
                {"not in the block's shared memory"});
}

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer ends the process at the write itself, so there is nothing left to report.
void writes_behind_shared_memory_are_reported() {}
#else
__global__ void write_behind_kernel(bool dynamic) {
  GLIMPSE_SHARED(char, fixed, [24]);
  GLIMPSE_DYNAMIC_SHARED(bytes);
  char* target = dynamic ? bytes + 100 : fixed + 24;
  *target = 1;
}

void writes_behind_shared_memory_are_reported() {
  for (const bool dynamic : {false, true}) {
    check_refused([&] { launch(write_behind_kernel, 1, 1, 100, nullptr, dynamic); },
                  {"behind the end of shared memory"});
  }
}
#endif

__global__ void static_shared_kernel() {
  GLIMPSE_SHARED(int, numbers, [1024]);
  numbers[threadIdx.x] = 0;
}

void impossible_launches_are_refused() {
  check_refused([] { launch(two_barriers_kernel, 1, 1025, 0, nullptr); }, {"1025 threads"});
  check_refused([] { launch(two_barriers_kernel, dim3(1, 65536), 32, 0, nullptr); }, {"65536"});
  check_refused([] { launch(two_barriers_kernel, 1, 32, 256 * 1024, nullptr); }, {"262144 bytes"});
  // 48 KB are for both kinds together.
  launch(static_shared_kernel, 1, 32, 44 * 1024, nullptr);
  check_refused([] { launch(static_shared_kernel, 1, 32, 45 * 1024, nullptr); }, {"50176 bytes"});
}

// ------------------------------------------------------------------------------------ mutation

void skipped_barrier_shows() {
  const RacesAllowed allowed;
  std::vector<int> input(256, 1);
  const auto right = [&] {
    int sum = 0;
    launch(block_sum_kernel, 1, 256, 256 * sizeof(int), nullptr, input.data(), &sum);
    return sum == 256;
  };
  for_each_seed([&](uint64_t) { check(right(), "the sum is wrong before any mutation"); });
  int barriers = 0, killed = 0;
  for (const emulation::Site& site : emulation::reached_sites()) {
    if (site.call != "__syncthreads") continue;
    const std::string before = emulation::skip_site(site.name);
    bool noticed = false;
    for_each_seed([&](uint64_t) { noticed = noticed || !right(); });
    emulation::skip_site(before);
    ++barriers;
    killed += noticed ? 1 : 0;
  }
  check(barriers > 2, "the sites are not listed");
  check(killed == 2, "of the two barriers of block_sum_kernel, " + std::to_string(killed) +
                         " change the result when they are skipped");
  for_each_seed([&](uint64_t) { check(right(), "the mutation is not undone"); });
}

// --------------------------------------------------------------------------------------- races

enum class Order { kNothing, kShuffle, kSyncWarp, kSyncThreads };

__device__ void wait(Order order) {
  if (order == Order::kShuffle) __shfl_sync(kFullWarp, 0, 0);
  if (order == Order::kSyncWarp) __syncwarp();
  if (order == Order::kSyncThreads) __syncthreads();
}

/// Each thread hands a number to the thread `distance` further, then takes back its place.
__global__ void hand_over_kernel(int distance, Order written, Order read, int* output) {
  GLIMPSE_SHARED(int, box, [64]);
  const int t = static_cast<int>(threadIdx.x);
  box[t] = t;
  wait(written);
  output[t] = box[(t + distance) % 64];
  wait(read);
  box[t] = -1;
}

__global__ void global_hand_over_kernel(int* cells, int thread, int block, Order order) {
  const bool writer = threadIdx.x == 0 && blockIdx.x == 0;
  if (writer) *cells = 1;
  wait(order);
  if (static_cast<int>(threadIdx.x) == thread && static_cast<int>(blockIdx.x) == block) *cells += 1;
}

void races_are_reported() {
  int output[64];
  for_each_seed([&](uint64_t) {
    const auto hand_over = [&](unsigned blocks, int distance, Order written, Order read) {
      launch(hand_over_kernel, blocks, 64, 0, nullptr, distance, written, read, &output[0]);
    };
    const auto alone = [&](int distance, Order written, Order read) {
      hand_over(1, distance, written, read);
    };
    const std::vector<std::string> race = {"race on shared memory", "no barrier between them"};
    const Order no = Order::kNothing, shuffle = Order::kShuffle, warp = Order::kSyncWarp,
                block = Order::kSyncThreads;
    // Both blocks own the same outputs, which is a race of its own.
    check_refused([&] { hand_over(2, 1, block, block); },
                  {"race on global memory", "of block number"});
    alone(0, no, no);
    alone(1, block, block);
    alone(33, block, block);
    for (const Order weak : {no, shuffle, warp}) {
      check_refused([&] { alone(33, weak, block); }, race);
      check_refused([&] { alone(33, block, weak); }, race);
    }
    for (const Order weak : {no, shuffle}) {
      check_refused([&] { alone(1, weak, block); }, race);
      check_refused([&] { alone(1, block, weak); }, race);
    }

    int cell = 0;
    const auto global = [&](int thread, int of_block, Order order) {
      launch(global_hand_over_kernel, 2, 64, 0, nullptr, &cell, thread, of_block, order);
    };
    const std::vector<std::string> global_race = {"race on global memory"};
    global(0, 0, no);
    global(5, 0, warp);
    global(40, 0, block);
    check_refused([&] { global(5, 0, shuffle); }, global_race);
    check_refused([&] { global(40, 0, warp); }, global_race);
    check_refused([&] { global(0, 1, block); }, global_race);
  });
}

}  // namespace

std::vector<std::tuple<std::string, bool, std::string>> emulation_selftests() {
  std::vector<std::pair<std::string, void (*)()>> tests = {
      {"sums_with_barriers", sums_with_barriers},
      {"warp_collectives", warp_collectives},
      {"every_thread_runs_once", every_thread_runs_once},
      {"pipelined_copies", pipelined_copies},
      {"launches_from_two_threads", launches_from_two_threads},
      {"shared_memory_is_poisoned", shared_memory_is_poisoned},
      {"warps_run_ahead", warps_run_ahead},
      {"races_show", races_show},
      {"copies_land_at_the_wait", copies_land_at_the_wait},
      {"early_return_is_reported", early_return_is_reported},
      {"different_barriers_are_reported", different_barriers_are_reported},
      {"barrier_against_ballot_is_reported", barrier_against_ballot_is_reported},
      {"divergent_collectives_are_reported", divergent_collectives_are_reported},
      {"exceptions_name_the_thread", exceptions_name_the_thread},
      {"bad_addresses_are_reported", bad_addresses_are_reported},
      {"writes_behind_shared_memory_are_reported", writes_behind_shared_memory_are_reported},
      {"impossible_launches_are_refused", impossible_launches_are_refused},
      {"skipped_barrier_shows", skipped_barrier_shows},
  };
  if (emulation::races::kCompiledIn) tests.emplace_back("races_are_reported", races_are_reported);
  std::vector<std::tuple<std::string, bool, std::string>> rows;
  for (const auto& [name, test] : tests) {
    try {
      test();
      rows.emplace_back(name, true, "");
    } catch (const std::exception& error) {
      rows.emplace_back(name, false, error.what());
    }
  }
  return rows;
}

}  // namespace glimpse::testing
