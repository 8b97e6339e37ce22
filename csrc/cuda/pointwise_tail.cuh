// Kernel of `pointwise_tail`: a 1x1 convolution, its BN, the shortcut, the ReLU and its signs, in one pass; without
// signs it is a convolution in evaluation.
#pragma once

#include "pointwise.cuh"

namespace fused_res::cuda {

/// A 1x1 convolution and the BN behind it.
struct Branch {
  Activation z;
  const void* weight;    // [C, K]
  const float* vectors;  // [5, C]
};

struct PointwiseTail {
  Branch main;
  Branch projection;      // weight null: none
  const void* other;      // [P, C] or null: the identity shortcut, or the projection's convolution output
  const float* vectors2;  // [5, C] of the latter, null for the former
  void* out;              // [P, C]
  std::uint8_t* signs;    // [P, ceil(C / 8)] or null
  int channels;
};

/// A pair of a per-channel vector's elements from an even channel on; zeros past the last channel.
template <bool kWide>
__device__ __forceinline__ float2 load_pair(const float* row, std::int64_t channel, std::int64_t channels) {
  if constexpr (kWide) return channel < channels ? __ldg(reinterpret_cast<const float2*>(row + channel)) : float2{};
  return {channel < channels ? __ldg(row + channel) : 0.f, channel + 1 < channels ? __ldg(row + channel + 1) : 0.f};
}

/// `scale * value + shift`, into `value` or added to `to`: two channels of each 8 are a lane's.
template <bool kWide, class Tiling>
__device__ __forceinline__ void normalise(Accumulators<Tiling>& value, const float* vectors, int column,
                                          std::int64_t channels, Accumulators<Tiling>* to = nullptr) {
  const std::int64_t first = std::int64_t{column} + Tiling::warp_column() + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int j = 0; j < Tiling::kTilesAcross; ++j) {
    const float2 scale = load_pair<kWide>(vectors + kScale * channels, first + 8 * j, channels);
    const float2 shift = load_pair<kWide>(vectors + kShift * channels, first + 8 * j, channels);
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float& v = value.value[i][j][r];
        v = fmaf(v, r % 2 == 0 ? scale.x : scale.y, r % 2 == 0 ? shift.x : shift.y);
        if (to != nullptr) to->value[i][j][r] += v;
      }
    }
  }
}

/// Of a multiprocessor at once; two accumulators take more than 128 registers of a thread.
template <class Tiling, bool kWide, bool kProjection>
constexpr int kTailBlocks = !kWide        ? 1
                            : kProjection ? 384 / Tiling::kThreads
                                          : Tiling::kBlocks;

template <class T, class Tiling, bool kWide, bool kProjection>
__global__ void __launch_bounds__(Tiling::kThreads, kTailBlocks<Tiling, kWide, kProjection>)
    pointwise_tail_kernel(PointwiseTail a) {
  using Result = Groups<T, Tiling>;
  union alignas(512) Memory {
    typename Pointwise<T, Tiling, kWide>::Core::Memory product;
    typename Result::Memory groups;
  };
  Memory& memory = shared_memory<Memory>();
  const std::int64_t C = a.channels;
  const TileOf tile = tile_of<Tiling>(a.main.z.pixels, a.channels);
  Accumulators<Tiling> sum;
  Pointwise<T, Tiling, kWide>::add(sum, memory.product, a.main.z, a.main.weight, a.channels, tile.row, tile.column);
  normalise<kWide>(sum, a.main.vectors, tile.column, C);
  if constexpr (kProjection) {
    Accumulators<Tiling> second;
    Pointwise<T, Tiling, kWide>::add(second, memory.product, a.projection.z, a.projection.weight, a.channels, tile.row,
                                     tile.column);
    normalise<kWide>(second, a.projection.vectors, tile.column, C, &sum);
  }

  constexpr int kCount = kGroup<T>;
  const Place at = place_of<T, Tiling>(tile, a.channels);
  const T* other = static_cast<const T*>(a.other) + tile.row * C + at.channel;
  T* out = static_cast<T*>(a.out) + tile.row * C + at.channel;
  const bool joined = !kProjection && a.other != nullptr;
  Affine<kCount> second{};
  if (joined) {
    if (a.vectors2 != nullptr) {
      second = load_affine<kWide, kCount>(a.vectors2, C, at);
    } else {
#pragma unroll
      for (float& scale : second.scale) scale = 1.f;
    }
  }
  Result::each(
      sum, memory.groups,
      [&](int row) { return load<T, kWide>(other + row * C, joined && row < tile.left ? at.valid : 0); },
      [&](int row, const float (&value)[kCount], const Pack& joins) {
        const int valid = row < tile.left ? at.valid : 0;
        float result[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          float v = value[j];
          if constexpr (!kProjection) v += second(j, get<T>(joins, j));
          result[j] = relu(v);
        }
        const Pack rounded = pack<T>(result);
        store<T, kWide>(out + row * C, rounded, valid);
        if (a.signs != nullptr) {
          unsigned open = 0;
#pragma unroll
          for (int j = 0; j < kCount; ++j) open |= static_cast<unsigned>(is_open(get<T>(rounded, j))) << j;
          store_signs<kCount>(a.signs, open, tile.row + row, at.channel, valid, a.channels);
        }
      });
}

template <class T>
void pointwise_tail(const PointwiseTail& a, Tile tile, const Queue& queue) {
  const auto with = [&](auto tiling, auto wide, auto projection) {
    using Tiling = typename decltype(tiling)::type;
    launch(pointwise_tail_kernel<T, Tiling, decltype(wide)::value, decltype(projection)::value>,
           tiles_of<Tiling>(a.main.z.pixels, a.channels), queue, a, Tiling::kThreads);
  };
  const bool projects = a.projection.weight != nullptr;
  const bool wide =
      moves_wide(a.channels, kGroup<T>,
                 {a.main.z.image, a.main.z.vectors, a.main.weight, a.other, a.vectors2, a.out}) &&
      moves_wide(a.main.z.channels, kGroup<T>, {a.projection.z.image, a.projection.z.vectors, a.projection.weight}) &&
      (!projects || a.projection.z.channels % kGroup<T> == 0);
  if (!wide) {
    projects ? with(Type<SmallTiling>{}, std::false_type{}, std::true_type{})
             : with(Type<SmallTiling>{}, std::false_type{}, std::false_type{});
  } else if (projects) {
    with(Type<SmallTiling>{}, std::true_type{}, std::true_type{});
  } else if (tile == Tile::kSmall) {
    with(Type<SmallTiling>{}, std::true_type{}, std::false_type{});
  } else {
    with(Type<LargeTiling>{}, std::true_type{}, std::false_type{});
  }
}

}  // namespace fused_res::cuda
