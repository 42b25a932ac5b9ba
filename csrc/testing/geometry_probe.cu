// SPDX-License-Identifier: BSD-3-Clause
// Compiled to PTX by a test, never run: holds every rounding of the geometry and nothing else, so
// that a fused multiply-add in the PTX means a position that differs from the host's by a bit.
#include "frame_problem.h"
#include "problem.h"

namespace {

template <class T>
struct Row {
  T* out;
  int32_t* pixels;
  int32_t count;

  __device__ int32_t size() const { return count; }
  __device__ int32_t pixel(int32_t i) const { return pixels[i]; }
  __device__ void add(int32_t i, T weight, T slope_origin, T slope_step) {
    out[3 * i] += weight;
    out[3 * i + 1] += slope_origin;
    out[3 * i + 2] += slope_step;
  }
  __device__ void push(int32_t pixel, T weight, T slope_origin, T slope_step) {
    pixels[count] = pixel;
    out[3 * count] = weight;
    out[3 * count + 1] = slope_origin;
    out[3 * count + 2] = slope_step;
    ++count;
  }
  __device__ void scale(int32_t i, T factor) { out[3 * i] *= factor; }
};

}  // namespace

template <class T>
__global__ void geometry_probe(const __grid_constant__ glimpse::Problem problem, T* out,
                               int32_t* pixels) {
  const glimpse::Box<T> box = glimpse::read_box<T>(problem, threadIdx.x);
  if (box.level < 0) return;
  const glimpse::BoxAxis<T> line = glimpse::box_axis(problem, box, glimpse::kX);
  Row<T> row{out, pixels, 0};
  glimpse::build_row(problem.op, line.axis, line.weighting, 0, line.size, row);
  pixels[0] = glimpse::row_capacity(problem.op, line.axis, 1, line.size);
}

template __global__ void geometry_probe<float>(const __grid_constant__ glimpse::Problem, float*,
                                               int32_t*);
template __global__ void geometry_probe<double>(const __grid_constant__ glimpse::Problem, double*,
                                                int32_t*);

// Where the samples of a frame fall and which of them are looked at. Derivatives of positions are
// sums like any other, and may be fused.
template <class T>
__global__ void frame_probe(const __grid_constant__ glimpse::FrameProblem problem, T* out,
                            int32_t* samples) {
  const glimpse::FrameBox<T> box = glimpse::read_frame<T>(problem, threadIdx.x);
  if (!box.reads) return;
  const glimpse::CellWindow window = glimpse::cell_window(box, 0, 1);
  samples[0] = window.y.first;
  samples[1] = window.y.end;
  samples[2] = window.x.first;
  samples[3] = window.x.end;
  const T y = box.frame.axis[0].position(0, window.y.first);
  const T x = box.frame.axis[1].position(1, window.x.first);
  const glimpse::FrameTaps<T> taps =
      glimpse::FrameTaps<T>::at(box.frame, y, x, problem.map.height, problem.map.width);
  out[0] = taps.y.weight[0];
  out[1] = taps.x.weight[1];
}

template __global__ void frame_probe<float>(const __grid_constant__ glimpse::FrameProblem, float*,
                                            int32_t*);
template __global__ void frame_probe<double>(const __grid_constant__ glimpse::FrameProblem, double*,
                                             int32_t*);
