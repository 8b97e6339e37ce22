// Statistics of a tile: in each block of rows, while it is in the cache, the mean and then the deviations from it; the
// blocks are merged by the formula of Chan, Golub and LeVeque.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// sums[c] += f(row, c) over n rows, four rows at a time.
template <class V, class A, class F>
inline void add_rows(A* sums, int64_t n, int64_t channels, F f) {
  int64_t p = 0;
  for (; p + 4 <= n; p += 4) {
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      const V four = (f(p, c, lanes) + f(p + 1, c, lanes)) + (f(p + 2, c, lanes) + f(p + 3, c, lanes));
      (V::load(sums + c) + four).store(sums + c);
    });
  }
  for (; p < n; ++p) {
    for_channels<V::width>(channels,
                           [&](int64_t c, auto lanes) { (V::load(sums + c) + f(p, c, lanes)).store(sums + c); });
  }
}

// Mean and sum of squared deviations of a block of n rows.
template <class T, class A>
inline void block_statistics(const T* y, int64_t n, int64_t stride, int64_t channels, A* mean, A* squares) {
  using V = typename Arithmetic<T>::Vec;
  alignas(64) A rest[kStretch];
  const A count = static_cast<A>(n);
  for (int64_t c = 0; c < channels; ++c) mean[c] = rest[c] = squares[c] = 0;
  add_rows<V>(mean, n, channels, [&](int64_t p, int64_t c, auto lanes) { return load<V>(y + p * stride + c, lanes); });
  for (int64_t c = 0; c < channels; ++c) mean[c] /= count;
  int64_t p = 0;
  for (; p + 2 <= n; p += 2) {
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      const V m = V::load(mean + c);
      const V a = load<V>(y + p * stride + c, lanes) - m, b = load<V>(y + (p + 1) * stride + c, lanes) - m;
      (V::load(rest + c) + (a + b)).store(rest + c);
      fma(a, a, fma(b, b, V::load(squares + c))).store(squares + c);
    });
  }
  for (; p < n; ++p) {
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      const V a = load<V>(y + p * stride + c, lanes) - V::load(mean + c);
      (V::load(rest + c) + a).store(rest + c);
      fma(a, a, V::load(squares + c)).store(squares + c);
    });
  }
  // The deviations add up to what rounding left out of the mean. Where the mean is infinite they are NaN, and it stays.
  for (int64_t c = 0; c < channels; ++c) {
    const A error = rest[c] / count, correction = error * rest[c];
    mean[c] = error == error ? mean[c] + error : mean[c];
    squares[c] = squares[c] < correction ? 0 : squares[c] - correction;
  }
}

template <class T>
void bn_stats(const BnStats& a, int64_t begin, int64_t end) {
  using A = typename Arithmetic<T>::type;
  const Tiling& tiling = a.tiling;
  const int64_t stride = tiling.channels;
  // The vector that covers the last channels may reach past them.
  alignas(64) A mean[kStretch], squares[kStretch], block_mean[kStretch], block_squares[kStretch];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task / tiling.stretches, from = task % tiling.stretches * kStretch;
    const int64_t first = tile * tiling.rows, rows = min(tiling.rows, tiling.pixels - first);
    const int64_t channels = min(kStretch, tiling.channels - from);
    const T* y = static_cast<const T*>(a.y) + first * stride + from;
    for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
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
