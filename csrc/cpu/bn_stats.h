// What launchers of more than one file call.
#pragma once

#include "launch.h"

namespace fused_res::cpu {

std::tuple<Tensor, int64_t> bn_stats(const Tensor& y);

}  // namespace fused_res::cpu
