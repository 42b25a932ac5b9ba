// SPDX-License-Identifier: BSD-3-Clause
/// The one header through which kernels see CUDA.
///
/// The same kernel sources are compiled twice: by nvcc for the GPU, and by a C++ compiler with
/// GLIMPSE_EMULATED defined, where testing/cuda_emulation.h plays the GPU with one fiber per CUDA
/// thread. A kernel therefore uses nothing of CUDA but this list:
///
///   functions   __global__ __device__ __forceinline__ __launch_bounds__ __restrict__
///   parameters  GLIMPSE_GRID_CONSTANT on every struct parameter
///   indices     threadIdx.x  blockIdx.{x,y,z}  blockDim.x  gridDim.{x,y,z}; blocks are 1-D
///   memory      GLIMPSE_SHARED, GLIMPSE_DYNAMIC_SHARED, load_readonly
///   copies      copy_async4, copy_async16, copy_async_commit, copy_async_wait,
///               copy_async_wait_all
///   barriers    __syncthreads, __syncwarp
///   warps       __ballot_sync, __shfl_sync, __shfl_down_sync, __shfl_xor_sync, with kFullWarp;
///               __popc, __ffs, __clz; block sizes are then multiples of 32
///   types       float2 float4 double2 int2 int4 uint2 uint4 ushort2 ushort4 short2 short4,
///               make_*; dim3
///   hints       GLIMPSE_UNROLL, GLIMPSE_ASSERT
///   host        Stream, launch
///
/// No thread returns before the last barrier of its block: the emulation calls that an error.
/// Blocks do not talk to each other, and there are no atomics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(GLIMPSE_EMULATED)

#include "testing/cuda_emulation.h"

#else

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>

/// For struct parameters: without it ptxas copies an indexed array of a parameter to local memory.
#define GLIMPSE_GRID_CONSTANT const __grid_constant__

/// A variable shared by the block: `GLIMPSE_SHARED(float, tile, [8][33]);`, `GLIMPSE_SHARED(int,
/// count, );`. It starts with no particular value.
#define GLIMPSE_SHARED(type, name, dimensions) __shared__ type name dimensions

/// The dynamic shared memory of the block as an array of char aligned to 16 bytes. Divide it by
/// offsets: a pointer rounded through an integer is no longer known to be shared, and every access
/// through it becomes generic.
#define GLIMPSE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

#define GLIMPSE_UNROLL _Pragma("unroll")

/// Checked in emulation only, where it names the block and the thread.
#define GLIMPSE_ASSERT(condition) static_cast<void>(0)

namespace glimpse::cuda {

using Stream = cudaStream_t;

/// Load through the read-only path. `T` is an arithmetic or vector type of 1 to 16 bytes, and
/// `source` is aligned to its size.
template <class T>
__device__ __forceinline__ T load_readonly(const T* source) {
  return __ldg(source);
}

namespace detail {

template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    // Whole sectors are read once by one thread, so L1 is bypassed.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
  } else {
    // Only .ca takes sizes under 16.
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(kBytes)
                 : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  } else {
    static_assert(kBytes == 4);
    *static_cast<unsigned*>(shared) = *static_cast<const unsigned*>(global);
  }
#endif
}

}  // namespace detail

/// Start copying 4 bytes from global to shared memory, both 4-byte aligned. What `shared` holds is
/// undefined until this thread has waited, and other threads see it after a barrier that follows.
__device__ __forceinline__ void copy_async4(void* shared, const void* global) {
  detail::copy_async<4>(shared, global);
}

/// As copy_async4 for 16 bytes, both sides aligned to 16.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  detail::copy_async<16>(shared, global);
}

/// Close a group: the copies this thread has started since the last commit.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Wait until all but the newest `kPending` groups of this thread have landed. Copies that are in
/// no group yet are not waited for.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

/// Wait for every copy of this thread, in a group or not.
__device__ __forceinline__ void copy_async_wait_all() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

namespace detail {

/// What an uncaught launch error needs to say: which kernel, which shape, which error.
inline void check_launch(cudaError_t status, const void* kernel, dim3 grid, unsigned block,
                         std::size_t shared_bytes) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // The error is reported here; the next call starts clean.
  const char* mangled = nullptr;
  std::string name = "a kernel";
  if (cudaFuncGetName(&mangled, kernel) == cudaSuccess && mangled != nullptr) {
    char* readable = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
    name = readable != nullptr ? readable : mangled;
    std::free(readable);
  } else {
    cudaGetLastError();
  }
  throw std::runtime_error("launch of " + name + " failed: " + cudaGetErrorString(status) +
                           " (grid " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" +
                           std::to_string(grid.z) + ", block " + std::to_string(block) + ", " +
                           std::to_string(shared_bytes) + " bytes of dynamic shared memory)");
}

template <class... Parameters, std::size_t... kIndex>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, std::size_t shared_bytes,
            Stream stream, std::tuple<Parameters...>& parameters, std::index_sequence<kIndex...>) {
  // Also holds for a kernel without parameters, where an array of none would be ill-formed.
  void* addresses[] = {
      const_cast<void*>(static_cast<const void*>(&std::get<kIndex>(parameters)))..., nullptr};
  const auto* function = reinterpret_cast<const void*>(kernel);
  // A block gets more than 48 KB only on request, its static variables included: kernels that have
  // dynamic memory, too, keep those below 8 KB. The request is cheap, belongs to the current device
  // and is allowed during graph capture, so it is not cached. It is always for all that there is:
  // another thread that launches the kernel with less must not take it back.
  constexpr std::size_t kDefaultLimit = 40 * 1024;
  if (shared_bytes > kDefaultLimit) {
    const auto check = [&](cudaError_t status) {
      check_launch(status, function, grid, block, shared_bytes);
    };
    int device = 0, most = 0;
    cudaFuncAttributes attributes = {};
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaFuncGetAttributes(&attributes, function));
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes)));
  }
  check_launch(cudaLaunchKernel(function, grid, dim3(block), addresses, shared_bytes, stream),
               function, grid, block, shared_bytes);
}

}  // namespace detail

/// Run `kernel` over `grid` blocks of `block` threads. An empty grid is nothing to do. Throws
/// std::runtime_error that names the kernel when CUDA refuses; errors that happen while it runs
/// surface at the caller's next synchronisation, as with every kernel.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, std::size_t shared_bytes,
            Stream stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument per parameter");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  detail::launch(kernel, grid, block, shared_bytes, stream, parameters,
                 std::index_sequence_for<Parameters...>{});
}

}  // namespace glimpse::cuda

#endif

namespace glimpse::cuda {

/// The mask of every warp collective: all 32 lanes take part.
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace glimpse::cuda
