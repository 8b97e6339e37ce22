// What launchers of more than one file call.
#pragma once

#include "launch.h"

namespace fused_res::cpu {

std::tuple<Tensor, int64_t> bn_stats(const Tensor& y);
Tensor bn_stats_finalize(const Tensor& y, const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                         const OptionalTensor& residual_scale);
std::tuple<Tensor, OptionalTensor> bn_act(const Tensor& y, const Tensor& vectors, const OptionalTensor& skip,
                                          const OptionalTensor& y2, const OptionalTensor& vectors2, bool keep_signs,
                                          bool relu);

}  // namespace fused_res::cpu
