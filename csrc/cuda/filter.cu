// SPDX-License-Identifier: BSD-3-Clause
#include "cuda/filter.cuh"

#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"

namespace glimpse::cuda {

namespace {

constexpr int64_t kMostBlocks = 2147483647;

/// Blocks over `items`, one thread each; kernels loop where that is not enough.
dim3 filter_blocks(int64_t items) {
  const int64_t blocks = (items + kFilterThreads - 1) / kFilterThreads;
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
}

Stream stream_of(const Problem& problem) { return static_cast<Stream>(problem.stream); }

template <class Number>
void write_rows(const Problem& problem, const BatchChunk& chunk) {
  const int64_t rows = int64_t{problem.out_height} + problem.out_width + 1;
  launch(filter_rows_kernel<Number>, filter_blocks(problem.boxes * rows), kFilterThreads, 0,
         stream_of(problem), problem, chunk);
}

template <class T>
void crop_batch_typed(const BatchProblem& batch) {
  const Problem& problem = batch.problem;
  BatchNumbers numbers = {};
  numbers.fill = batch.fill;
  numbers.result = batch.result;
  const int64_t cells = problem.boxes * problem.out_height * problem.out_width;
  const int64_t images = batch.list == nullptr ? 1 : problem.batch;
  BatchChunk chunk = {};
  for (; chunk.first < images; chunk.first += BatchChunk::kImages) {
    if (batch.list != nullptr) {
      const int64_t left = images - chunk.first;
      chunk.count = static_cast<int32_t>(left < BatchChunk::kImages ? left : BatchChunk::kImages);
      for (int32_t i = 0; i < chunk.count; ++i) chunk.image[i] = batch.list[chunk.first + i];
    }
    write_rows<acc_t<T>>(problem, chunk);
    for (numbers.first = 0; numbers.first < problem.channels;
         numbers.first += BatchNumbers::kChannels) {
      const int64_t left = problem.channels - numbers.first;
      numbers.count =
          static_cast<int32_t>(left < BatchNumbers::kChannels ? left : BatchNumbers::kChannels);
      for (int32_t c = 0; c < numbers.count; ++c) {
        numbers.multiplier[c] = batch.multiplier[numbers.first + c];
        numbers.offset[c] = batch.offset[numbers.first + c];
      }
      launch(crop_batch_kernel<T>, filter_blocks(cells), kFilterThreads, 0, stream_of(problem),
             problem, chunk, numbers);
    }
  }
}

template <class T>
void sample_typed(const Problem& problem) {
  launch(filter_sample_kernel<T>,
         filter_blocks(problem.boxes * problem.channels * problem.out_height * problem.out_width),
         kFilterThreads, 0, stream_of(problem), problem);
}

template <class T>
void grad_boxes_typed(const Problem& problem) {
  launch(filter_grad_boxes_kernel<T>, dim3(static_cast<unsigned>(problem.boxes)), kBoxThreads, 0,
         stream_of(problem), problem);
}

template <class Number>
void grad_features_typed(const Problem& problem) {
  int64_t most = 0;
  for (int32_t l = 0; l < problem.levels; ++l) {
    const Level& level = problem.level[l];
    const int64_t elements = problem.batch * problem.channels * level.height * level.width;
    if (elements > most) most = elements;
  }
  write_rows<Number>(problem, BatchChunk{});
  launch(filter_grad_features_kernel<Number>, filter_blocks(most), kFilterThreads, 0,
         stream_of(problem), problem);
}

}  // namespace

size_t crop_batch_workspace(const BatchProblem& batch) { return filter_workspace(batch.problem); }

void crop_batch(const BatchProblem& batch) {
  switch (batch.problem.dtype) {
    case Dtype::kFloat32:
      return crop_batch_typed<float>(batch);
    case Dtype::kFloat16:
      return crop_batch_typed<half>(batch);
    case Dtype::kBFloat16:
      return crop_batch_typed<bfloat16>(batch);
    case Dtype::kFloat64:
      return crop_batch_typed<double>(batch);
    case Dtype::kUInt8:
      return crop_batch_typed<uint8_t>(batch);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

void filter_sample(const Problem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return sample_typed<float>(problem);
    case Dtype::kFloat16:
      return sample_typed<half>(problem);
    case Dtype::kBFloat16:
      return sample_typed<bfloat16>(problem);
    case Dtype::kFloat64:
      return sample_typed<double>(problem);
    case Dtype::kUInt8:
      return sample_typed<uint8_t>(problem);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

size_t filter_workspace(const Problem& problem) {
  return problem.dtype == Dtype::kFloat64 ? FilterWorkspace<double>::bytes(problem)
                                          : FilterWorkspace<float>::bytes(problem);
}

void filter_grad_features(const Problem& problem) {
  if (problem.dtype == Dtype::kUInt8) {
    throw std::invalid_argument("glimpse_ext: integer features have no gradient");
  }
  problem.dtype == Dtype::kFloat64 ? grad_features_typed<double>(problem)
                                   : grad_features_typed<float>(problem);
}

void filter_grad_boxes(const Problem& problem) {
  switch (problem.dtype) {
    case Dtype::kFloat32:
      return grad_boxes_typed<float>(problem);
    case Dtype::kFloat16:
      return grad_boxes_typed<half>(problem);
    case Dtype::kBFloat16:
      return grad_boxes_typed<bfloat16>(problem);
    case Dtype::kFloat64:
      return grad_boxes_typed<double>(problem);
    case Dtype::kUInt8:
      return grad_boxes_typed<uint8_t>(problem);
  }
  throw std::invalid_argument("glimpse_ext: no kernel for this dtype");
}

}  // namespace glimpse::cuda
