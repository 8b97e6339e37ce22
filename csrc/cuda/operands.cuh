// Images as kernels read them.
#pragma once

#include "operand_checks.h"
#include "sampling.cuh"
#include "tensors.cuh"

namespace fused_res::cuda {

/// How images [N, H, W, C] are sampled at a stride.
inline Sampling sampling_of(const char* name, const Tensor& image, std::int64_t down, std::int64_t right) {
  const std::int64_t height = image.size(1), width = image.size(2), area = height * width;
  STD_TORCH_CHECK(area <= std::numeric_limits<int>::max(), name, ": expected images of fewer than 2^31 pixels, got ",
                  area);
  // A stride beyond the image is as good as one of its size: both sample the first line or pixel only.
  const auto steps = [](std::int64_t step, std::int64_t size) { return static_cast<int>(step < size ? step : size); };
  const auto sample = [](std::int64_t size, std::int64_t step) {
    return static_cast<int>(size / step + (size % step != 0));
  };
  const int lines = sample(height, down), pixels = sample(width, right);
  return {area, static_cast<int>(width), lines * pixels, pixels, steps(down, height), steps(right, width)};
}

}  // namespace fused_res::cuda
