#include <stdexcept>
#include "cuda/kernels.h"
namespace glimpse::cuda {
void frames_sample(const FrameProblem&) { throw std::runtime_error("todo"); }
void frames_maximum(const FrameProblem&) { throw std::runtime_error("todo"); }
void frames_grad_features(const FrameProblem&) { throw std::runtime_error("todo"); }
void frames_grad_boxes(const FrameProblem&) { throw std::runtime_error("todo"); }
}
