// The quadratic forms w'Gw of the rows of a weight, with G a covariance: the variances of a 1x1 convolution's output,
// by those of its input. And which of them cannot be trusted.
#pragma once

#include "block_product.cuh"
#include "parameter.cuh"

namespace fused_res::cuda {

/// What a stretch of G's columns adds to a row's mean, variance, and the most that the variance could be (its root).
enum SpreadPart { kSpreadMean, kSpreadVar, kSpreadMost, kSpreadParts };

struct Spread {
  const double* mean;        // [K]
  const double* covariance;  // [K, K]
  Parameter weight;          // [C, K]
  double* parts;             // [stretches, kSpreadParts, C]
  int channels, depth;
};

inline std::int64_t spread_stretches(std::int64_t depth) { return (depth + kProductColumns - 1) / kProductColumns; }

static __global__ void __launch_bounds__(kThreads) spread_kernel(Spread a) {
  const int stretches = (a.depth + kProductColumns - 1) / kProductColumns;
  const int stretch = static_cast<int>(blockIdx.x) % stretches;
  const std::int64_t C = a.channels, K = a.depth;
  const std::int64_t first = std::int64_t{blockIdx.x / stretches} * kProductRows,
                     begin = std::int64_t{stretch} * kProductColumns;
  const std::int64_t k = begin + product_column();
  const auto weight = [&](std::int64_t c, std::int64_t k) { return c < C && k < K ? a.weight.wide(c * K + k) : 0.; };

  double weighted[kProductCount] = {};
  block_product<Lie::kAlongDepth>(
      a.depth, weighted, [&](int row, int d) { return weight(first + row, d); },
      [&](int d, int column) { return begin + column < K ? a.covariance[d * K + begin + column] : 0.; },
      [](const auto&, int, int) {});

  const double deviation = k < K ? sqrt(a.covariance[k * K + k]) : 0., mean = k < K ? a.mean[k] : 0.;
#pragma unroll
  for (int j = 0; j < kProductCount; ++j) {
    const std::int64_t c = first + product_row() + j;
    const double w = weight(c, k);
    double part[kSpreadParts];
    part[kSpreadMean] = w * mean;
    part[kSpreadVar] = w * weighted[j];
    part[kSpreadMost] = fabs(w) * deviation;
#pragma unroll
    for (int i = 0; i < kSpreadParts; ++i) {
      merge_double(part[i], product_column(), kProductColumns, 1);
      if (product_column() == 0 && c < C) a.parts[(std::int64_t{stretch} * kSpreadParts + i) * C + c] = part[i];
    }
  }
}

inline void spread(const Spread& a, const Queue& queue) {
  const std::int64_t rows = (std::int64_t{a.channels} + kProductRows - 1) / kProductRows;
  launch(spread_kernel, static_cast<unsigned>(rows * spread_stretches(a.depth)), queue, a);
}

/// What `spread_kernel` has left.
struct Spreads {
  const double* parts;  // [stretches, kSpreadParts, C]
  std::int64_t stretches;
  double ratio;

  __device__ __forceinline__ double sum(SpreadPart part, std::int64_t c, std::int64_t C) const {
    double total = 0.;
    for (std::int64_t s = 0; s < stretches; ++s) total += parts[(s * kSpreadParts + part) * C + c];
    return total;
  }

  /// Whether too many digits of the variance have cancelled.
  __device__ __forceinline__ bool suspects(std::int64_t c, std::int64_t C) const {
    const double most = sum(kSpreadMost, c, C);
    return sum(kSpreadVar, c, C) < ratio * (most * most);
  }
};

/// Which channels those are: as they have been found, or by the parts.
struct Suspects {
  const bool* known;  // [C] or null
  Spreads spreads;

  __device__ __forceinline__ bool at(std::int64_t c, std::int64_t C) const {
    return known != nullptr ? known[c] : spreads.suspects(c, C);
  }
};

}  // namespace fused_res::cuda
