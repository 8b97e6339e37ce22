// Values as a matrix product multiplies them, one by one, in any format: for what runs once per element of a weight, or
// for few channels.
#pragma once

#include "parameter.cuh"
#include "sampling.cuh"
#include "signs.cuh"

namespace fused_res::cuda {

/// TF32 keeps the upper 10 bits of a float's fraction; rounded as `ptx::to_tf32` does, halves away from 0.
__device__ __forceinline__ float rounded_to_tf32(float v) {
  return v != v ? v : __uint_as_float((__float_as_uint(v) + 0x1000u) & ~0x1fffu);
}

/// A float rounded to a format, and to what a product makes of that.
__device__ __forceinline__ float multiplied(float v, Number number, bool tf32) {
  if (number == Number::kHalf) return widen(narrow<Half>(v));
  if (number == Number::kBFloat16) return widen(narrow<BFloat16>(v));
  return tf32 ? rounded_to_tf32(v) : v;
}

__device__ __forceinline__ void store_number(void* to, Number number, std::int64_t i, float v) {
  if (number == Number::kHalf) {
    static_cast<Half*>(to)[i] = narrow<Half>(v);
  } else if (number == Number::kBFloat16) {
    static_cast<BFloat16*>(to)[i] = narrow<BFloat16>(v);
  } else {
    static_cast<float*>(to)[i] = v;
  }
}

/// An `Activation` of fused_res/primitives/operands.py: the sampled pixels of images, normalised where there are
/// vectors.
struct Pixels {
  Parameter image;       // [N * H * W, K]
  const float* vectors;  // [5, K] or null
  Sampling sampling;
  std::int64_t count;  // of the sampled pixels; fewer than 2^31 of them with a stride
  int channels;
  bool tf32;

  /// Where a sampled pixel's channels begin.
  __device__ __forceinline__ std::int64_t start(std::int64_t pixel) const {
    if (sampling.down == 1 && sampling.right == 1) return pixel * channels;
    return sampled_row(sampling, static_cast<unsigned>(pixel)) * channels;
  }

  /// Channel k of the pixel that begins there, as a product multiplies it.
  __device__ __forceinline__ float at(std::int64_t start, int k) const {
    const std::int64_t K = channels;
    float v = image.at(start + k);
    if (vectors != nullptr) v = relu(fmaf(v, vectors[kScale * K + k], vectors[kShift * K + k]));
    return multiplied(v, image.number, tf32);
  }
};

}  // namespace fused_res::cuda
