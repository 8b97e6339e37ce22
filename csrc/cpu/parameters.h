// Reads BN's parameters and writes results of whatever dtype they are.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

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

// Results, rounded to whatever dtype they are.
class Result {
 public:
  explicit Result(const Tensor& tensor) : data_(output(tensor)), dtype_(dtype_of(tensor)) {}

  void set(int64_t i, double value) const {
    switch (dtype_) {
      case kHalf:
        static_cast<torch::headeronly::Half*>(data_)[i] = static_cast<float>(value);
        break;
      case kBFloat16:
        static_cast<torch::headeronly::BFloat16*>(data_)[i] = static_cast<float>(value);
        break;
      case kDouble:
        static_cast<double*>(data_)[i] = value;
        break;
      default:
        static_cast<float*>(data_)[i] = static_cast<float>(value);
    }
  }

 private:
  void* data_;
  Dtype dtype_;
};

// What a BN's vectors [kVectors, channels] follow from beside statistics.
struct Affine {
  Parameter gamma, beta;
  double eps, a;

  Affine(const OptionalTensor& gamma, const OptionalTensor& beta, double eps, const OptionalTensor& residual_scale)
      : gamma(gamma, 1), beta(beta, 0), eps(eps), a(Parameter(residual_scale, 1)[0]) {}

  // Those of channel c, from its mean and biased variance.
  void set(const Result& vectors, int64_t channels, int64_t c, double mean, double var) const {
    const double invstd = 1 / std::sqrt(var + eps), scale = gamma[c] * invstd, shift = beta[c] - scale * mean;
    const double rows[kVectors] = {mean, var, invstd, a * scale, a * shift};
    for (int64_t row = 0; row < kVectors; ++row) vectors.set(row * channels + c, rows[row]);
  }
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
