// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU kernels without torch: compares them with the simple loops and prints the bits of what
// they compute, which have to be the same on every architecture. Built and run by .ci/aarch64.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/backend.h"
#include "cpu/parallel.h"

// csrc/cpu/parallel.cpp is the one source that needs libtorch.
namespace glimpse {
void parallel_ranges(int64_t begin, int64_t end, int64_t,
                     void (*body)(void*, int64_t first, int64_t end), void* context) {
  if (begin < end) body(context, begin, end);
}
int64_t parallel_threads() { return 1; }
}  // namespace glimpse

namespace {

using namespace glimpse;

constexpr int64_t kImages = 2, kChannels = 19, kBoxes = 12;
constexpr int32_t kHeight = 21, kWidth = 17, kOut = 5;

/// Numbers of a linear congruential generator, in [-1, 1): exact in every float type used here.
class Numbers {
 public:
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 56) / 128.0 - 1.0;
  }

 private:
  uint64_t state_ = 12345;
};

template <class T>
struct Data {
  std::vector<T> map, pooled, grad;
  std::vector<T> boxes, grad_boxes;
};

template <class T>
Data<T> make_data() {
  Numbers numbers;
  Data<T> data;
  data.map.resize(kImages * kChannels * kHeight * kWidth);
  for (T& v : data.map) v = static_cast<T>(numbers.next());
  data.grad.resize(kBoxes * kChannels * kOut * kOut);
  for (T& v : data.grad) v = static_cast<T>(numbers.next());
  for (int64_t k = 0; k < kBoxes; ++k) {
    const double x = numbers.next() * 9 + 8, y = numbers.next() * 11 + 10;
    const double w = numbers.next() * 9 + 7, h = numbers.next() * 9 + 7;
    for (const double v : {static_cast<double>(k % kImages), x, y, x + w, y + h}) {
      data.boxes.push_back(static_cast<T>(v));
    }
  }
  data.boxes[6] = static_cast<T>(NAN);
  data.boxes[13] = static_cast<T>(1e9);
  return data;
}

template <class T>
Problem make_problem(Data<T>& data, const Operator& op, Layout layout) {
  Problem problem = {};
  problem.op = op;
  problem.levels = 1;
  problem.batch = kImages;
  problem.channels = kChannels;
  problem.boxes = kBoxes;
  problem.out_height = problem.out_width = kOut;
  problem.dtype = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  problem.layout = layout;
  problem.box = data.boxes.data();
  problem.box_columns = 5;
  problem.image_column = 1;
  Level& level = problem.level[0];
  level.data = data.map.data();
  level.height = kHeight;
  level.width = kWidth;
  level.scale = 1.0;
  level.stride_n = kChannels * kHeight * kWidth;
  const bool nhwc = layout == Layout::kNhwc;
  level.stride_c = nhwc ? 1 : kHeight * kWidth;
  level.stride_h = nhwc ? kChannels * kWidth : kWidth;
  level.stride_w = nhwc ? kChannels : 1;
  return problem;
}

/// All three applications, one result behind the other.
template <class T>
std::vector<T> run(const Backend& backend, const Operator& op, Layout layout) {
  Data<T> data = make_data<T>();
  Problem problem = make_problem(data, op, layout);
  std::vector<T> pooled(data.grad.size());
  problem.pooled = pooled.data();
  backend.sample(problem);
  std::vector<T> grad_boxes(data.boxes.size());
  problem.pooled = data.grad.data();
  problem.grad_box = grad_boxes.data();
  std::vector<char> room(backend.grad_boxes_workspace(problem) + 1);
  problem.workspace = room.data();
  backend.grad_boxes(problem);
  std::vector<T> grad_map(data.map.size());
  problem.level[0].data = grad_map.data();
  room.resize(backend.grad_features_workspace(problem) + 1);
  problem.workspace = room.data();
  backend.grad_features(problem);
  pooled.insert(pooled.end(), grad_boxes.begin(), grad_boxes.end());
  pooled.insert(pooled.end(), grad_map.begin(), grad_map.end());
  return pooled;
}

template <class T>
uint64_t bits_of(const std::vector<T>& values) {
  uint64_t hash = 1469598103934665603u;
  for (const T v : values) {
    uint64_t bits = 0;
    std::memcpy(&bits, &v, sizeof(v));
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

template <class T>
bool check(const std::string& name, const Operator& op) {
  bool good = true;
  for (const Layout layout : {Layout::kNchw, Layout::kNhwc}) {
    const std::vector<T> ours = run<T>(cpu_backend(), op, layout);
    const std::vector<T> expected = run<T>(simple_backend(), op, layout);
    const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-5;
    double worst = 0;
    for (size_t i = 0; i < ours.size(); ++i) {
      const double a = ours[i], b = expected[i];
      if (std::isnan(a) != std::isnan(b)) worst = HUGE_VAL;
      if (!std::isnan(a)) worst = std::fmax(worst, std::fabs(a - b) / (1 + std::fabs(b)));
    }
    good = good && worst <= tolerance;
    std::printf("%s float%d %s: %016llx, error %s\n", name.c_str(), static_cast<int>(8 * sizeof(T)),
                layout == Layout::kNhwc ? "channels last" : "contiguous",
                static_cast<unsigned long long>(bits_of(ours)),
                worst <= tolerance ? "ok" : "WRONG");
  }
  return good;
}

}  // namespace

int main() {
  Crop crop = {};
  crop.unit = Unit::kPixels;
  bool good = true;
  for (const auto& [name, op] :
       {std::pair<const char*, Operator>{"roi_align", Operator(RoiAlign{2, 1})},
        {"roi_align adaptive", Operator(RoiAlign{0, 0})},
        {"crop", Operator(crop)}}) {
    good = check<float>(name, op) && good;
    good = check<double>(name, op) && good;
  }
  std::printf("%s\n", good ? "all agree with the simple loops" : "FAILED");
  return good ? 0 : 1;
}
