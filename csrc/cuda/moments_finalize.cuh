// Kernel of `moments_finalize`: means and variances by the moments of what the convolution reads become a BN. With the
// direct pass in front of it that is three launches, whatever the data.
#pragma once

#include "pointwise_direct.cuh"

namespace fused_res::cuda {

struct MomentsFinalize {
  Spreads spreads;
  DirectPartials direct;
  Parameter gamma, beta, residual_scale;
  float* vectors;  // [5, C]
  bool* suspect;   // [C]
  double eps;
  int channels;
};

static __global__ void __launch_bounds__(kThreads) moments_finalize_kernel(MomentsFinalize a) {
  const std::int64_t C = a.channels, c = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= C) return;
  double mean = a.spreads.sum(kSpreadMean, c, C), var = a.spreads.sum(kSpreadVar, c, C);
  const bool suspect = a.spreads.suspects(c, C);
  if (var < 0.) var = 0.;
  if (suspect) a.direct.statistics(c, C, mean, var);
  const double invstd = 1. / sqrt(var + a.eps);
  double scale = invstd;
  if (a.gamma.data != nullptr) scale *= a.gamma.wide(c);
  double shift = -scale * mean;
  if (a.beta.data != nullptr) shift += a.beta.wide(c);
  if (a.residual_scale.data != nullptr) {
    const double factor = a.residual_scale.wide(0);
    scale *= factor;
    shift *= factor;
  }
  a.suspect[c] = suspect;
  a.vectors[kMean * C + c] = static_cast<float>(mean);
  a.vectors[kVar * C + c] = static_cast<float>(var);
  a.vectors[kInvstd * C + c] = static_cast<float>(invstd);
  a.vectors[kScale * C + c] = static_cast<float>(scale);
  a.vectors[kShift * C + c] = static_cast<float>(shift);
}

inline void moments_finalize(const MomentsFinalize& a, const Queue& queue) {
  launch(moments_finalize_kernel, static_cast<unsigned>((std::int64_t{a.channels} + kThreads - 1) / kThreads), queue,
         a);
}

}  // namespace fused_res::cuda
