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
  Divider across = 1;  // by tiles side by side, which the launcher knows
};

/// Rows of the tiles that the statistics are of.
constexpr int kFpropRows = 64;

/// Mean and sum of squared deviations of the columns of each kFpropRows rows of a tile, of its first `left` rows.
///
/// Each 32 rows, which a warp has, count from their own mean, in two passes over its registers, and are merged in
/// order. Of 8 columns a lane has two, of every 8th row: what it has of all its columns it hands to others through
/// shared memory, in which each lane adds up two columns.
template <class Tiling>
struct ColumnMoments {
  static constexpr int kLanes = 8, kPitch = Tiling::kWarpColumns + 8;
  static constexpr int kPart = 32, kParts = Tiling::kRows / kPart, kMerged = kFpropRows / kPart;
  static_assert(Tiling::kWarpColumns == 64 && Tiling::kWarpRows % kPart == 0 && Tiling::kRows % kFpropRows == 0);
  struct Memory {
    alignas(16) float lane[Tiling::kWarps][kLanes][kPitch];
    float mean[kParts][Tiling::kColumns];
    float squares[kParts][Tiling::kColumns];
  };

  static __device__ __forceinline__ int rows_of(int part, int left) {
    const int rows = left - part * kPart;
    return rows < 0 ? 0 : rows < kPart ? rows : kPart;
  }

  /// A warp's own. All its lanes must come.
  static __device__ __forceinline__ void note(const Accumulators<Tiling>& values, Memory& memory, int left) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int p = 0; p < Tiling::kWarpRows / kPart; ++p) {
      const int part = Tiling::warp_row() / kPart + p, count = rows_of(part, left);
      // Of no rows nobody asks for the mean.
      const float weight = ptx::reciprocal(static_cast<float>(count));
      float* means = &memory.mean[part][Tiling::warp_column()];
      float2 sum[Tiling::kTilesAcross];
      each(values, p, count, sum, [](float sum, float v, int) { return sum + v; });
      float2 total = over_rows(sum, memory);
      ptx::shared_store(means + 2 * lane, make_float2(total.x * weight, total.y * weight));
      __syncwarp();
      float2 mean[Tiling::kTilesAcross];
#pragma unroll
      for (int j = 0; j < Tiling::kTilesAcross; ++j) {
        mean[j] = ptx::shared_load<float2>(means + 8 * j + lane % 4 * 2);
      }
      each(values, p, count, sum, [&](float sum, float v, int column) {
        const float from = v - (column % 2 == 0 ? mean[column / 2].x : mean[column / 2].y);
        return fmaf(from, from, sum);
      });
      ptx::shared_store(&memory.squares[part][Tiling::warp_column() + 2 * lane], over_rows(sum, memory));
    }
  }

  /// A column's, of the tile-th kFpropRows rows, after a barrier.
  static __device__ __forceinline__ float2 merged(const Memory& memory, int tile, int column, int left) {
    const int first = tile * kMerged;
    float2 found = make_float2(ptx::shared_load<float>(&memory.mean[first][column]),
                               ptx::shared_load<float>(&memory.squares[first][column]));
    float count = static_cast<float>(rows_of(first, left));
#pragma unroll
    for (int part = first + 1; part < first + kMerged; ++part) {
      const float more = static_cast<float>(rows_of(part, left));
      if (more == 0.f) break;
      const float weight = more * ptx::reciprocal(count + more);
      const float delta = ptx::shared_load<float>(&memory.mean[part][column]) - found.x;
      found.x = fmaf(delta, weight, found.x);
      found.y += fmaf(delta * delta, count * weight, ptx::shared_load<float>(&memory.squares[part][column]));
      count += more;
    }
    return found;
  }

 private:
  /// sum = add(sum, value, the lane's column), from 0 on, of the lane's rows of the first `count` of a part of the
  /// warp's.
  template <class Add>
  static __device__ __forceinline__ void each(const Accumulators<Tiling>& values, int part, int count,
                                              float2 (&sum)[Tiling::kTilesAcross], Add add) {
#pragma unroll
    for (int row = 0; row < kPart; row += 8) {
      const bool there = static_cast<int>(threadIdx.x % 32 / 4) < count - row;
#pragma unroll
      for (int j = 0; j < Tiling::kTilesAcross; ++j) {
        const float* two = values.value[(part * kPart + row) / 16][j] + row % 16 / 4;
        if (row == 0) {
          sum[j] = there ? make_float2(add(-0.f, two[0], 2 * j), add(-0.f, two[1], 2 * j + 1)) : make_float2(0.f, 0.f);
        } else if (there) {
          sum[j] = make_float2(add(sum[j].x, two[0], 2 * j), add(sum[j].y, two[1], 2 * j + 1));
        }
      }
    }
  }

  /// The sums of all lanes for the lane's own two columns, those from 2 * lane on.
  static __device__ __forceinline__ float2 over_rows(const float2 (&sum)[Tiling::kTilesAcross], Memory& memory) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    auto& lanes = memory.lane[threadIdx.x / 32];
    // What was there has been read.
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tiling::kTilesAcross; ++j) ptx::shared_store(&lanes[lane / 4][8 * j + lane % 4 * 2], sum[j]);
    __syncwarp();
    float2 total = ptx::shared_load<float2>(&lanes[0][2 * lane]);
