// The affine map of a BN, and the signs of the ReLU after it: bit j of byte i of a row stands for channel 8 * i + j.
#pragma once

#include "../vectors.h"
#include "rows.cuh"

namespace fused_res::cuda {

template <int kCount>
struct Affine {
  float scale[kCount];
  float shift[kCount];

  /// With one rounding, so that forward and backward take the same sign for every element.
  __device__ __forceinline__ float operator()(int j, float y) const { return fmaf(y, scale[j], shift[j]); }
};

template <bool kWide, int kCount>
__device__ __forceinline__ Affine<kCount> load_affine(const float* vectors, std::int64_t C, const Place& at) {
  Affine<kCount> affine;
  load_vector<kWide>(affine.scale, vectors + kScale * C + at.channel, at.valid);
  load_vector<kWide>(affine.shift, vectors + kShift * C + at.channel, at.valid);
  return affine;
}

__device__ __forceinline__ std::int64_t sign_byte(std::int64_t row, int channel, int channels) {
  return row * ((static_cast<std::int64_t>(channels) + 7) / 8) + channel / 8;
}

/// Keep the signs of a group, bit j of `open` for its channel j, 0 where there is no such channel (its scale and shift
/// were loaded as 0). All lanes of a warp must come here.
template <int kCount>
__device__ __forceinline__ void store_signs(std::uint8_t* signs, unsigned open, std::int64_t row, int channel,
                                            int valid, int channels) {
  if constexpr (kCount == 4) {
    // The neighbour has the byte's upper half. It is of the same row: `across` is even.
    open |= __shfl_down_sync(~0u, open, 1) << 4;
    if (channel % 8 != 0) return;
  }
  if (valid > 0) signs[sign_byte(row, channel, channels)] = static_cast<std::uint8_t>(open);
}

/// The signs of a group, as `store_signs` takes them.
template <int kCount>
__device__ __forceinline__ unsigned load_signs(const std::uint8_t* signs, std::int64_t row, int channel, int valid,
                                               int channels) {
  if (valid <= 0) return 0;
  const unsigned byte = __ldg(signs + sign_byte(row, channel, channels));
  return kCount == 4 && channel % 8 != 0 ? byte >> 4 : byte;
}

}  // namespace fused_res::cuda
