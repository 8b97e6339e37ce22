// The rows of a weight and the covariance of what it multiplies, as the kernels of the moment form take them.
#pragma once

#include <cmath>
#include <vector>

#include "products.h"

namespace fused_res::cpu {

// Rows of a weight in a task, about.
constexpr int64_t kSpreadRows = 64;

// A `Spread` of a weight [C, K], with what it points to.
class SpreadRows {
 public:
  SpreadRows(const Tensor& weight, const OptionalTensor& covariance, double ratio) : spread_{} {
    const int64_t channels = weight.size(0), depth = weight.size(1);
    spread_.channels = channels;
    spread_.depth = depth;
    spread_.block = block_rows(channels, kSpreadRows);
    spread_.weight = data(weight);
    spread_.ratio = ratio;
    if (!covariance) return;
    packed_ = packed(*covariance, false);
    suspect_ = new_tensor(weight, {channels}, ScalarType::Bool);
    const double* g = static_cast<const double*>(data(*covariance));
    for (int64_t k = 0; k < depth; ++k) deviations_.push_back(std::sqrt(g[k * depth + k]));
    spread_.packed = data(packed_);
    spread_.suspect = static_cast<uint8_t*>(output(suspect_));
    spread_.deviations = deviations_.data();
  }
  SpreadRows(const SpreadRows&) = delete;

  Spread& get() { return spread_; }
  int64_t tasks() const { return divide_up(spread_.channels, spread_.block); }
  // What a kernel takes of its memory, with `rows` of its own.
  int64_t bytes(int64_t rows) const { return block_elements(2 * spread_.block + rows, spread_.depth) * 8; }

  // After the kernel: which rows are suspect, and how many; none without a covariance.
  const OptionalTensor& suspect() const { return suspect_; }
  int64_t suspects() const {
    return suspect_ ? std::count_if(spread_.suspect, spread_.suspect + spread_.channels, [](uint8_t s) { return s; })
                    : 0;
  }

 private:
  Spread spread_;
  OptionalTensor packed_, suspect_;
  std::vector<double> deviations_;
};

}  // namespace fused_res::cpu
