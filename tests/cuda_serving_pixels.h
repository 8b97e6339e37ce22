// What requests to kernels that read the pixels of images have in common.
#pragma once

#include "cuda_serving.h"
#include "pointwise.cuh"

namespace cuda_serving {

/// Images and the vectors of their BN, or null: n, height, width, channels, and the strides at which they are read.
inline fused_res::cuda::Activation activation(Request& r) {
  const std::int64_t n = r.integer();
  const int height = static_cast<int>(r.integer()), width = static_cast<int>(r.integer());
  const int channels = static_cast<int>(r.integer()), down = static_cast<int>(r.integer());
  const int right = static_cast<int>(r.integer()), pixels = (width + right - 1) / right;
  const fused_res::cuda::Sampling sampling{
      std::int64_t{height} * width, width, (height + down - 1) / down * pixels, pixels, down, right};
  const void* image = r.buffer<void>();
  return fused_res::cuda::activation_of(image, r.buffer<float>(), n, channels, sampling);
}

/// What a launcher would allocate on the device between two kernels, full of NaN.
inline std::unique_ptr<float[]> scratch(std::int64_t count) {
  std::unique_ptr<float[]> made(new float[count]);
  std::memset(made.get(), 0xff, count * sizeof(float));
  return made;
}

}  // namespace cuda_serving
