// SPDX-License-Identifier: BSD-3-Clause
#include "ops/device.h"

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#if defined(GLIMPSE_CUDA_LIBRARY)
#include <dlfcn.h>

#include "cuda/backend.h"
#else
#include "cpu/backend.h"
#endif

namespace glimpse::ops {

#if defined(GLIMPSE_CUDA_LIBRARY)

const Backend& current_backend() { return cuda_backend(); }

namespace {

// Looked up at run time so that the library needs no libtorch_cuda at load time and one file
// serves every build of torch: a CUDA tensor can only exist once libtorch_cuda is in the process.
void* current_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(device, &stream) != 0) {
    throw std::runtime_error(
        "glimpse_ext: libtorch_cuda gave no current CUDA stream; this torch build is not "
        "supported");
  }
  return stream;
}

}  // namespace

DeviceScope::DeviceScope(const torch::stable::Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  stream_ = current_stream(device);  // may throw, so it comes before the guard
  guard_ = new torch::stable::accelerator::DeviceGuard(device);
}

DeviceScope::~DeviceScope() {
  delete static_cast<torch::stable::accelerator::DeviceGuard*>(guard_);
}

#else

namespace {
const Backend* replacement = nullptr;
}

const Backend& current_backend() { return replacement != nullptr ? *replacement : cpu_backend(); }

DeviceScope::DeviceScope(const torch::stable::Tensor&) {}
DeviceScope::~DeviceScope() {}

#endif

}  // namespace glimpse::ops

#if !defined(GLIMPSE_CUDA_LIBRARY)
/// Runs every CPU call on another backend (null: on the CPU's own again) and returns the previous
/// one. How tests run the CUDA kernels, compiled for the host, behind the real operators.
extern "C" __attribute__((visibility("default"))) const glimpse::Backend* glimpse_replace_backend(
    const glimpse::Backend* backend) {
  const glimpse::Backend* previous = glimpse::ops::replacement;
  glimpse::ops::replacement = backend;
  return previous;
}
#endif
