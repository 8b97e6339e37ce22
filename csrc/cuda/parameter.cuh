// What the finalize kernels share: parameters of any floating-point format, and how threads share partial results.
#pragma once

#include "launch.cuh"
#include "merge.cuh"

namespace fused_res::cuda {

/// A vector or scalar of the model's, or null.
struct Parameter {
  const void* data;
  Number number;

  __device__ __forceinline__ float at(std::int64_t i) const {
    switch (number) {
      case Number::kHalf:
        return widen(static_cast<const Half*>(data)[i]);
      case Number::kBFloat16:
        return widen(static_cast<const BFloat16*>(data)[i]);
      case Number::kDouble:
        return widen(static_cast<const double*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }

  /// Nothing of a double is lost.
  __device__ __forceinline__ double wide(std::int64_t i) const {
    return number == Number::kDouble ? static_cast<const double*>(data)[i] : static_cast<double>(at(i));
  }
};

/// A block takes 32 bytes of every tile's partial results: few enough for many blocks, enough for whole memory sectors.
constexpr int kFinalizeChannels = 8;
constexpr int kFinalizeSlots = kThreads / kFinalizeChannels;

inline unsigned finalize_blocks(int channels) {
  return static_cast<unsigned>((std::int64_t{channels} + kFinalizeChannels - 1) / kFinalizeChannels);
}

}  // namespace fused_res::cuda
