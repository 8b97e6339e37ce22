// Kernels of `pointwise_tail_backward_finalize`, and of the scaled weight that the other steps multiply by. In double,
// but for B.
#pragma once

#include "pointwise_direct.cuh"

namespace fused_res::cuda {

/// A weight as products multiply it, and A = diag(scale) W.
struct ScaledWeight {
  Parameter weight;      // [C, K]
  const float* vectors;  // [5, C], or null for the weight itself
  void* scaled;          // [C, K], of the weight's format
  int channels, depth;
  bool tf32;
};

static __global__ void __launch_bounds__(kThreads) scaled_weight_kernel(ScaledWeight a) {
  const std::int64_t C = a.channels, K = a.depth, e = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (e >= C * K) return;
  float value = a.weight.at(e);
  if (a.vectors != nullptr) value *= a.vectors[kScale * C + e / K];
  store_number(a.scaled, a.weight.number, e, multiplied(value, a.weight.number, a.tf32));
}

inline void scaled_weight(const ScaledWeight& a, const Queue& queue) {
  const std::int64_t elements = std::int64_t{a.channels} * a.depth;
  launch(scaled_weight_kernel, static_cast<unsigned>((elements + kThreads - 1) / kThreads), queue, a);
}

/// The rows of what `pointwise_tail_backward_finalize` gives for every channel.
enum TailCoefficient { kTailDgamma, kTailDbeta, kTailDscale, kTailDbias, kTailCoefficients };

/// D of every channel, and the gradients of its parameters.
struct TailBackwardRows {
  const double *total, *product;  // sum g [C], M [C, K]
  Parameter weight;               // [C, K]
  const float* vectors;           // [5, C]
  Suspects suspects;
  DirectPartials direct;
  Parameter gamma, beta, residual_scale;
  float* coefficients;  // [kTailCoefficients, C]
  double* shares;       // i D / P [C]
  std::int64_t pixels;
  int channels, depth;
  bool training;
};

static __global__ void __launch_bounds__(kThreads) pointwise_tail_backward_finalize_rows_kernel(TailBackwardRows a) {
  const std::int64_t C = a.channels, K = a.depth;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t c = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (c >= C) return;
  double d = 0.;
  for (int k = lane; k < a.depth; k += 32) d += a.weight.wide(c * K + k) * a.product[c * K + k];
#pragma unroll
  for (int half = 16; half > 0; half /= 2) d += __shfl_down_sync(~0u, d, half);
  if (lane > 0) return;

  const auto vector = [&](int row) { return static_cast<double>(a.vectors[row * C + c]); };
  double total = a.total[c], dbias = 0.;
  if (!a.training) {
    d -= total * vector(kMean);
    dbias = vector(kScale) * total;
  } else if (a.suspects.at(c, C)) {
    d = a.direct.sum(c, C);
  }
  d *= vector(kInvstd);
  a.shares[c] = vector(kInvstd) * d / static_cast<double>(a.pixels);
  double dscale = a.gamma.data != nullptr ? a.gamma.wide(c) * d : d;
  if (a.beta.data != nullptr) dscale += a.beta.wide(c) * total;
  if (a.residual_scale.data != nullptr) {
    const double factor = a.residual_scale.wide(0);
    d *= factor;
    total *= factor;
  }
  a.coefficients[kTailDgamma * C + c] = static_cast<float>(d);
  a.coefficients[kTailDbeta * C + c] = static_cast<float>(total);
  a.coefficients[kTailDscale * C + c] = static_cast<float>(dscale);
  a.coefficients[kTailDbias * C + c] = static_cast<float>(dbias);
}

inline void pointwise_tail_backward_finalize_rows(const TailBackwardRows& a, const Queue& queue) {
  constexpr int kRows = kThreads / 32;
  launch(pointwise_tail_backward_finalize_rows_kernel,
         static_cast<unsigned>((std::int64_t{a.channels} + kRows - 1) / kRows), queue, a);
}

/// dW = diag(s) (M - P diag(i D / P) W G), B = A^T diag(i D / P) W and b = A^T sum g / P.
struct TailBackwardProducts {
  const double *total, *product;  // sum g [C], M [C, K]
  const double* covariance;       // G [K, K] or null
  Parameter weight;               // [C, K]
  Parameter scaled;               // A [C, K], or null: neither B nor b is wanted
  const float* vectors;           // [5, C]
  const double* shares;           // [C]
  void* dweight;                  // [C, K], of the weight's format
  void* quadratic;                // [K, K], of A's format
  float* constant;                // [K]
  std::int64_t pixels;
  int channels, depth;
};

inline std::int64_t product_blocks(std::int64_t rows, std::int64_t columns) {
  return (rows + kProductRows - 1) / kProductRows * ((columns + kProductColumns - 1) / kProductColumns);
}

__device__ __forceinline__ void weight_gradient(const TailBackwardProducts& a, std::int64_t first, std::int64_t begin) {
  const std::int64_t C = a.channels, K = a.depth, k = begin + product_column();
  double weighted[kProductCount] = {};
  if (a.covariance != nullptr) {
    block_product<Lie::kAlongDepth>(
        a.depth, weighted, [&](int row, int d) { return first + row < C ? a.weight.wide((first + row) * K + d) : 0.; },
        [&](int d, int column) { return begin + column < K ? a.covariance[d * K + begin + column] : 0.; },
        [](const auto&, int, int) {});
  }
#pragma unroll
  for (int j = 0; j < kProductCount; ++j) {
    const std::int64_t c = first + product_row() + j;
    if (c >= C || k >= K) continue;
    double value = a.product[c * K + k];
    if (a.covariance != nullptr) value -= static_cast<double>(a.pixels) * a.shares[c] * weighted[j];
    value *= static_cast<double>(a.vectors[kScale * C + c]);
    store_number(a.dweight, a.weight.number, c * K + k, static_cast<float>(value));
  }
}

__device__ __forceinline__ void quadratic_form(const TailBackwardProducts& a, std::int64_t first, std::int64_t begin) {
  constexpr int kSlots = kThreads / kProductRows;
  const std::int64_t K = a.depth, k = begin + product_column();
  const int row = static_cast<int>(threadIdx.x) % kProductRows, slot = static_cast<int>(threadIdx.x) / kProductRows;
  float form[kProductCount] = {};
  double constant = 0.;
  block_product<Lie::kAlongRows>(
      a.channels, form, [&](int j, int c) { return first + j < K ? a.scaled.at(c * K + first + j) : 0.f; },
      [&](int c, int column) {
        return begin + column < K ? static_cast<float>(a.shares[c] * a.weight.wide(c * K + begin + column)) : 0.f;
      },
      [&](const auto& slices, int c, int n) {
        if (begin > 0) return;
        for (int d = slot; d < n; d += kSlots) constant += static_cast<double>(slices.left[d][row]) * a.total[c + d];
      });
#pragma unroll
  for (int j = 0; j < kProductCount; ++j) {
    const std::int64_t r = first + product_row() + j;
    if (r < K && k < K) store_number(a.quadratic, a.scaled.number, r * K + k, form[j]);
  }
  if (begin > 0) return;
  merge_double(constant, slot, kSlots, kProductRows);
  if (slot == 0 && first + row < K) {
    a.constant[first + row] = static_cast<float>(constant / static_cast<double>(a.pixels));
  }
}

static __global__ void __launch_bounds__(kThreads) pointwise_tail_backward_finalize_kernel(TailBackwardProducts a) {
  const std::int64_t across = (std::int64_t{a.depth} + kProductColumns - 1) / kProductColumns;
  const std::int64_t own = (std::int64_t{a.channels} + kProductRows - 1) / kProductRows * across;
  const bool gradient = blockIdx.x < own;
  const std::int64_t block = gradient ? blockIdx.x : blockIdx.x - own;
  const std::int64_t first = block / across * kProductRows, begin = block % across * kProductColumns;
  if (gradient) {
    weight_gradient(a, first, begin);
  } else {
    quadratic_form(a, first, begin);
  }
}

inline void pointwise_tail_backward_finalize(const TailBackwardProducts& a, const Queue& queue) {
  std::int64_t blocks = product_blocks(a.channels, a.depth);
  if (a.scaled.data != nullptr) blocks += product_blocks(a.depth, a.depth);
  launch(pointwise_tail_backward_finalize_kernel, static_cast<unsigned>(blocks), queue, a);
}

}  // namespace fused_res::cuda
