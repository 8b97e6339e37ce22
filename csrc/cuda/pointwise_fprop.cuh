// Kernel of a 1x1 `conv_fprop`: the product, stored, and the statistics of every channel of what is stored, tile by
// tile.
#pragma once

#include "pointwise.cuh"

namespace fused_res::cuda {

struct PointwiseFprop {
  Activation x;
  const void* weight;  // [C, K]
  void* y;             // [P, C]
  float* partials;     // [T, 2, C] or null
  int channels;
};

/// Mean and sum of squared deviations of the columns of a tile of a result, of its first `left` rows.
///
/// Each warp counts from its own mean, in two passes over its registers; its rows are merged with the other warps' in
/// order.
template <class Tiling>
struct ColumnMoments {
  struct Memory {
    alignas(16) float mean[Tiling::kWarpsDown][Tiling::kColumns];
    float squares[Tiling::kWarpsDown][Tiling::kColumns];
  };

  /// The sum over all rows of a warp: its lanes of a column add up what they have.
  static __device__ __forceinline__ float over_rows(float v) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) v += __shfl_xor_sync(~0u, v, mask);
    return v;
  }

  static __device__ __forceinline__ int rows_of(int warp, int left) {
    const int rows = left - warp * Tiling::kWarpRows;
    return rows < 0 ? 0 : rows < Tiling::kWarpRows ? rows : Tiling::kWarpRows;
  }

  /// A warp's own. All its lanes must come.
  static __device__ __forceinline__ void note(const Accumulators<Tiling>& values, Memory& memory, int left) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = Tiling::warp_row() / Tiling::kWarpRows;
    const int count = rows_of(warp, left);
    const float weight = count > 0 ? __fdividef(1.f, static_cast<float>(count)) : 0.f;
#pragma unroll
    for (int j = 0; j < Tiling::kTilesAcross; ++j) {
      float mean[2] = {}, squares[2] = {};
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (16 * i + r / 2 * 8 + lane / 4 < count) mean[r % 2] += values.value[i][j][r];
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) mean[c] = over_rows(mean[c]) * weight;
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float delta = values.value[i][j][r] - mean[r % 2];
          if (16 * i + r / 2 * 8 + lane / 4 < count) squares[r % 2] = fmaf(delta, delta, squares[r % 2]);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) squares[c] = over_rows(squares[c]);
      // All lanes of a column have its sums; for each j those of another row store them.
      if (lane / 4 == j % 8) {
        const int column = Tiling::warp_column() + 8 * j + lane % 4 * 2;
        ptx::shared_store(&memory.mean[warp][column], make_float2(mean[0], mean[1]));
        ptx::shared_store(&memory.squares[warp][column], make_float2(squares[0], squares[1]));
      }
    }
  }

  /// A column's, of all warps, after a barrier.
  static __device__ __forceinline__ Moments<1> merged(const Memory& memory, int column, int left) {
    Moments<1> moments{};
#pragma unroll 1
    for (int warp = 0; warp < Tiling::kWarpsDown; ++warp) {
      const float mean = ptx::shared_load<float>(&memory.mean[warp][column]);
      const float squares = ptx::shared_load<float>(&memory.squares[warp][column]);
      moments.merge(static_cast<float>(rows_of(warp, left)), [&](int, float& other_mean, float& other_squares) {
        other_mean = mean;
        other_squares = squares;
      });
    }
    return moments;
  }
};

template <class T, class Tiling, bool kWide>
__global__ void __launch_bounds__(Tiling::kThreads, kWide ? Tiling::kBlocks : 1)
    pointwise_fprop_kernel(PointwiseFprop a) {
  union alignas(512) Memory {
    typename Pointwise<T, Tiling, kWide>::Core::Memory product;
    typename Groups<T, Tiling>::Memory groups;
    typename ColumnMoments<Tiling>::Memory moments;
  };
  Memory& memory = shared_memory<Memory>();
  const TileOf tile = tile_of<Tiling>(a.x.pixels, a.channels);
  Accumulators<Tiling> sum;
  Pointwise<T, Tiling, kWide>::add(sum, memory.product, a.x, a.weight, a.channels, tile.row, tile.column);

  const Place at = place_of<T, Tiling>(tile, a.channels);
  const std::int64_t C = a.channels;
  T* y = static_cast<T*>(a.y) + tile.row * C + at.channel;
  Groups<T, Tiling>::each(
      sum, memory.groups, [](int) { return 0; },
      [&](int row, const float (&value)[kGroup<T>], int) {
        store<T, kWide>(y + row * a.channels, pack<T>(value), row < tile.left ? at.valid : 0);
      });

  if (a.partials == nullptr) return;
  // Of the values as they are stored.
#pragma unroll
  for (auto& across : sum.value) {
#pragma unroll
    for (auto& words : across) {
#pragma unroll
      for (float& value : words) value = widen(narrow<T>(value));
    }
  }
  __syncthreads();
  ColumnMoments<Tiling>::note(sum, memory.moments, tile.left);
  __syncthreads();
  float* partials = a.partials + tile.tile * 2 * C + tile.column;
  for (int column = static_cast<int>(threadIdx.x); column < Tiling::kColumns; column += Tiling::kThreads) {
    const Moments<1> moments = ColumnMoments<Tiling>::merged(memory.moments, column, tile.left);
    if (tile.column + column < a.channels) {
      partials[column] = moments.mean[0];
      partials[C + column] = moments.squares[0];
    }
  }
}

/// Rows of the tiles that the statistics are of.
constexpr int kFpropRows = SmallForwardTiling::kRows;
static_assert(kFpropRows == LargeForwardTiling::kRows);

template <class T>
void pointwise_fprop(const PointwiseFprop& a, Tile tile, const Queue& queue) {
  const auto with = [&](auto tiling, auto wide) {
    using Tiling = typename decltype(tiling)::type;
    launch(pointwise_fprop_kernel<T, Tiling, decltype(wide)::value>, tiles_of<Tiling>(a.x.pixels, a.channels), queue, a,
           Tiling::kThreads);
  };
  const bool wide =
      moves_wide(a.x.channels, kGroup<T>, {a.x.image, a.x.vectors, a.weight, a.y}) && a.channels % kGroup<T> == 0;
  if (!wide) {
    with(Type<SmallForwardTiling>{}, std::false_type{});
  } else if (tile == Tile::kSmall) {
    with(Type<SmallForwardTiling>{}, std::true_type{});
  } else {
    with(Type<LargeForwardTiling>{}, std::true_type{});
  }
}

}  // namespace fused_res::cuda
