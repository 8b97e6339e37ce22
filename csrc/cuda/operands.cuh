// Images as kernels read them.
#pragma once

#include "multiplied.cuh"
#include "operand_checks.h"
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

/// Images, or what their BN and ReLU make of them, pixel by pixel.
inline Pixels pixels_of(const char* name, const Tensor& image, const char* vectors_name, const OptionalTensor& vectors,
                        std::int64_t down, std::int64_t right, bool tf32) {
  check_activation(name, image, vectors_name, vectors, down, right);
  const std::int64_t count = sampled(image, down, right);
  STD_TORCH_CHECK((down == 1 && right == 1) || count <= std::numeric_limits<int>::max(), name,
                  ": expected fewer than 2^31 pixels at a stride, got ", count);
  return {{data(image), number_of(name, image)},
          floats(vectors),
          sampling_of(name, image, down, right),
          count,
          channels_of(name, image),
          tf32};
}

}  // namespace fused_res::cuda
