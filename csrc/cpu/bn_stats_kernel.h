// Statistics of a tile, in one pass: the mean and squared deviations of a few rows at a time, while they are in
// registers, are merged into their block's, and the blocks into the tile's, by the formula of Chan, Golub and LeVeque.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// Merges `group` rows, of which `seen` came before in the block. Where the tensor is as wide as the arithmetic, values
// count from a pivot, which keeps the digits of a mean far from 0; narrower ones have none to lose.
template <int group, bool pivoted, class T, class A>
inline void add_group(const T* y, int64_t stride, int64_t seen, int64_t channels, const A* pivot, A* mean, A* squares) {
  using V = typename Arithmetic<T>::Vec;
  const A more = group / static_cast<A>(seen + group);
  const V weight = V::set(more), both = V::set(more * static_cast<A>(seen)), share = V::set(A(1) / group);
  for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
    V x[group];
    for (int i = 0; i < group; ++i) {
      x[i] = load<V>(y + i * stride + c, lanes);
      if (pivoted) x[i] = x[i] - V::load(pivot + c);
    }
    V m = x[0], q = V::set(0);
    for (int i = 1; i < group; ++i) m = m + x[i];
    m = m * share;
    for (int i = 0; i < group; ++i) q = fma(x[i] - m, x[i] - m, q);
    const V old = V::load(mean + c), delta = m - old;
    fma(delta, weight, old).store(mean + c);
    (V::load(squares + c) + fma(delta * delta, both, q)).store(squares + c);
  });
}

// Mean and sum of squared deviations of a block of n rows.
template <class T, class A>
inline void block_statistics(const T* y, int64_t n, int64_t stride, int64_t channels, A* mean, A* squares) {
  using V = typename Arithmetic<T>::Vec;
  constexpr int group = 8;
  constexpr bool pivoted = sizeof(T) == sizeof(A);
  alignas(64) A pivot[kStretch];
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
  if (pivoted) {
    // Roughly the mean: of a few rows, so that no single one of them sets it.
    const int64_t few = min(n, group);
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      V sum = load<V>(y + c, lanes);
      for (int64_t p = 1; p < few; ++p) sum = sum + load<V>(y + p * stride + c, lanes);
      (sum * V::set(1 / static_cast<A>(few))).store(pivot + c);
    });
  }
  int64_t p = 0;
  for (; p + group <= n; p += group) {
    add_group<group, pivoted>(y + p * stride, stride, p, channels, pivot, mean, squares);
  }
  for (; p < n; ++p) add_group<1, pivoted>(y + p * stride, stride, p, channels, pivot, mean, squares);
  if (!pivoted) return;
  for (int64_t c = 0; c < channels; ++c) mean[c] += pivot[c];
}

template <class T>
void bn_stats(const BnStats& a, int64_t begin, int64_t end) {
  using A = typename Arithmetic<T>::type;
  const Tiling& tiling = a.tiling;
  const int64_t stride = tiling.channels;
  alignas(64) A mean[kStretch], squares[kStretch], block_mean[kStretch], block_squares[kStretch];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task / tiling.stretches, from = task % tiling.stretches * kStretch;
    const int64_t first = tile * tiling.rows, rows = min(tiling.rows, tiling.pixels - first);
    const int64_t channels = min(kStretch, tiling.channels - from);
    const T* y = static_cast<const T*>(a.y) + first * stride + from;
    for (int64_t seen = 0; seen < rows; seen += tiling.block) {
      const int64_t more = min(tiling.block, rows - seen);
      block_statistics(y + seen * stride, more, stride, channels, seen == 0 ? mean : block_mean,
                       seen == 0 ? squares : block_squares);
      if (seen == 0) continue;
      const A weight = static_cast<A>(more) / static_cast<A>(seen + more), both = static_cast<A>(seen) * weight;
      for (int64_t c = 0; c < channels; ++c) {
        const A delta = block_mean[c] - mean[c];
        mean[c] += delta * weight;
        squares[c] += block_squares[c] + delta * delta * both;
      }
    }
    A* partials = static_cast<A*>(a.partials) + tile * 2 * stride + from;
    std::memcpy(partials, mean, channels * sizeof(A));
    std::memcpy(partials + stride, squares, channels * sizeof(A));
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
