// SPDX-License-Identifier: BSD-3-Clause
#include <cstdlib>
#include <cstring>

#include "cpu/applications.h"
#include "cpu/backend.h"
#include "cpu/frames.h"
#include "cpu/kernels.h"
#include "cpu/points.h"

namespace glimpse {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

/// The best instruction set of this CPU, or a lesser one that GLIMPSE_ISA names (for tests).
Isa choose_isa() {
  Isa best = Isa::kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
#endif
  const char* wanted = std::getenv("GLIMPSE_ISA");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "baseline") == 0) return Isa::kBaseline;
  if (std::strcmp(wanted, "avx2") == 0 && best == Isa::kAvx512) return Isa::kAvx2;
  return best;
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace

const char* cpu_isa() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return avx512::kernels<T>();
  if (isa() == Isa::kAvx2) return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
template const Kernels<half>& kernels();
template const Kernels<bfloat16>& kernels();
template const Kernels<uint8_t>& kernels();

const Backend& cpu_backend() {
  static const Backend backend = {"cpu",
                                  true,
                                  [](const Problem&) -> size_t { return 0; },
                                  [](const Problem&) -> size_t { return 0; },
                                  is_wide_points,
                                  cpu_sample,
                                  cpu_grad_features,
                                  cpu_grad_boxes,
                                  cpu_frames_sample,
                                  cpu_frames_maximum,
                                  cpu_frames_grad_features,
                                  cpu_frames_grad_boxes,
                                  [](const GlimpseProblem&) -> size_t { return 0; },
                                  cpu_copy_glimpse,
                                  cpu_paste,
                                  nullptr,
                                  [](const BatchProblem&) -> size_t { return 0; },
                                  cpu_crop_batch};
  return backend;
}

}  // namespace glimpse

/// cpu_isa() for whoever has the shared library only.
extern "C" __attribute__((visibility("default"))) const char* glimpse_cpu_isa() {
  return glimpse::cpu_isa();
}