#pragma unroll
    for (int p = 1; p < kLanes; ++p) {
      const float2 v = ptx::shared_load<float2>(&lanes[p][2 * lane]);
      total.x += v.x;
      total.y += v.y;
    }
    return total;
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
  const TileOf tile = tile_of<Tiling>(a.x.pixels, a.channels, a.across);
  Accumulators<Tiling> sum;
  Pointwise<T, Tiling, kWide>::add(sum, memory.product, a.x, a.weight, a.channels, tile.row, tile.column);

  const Place at = place_of<T, Tiling>(tile, a.channels);
  const std::int64_t C = a.channels;
  T* y = static_cast<T*>(a.y) + (tile.row + Groups<T, Tiling>::row()) * C + at.channel;
  Groups<T, Tiling>::each_rounded(sum, memory.groups, [&](TileRow row, const Pack& values) {
    store<T, kWide>(y + row.down * a.channels, values, row < tile.left ? at.valid : 0);
  });

  if (a.partials == nullptr) return;
  // Of the values as they are stored.
#pragma unroll
  for (auto& across : sum.value) {
#pragma unroll
    for (auto& words : across) {
#pragma unroll
      for (int r = 0; r < 4; r += 2) round_pair<T>(words[r], words[r + 1]);
    }
  }
  __syncthreads();
  ColumnMoments<Tiling>::note(sum, memory.moments, tile.left);
  __syncthreads();
  static_assert(Tiling::kColumns % Tiling::kThreads == 0);
#pragma unroll
  for (int t = 0; t < Tiling::kRows / kFpropRows; ++t) {
    if (t * kFpropRows >= tile.left) break;
    float* partials = a.partials + (tile.row / kFpropRows + t) * 2 * C + tile.column;
#pragma unroll
    for (int first = 0; first < Tiling::kColumns; first += Tiling::kThreads) {
      const int column = first + static_cast<int>(threadIdx.x);
      if (tile.column + column < a.channels) {
        const float2 moments = ColumnMoments<Tiling>::merged(memory.moments, t, column, tile.left);
        partials[column] = moments.x;
        partials[C + column] = moments.y;
      }
    }
  }
}

template <class T>
void pointwise_fprop(const PointwiseFprop& a, Tile tile, const Queue& queue) {
  const auto with = [&](auto tiling, auto wide) {
    using Tiling = typename decltype(tiling)::type;
    PointwiseFprop arguments = a;
    arguments.across = tiles_across<Tiling>(a.channels);
    launch(pointwise_fprop_kernel<T, Tiling, decltype(wide)::value>, tiles_of<Tiling>(a.x.pixels, a.channels), queue,
           arguments, Tiling::kThreads);
  };
  const bool wide =
      moves_wide(a.x.channels, kGroup<T>, {a.x.image, a.x.vectors, a.weight, a.y}) && a.channels % kGroup<T> == 0;
  if (!wide) {
    with(Type<SmallForwardTiling>{}, std::false_type{});
  } else if (tile == Tile::kSmall) {
    with(Type<SmallForwardTiling>{}, std::true_type{});
  } else {
    with(Type<TallForwardTiling>{}, std::true_type{});
  }
}

}  // namespace fused_res::cuda
