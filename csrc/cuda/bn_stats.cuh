// Kernel of `bn_stats`: mean and sum of squared deviations of every channel, tile by tile.
#pragma once

#include "launch.cuh"
#include "merge.cuh"

namespace fused_res::cuda {

struct BnStats {
  const void* y;      // [P, C]
  float* partials;    // [T, 2, C]
  std::int64_t rows;  // of a tile
  Layout layout;
};

/// The middle one of three values; any of them where one is NaN.
__device__ __forceinline__ float median(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c < high ? c : high;
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) bn_stats_kernel(BnStats a) {
  constexpr int kCount = kGroup<T>, kRows = kWide ? 4 : 1;
  const Place at = locate<T>(a.layout);
  const std::int64_t C = a.layout.channels, first = at.block * a.rows;
  const std::int64_t end = first + a.rows < a.layout.rows ? first + a.rows : a.layout.rows;
  const T* y = static_cast<const T*>(a.y) + at.channel;

  // Float values count from the median of three of the tile's rows, which keeps the digits of a mean far from 0 and is
  // no outlier, where one row is: all values would be that far away. Narrower formats have no digits to lose.
  float pivot[kCount] = {};
  if constexpr (std::is_same_v<T, float>) {
    const int valid = first < end ? at.valid : 0;
    float middle[kCount], last[kCount];
    load_vector<kWide>(pivot, y + first * C, valid);
    load_vector<kWide>(middle, y + (first + (end - first) / 2) * C, valid);
    load_vector<kWide>(last, y + (end - 1) * C, valid);
#pragma unroll
    for (int j = 0; j < kCount; ++j) pivot[j] = median(pivot[j], middle[j], last[j]);
  }

  // Welford's update: with n rows before, a row at distance delta moves the mean by delta / (n + 1) and adds
  // delta^2 * n / (n + 1) to the squares.
  Moments<kCount> moments{};
  const int down = a.layout.down;
  for (std::int64_t row = at.valid ? first + at.row : end; row < end; row += kRows * down) {
    Pack values[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const std::int64_t r = row + u * down;
      values[u] = load<T, kWide>(y + r * C, r < end ? at.valid : 0);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      if (row + u * down < end) {
        const float n = moments.count, weight = __fdividef(1.f, n + 1.f);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float delta = get<T>(values[u], j) - pivot[j] - moments.mean[j];
          moments.mean[j] += delta * weight;
          moments.squares[j] += delta * (delta * (n * weight));
        }
        moments.count = n + 1.f;
      }
    }
  }

  merge_moments(moments, at.row, down, a.layout.across);
  if (at.row == 0) {
    float* to = a.partials + at.block * 2 * C + at.channel;
#pragma unroll
    for (int j = 0; j < kCount; ++j) moments.mean[j] += pivot[j];
    store_vector<kWide>(to, moments.mean, at.valid);
    store_vector<kWide>(to + C, moments.squares, at.valid);
  }
}

inline void bn_stats(BnStats a, Number number, std::int64_t tiles, const Queue& queue) {
  dispatch(number, moves_wide(a.layout.channels, group_of(number), {a.y, a.partials}), [&](auto type, auto wide) {
    using T = typename decltype(type)::type;
    launch(bn_stats_kernel<T, decltype(wide)::value>, static_cast<unsigned>(tiles * a.layout.chunks), queue, a);
  });
}

}  // namespace fused_res::cuda
