// The rows of the small tensors that BN's steps hand on, [rows, channels].
#pragma once

namespace fused_res {

// Of `bn_finalize`.
enum Vector { kMean, kVar, kInvstd, kScale, kShift, kVectors };

// Of `bn_act_backward_finalize`.
enum Coefficient { kP, kQ, kR, kDgamma, kDbeta, kDscale, kDbias, kCoefficients };

}  // namespace fused_res
