// Kernel of `bn_finalize`: partial statistics become the scale and shift of a BN, in one launch.
#pragma once

#include "parameter.cuh"
#include "signs.cuh"

namespace fused_res::cuda {

struct BnFinalize {
  const float* partials;  // [T, 2, C]
  Parameter gamma, beta, residual_scale;
  float* vectors;  // [5, C]
  std::int64_t tiles;
  std::int64_t rows;  // of every tile but the last
  std::int64_t last;  // of the last
  std::int64_t pixels;
  int channels;
  float eps;
};

static __global__ void __launch_bounds__(kThreads) bn_finalize_kernel(BnFinalize a) {
  const int slot = static_cast<int>(threadIdx.x) / kFinalizeChannels;
  const std::int64_t C = a.channels;
  const std::int64_t c = std::int64_t{blockIdx.x} * kFinalizeChannels + threadIdx.x % kFinalizeChannels;
  const bool inside = c < C;

  // Means count from the first tile's, which keeps the digits of a mean far from 0; that tile itself counts as exactly
  // 0, so that a single tile passes unchanged, infinite or not.
  const float pivot = inside ? a.partials[c] : 0.f;
  Moments<1> moments{};
#pragma unroll 2
  for (std::int64_t t = inside ? slot : a.tiles; t < a.tiles; t += kFinalizeSlots) {
    const float* from = a.partials + 2 * t * C + c;
    const float mean = t > 0 ? __ldg(from) - pivot : 0.f, squares = __ldg(from + C);
    moments.merge(static_cast<float>(t < a.tiles - 1 ? a.rows : a.last), [&](int, float& m, float& s) {
      m = mean;
      s = squares;
    });
  }
  merge_moments(moments, slot, kFinalizeSlots, kFinalizeChannels);
  if (slot > 0 || !inside) return;

  const float mean = pivot + moments.mean[0];
  const float var = moments.squares[0] / static_cast<float>(a.pixels);
  const float invstd = 1.f / sqrtf(var + a.eps);
  float scale = invstd;
  if (a.gamma.data != nullptr) scale *= a.gamma.at(c);
  float shift = -scale * mean;
  if (a.beta.data != nullptr) shift += a.beta.at(c);
  if (a.residual_scale.data != nullptr) {
    const float factor = a.residual_scale.at(0);
    scale *= factor;
    shift *= factor;
  }
  a.vectors[kMean * C + c] = mean;
  a.vectors[kVar * C + c] = var;
  a.vectors[kInvstd * C + c] = invstd;
  a.vectors[kScale * C + c] = scale;
  a.vectors[kShift * C + c] = shift;
}

inline void bn_finalize(const BnFinalize& a, const Queue& queue) {
  launch(bn_finalize_kernel, finalize_blocks(a.channels), queue, a);
}

}  // namespace fused_res::cuda
