// Reads BN's parameters, in whatever dtype they are.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "launch.h"

namespace fused_res::cpu {

class Parameter {
 public:
  Parameter(const OptionalTensor& tensor, double otherwise)
      : data_(data(tensor)), dtype_(tensor ? dtype_of(*tensor) : kFloat), otherwise_(otherwise) {}

  double operator[](int64_t i) const {
    if (data_ == nullptr) return otherwise_;
    switch (dtype_) {
      case kHalf:
        return static_cast<float>(static_cast<const torch::headeronly::Half*>(data_)[i]);
      case kBFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data_)[i]);
      case kDouble:
        return static_cast<const double*>(data_)[i];
      default:
        return static_cast<const float*>(data_)[i];
    }
  }

 private:
  const void* data_;
  Dtype dtype_;
  double otherwise_;
};

// Channels that are finalized together: their sums, in double, stay in the innermost cache.
constexpr int64_t kChannels = 64;

// Runs f(from, to) over stretches of channels.
template <class F>
void for_stretches(int64_t channels, int64_t tiles, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (kChannels * std::max<int64_t>(1, tiles)));
  torch::stable::parallel_for(0, divide_up(channels, kChannels), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * kChannels, std::min(channels, (i + 1) * kChannels));
  });
}

}  // namespace fused_res::cpu
