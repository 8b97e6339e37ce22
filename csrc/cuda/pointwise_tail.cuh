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
  Divider across = 1;  // by tiles side by side, which the launcher knows
};

/// A row of a BN's vectors: of each 8 channels a warp has, the two that are a lane's; 0 past the last one, and without
/// vectors.
template <bool kWide, class Tiling>
struct Pairs {
  const float* from;
  int left;

  __device__ __forceinline__ Pairs(const float* vectors, int row, int column, int channels) {
    const int first = column + Tiling::warp_column() + static_cast<int>(threadIdx.x % 4) * 2;
    from = vectors == nullptr ? nullptr : vectors + std::int64_t{row} * channels + first;
    ptx::keep(from);
    left = vectors == nullptr ? 0 : channels - first;
  }

  __device__ __forceinline__ float2 at(int j) const {
    if constexpr (kWide) return 8 * j < left ? __ldg(reinterpret_cast<const float2*>(from + 8 * j)) : float2{};
    return {8 * j < left ? __ldg(from + 8 * j) : 0.f, 8 * j + 1 < left ? __ldg(from + 8 * j + 1) : 0.f};
  }
};

/// value = scale * value + shift; with the shift of the shortcut's BN, if there is one, on top: on the accumulator's
/// own rounding it costs nothing.
template <bool kWide, class Tiling>
__device__ __forceinline__ void normalise(Accumulators<Tiling>& value, const float* vectors, const float* vectors2,
                                          int column, int channels) {
  const Pairs<kWide, Tiling> scales(vectors, kScale, column, channels), shifts(vectors, kShift, column, channels);
  const Pairs<kWide, Tiling> more(vectors2, kShift, column, channels);
#pragma unroll
  for (int j = 0; j < Tiling::kTilesAcross; ++j) {
    const float2 scale = scales.at(j);
    const float2 own = shifts.at(j), on_top = more.at(j), shift = make_float2(own.x + on_top.x, own.y + on_top.y);
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float& v = value.value[i][j][r];
        v = fmaf(v, r % 2 == 0 ? scale.x : scale.y, r % 2 == 0 ? shift.x : shift.y);
      }
    }
  }
}

/// to += scale * value.
template <bool kWide, class Tiling>
__device__ __forceinline__ void add_scaled(Accumulators<Tiling>& to, const Accumulators<Tiling>& value,
                                           const float* vectors, int column, int channels) {
  const Pairs<kWide, Tiling> scales(vectors, kScale, column, channels);
#pragma unroll
  for (int j = 0; j < Tiling::kTilesAcross; ++j) {
    const float2 scale = scales.at(j);
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float& sum = to.value[i][j][r];
        sum = fmaf(value.value[i][j][r], r % 2 == 0 ? scale.x : scale.y, sum);
      }
    }
  }
}

/// The open channels of a group behind a ReLU, one bit each: what is not 0 there is positive or NaN.
template <class T>
__device__ __forceinline__ unsigned opened(const Pack& values) {
  if constexpr (sizeof(T) == 4) {
    unsigned open = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) open |= static_cast<unsigned>((values.word[i] & 0x7fffffffu) != 0) << i;
    return open;
  } else {
    // Neither a value behind a ReLU nor the NaN that rounding leaves has a sign: the top bit of each half becomes
    // whether its other bits are not all 0. Of a byte of ones, which is -1, and of minus its bit, the product is the
    // bit.
    std::uint32_t top[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i] = values.word[i] + 0x7fff7fffu;
    const int low = __dp4a(static_cast<int>(ptx::tops(top[0], top[1])), static_cast<int>(0xf8fcfeffu), 0);
    return static_cast<unsigned>(
        __dp4a(static_cast<int>(ptx::tops(top[2], top[3])), static_cast<int>(0x80c0e0f0u), low));
  }
}

/// Blocks of a multiprocessor at once. A projection has two accumulators.
template <class Tiling, bool kWide, bool kProjection>
constexpr int kTailBlocks = !kWide        ? 1
                            : kProjection ? (Tiling::kTilesDown == 1 ? 384 : 256) / Tiling::kThreads
                                          : Tiling::kBlocks;

/// kActivated: the projection reads what a BN and ReLU make of its input, which no block of a ResNet asks for.
template <class T, class Tiling, bool kWide, bool kProjection, bool kActivated>
__global__ void __launch_bounds__(Tiling::kThreads, kTailBlocks<Tiling, kWide, kProjection>)
    pointwise_tail_kernel(PointwiseTail a) {
  using Result = Groups<T, Tiling>;
  union alignas(512) Memory {
    typename Pointwise<T, Tiling, kWide>::Core::Memory product;
    typename Result::Memory groups;
  };
  Memory& memory = shared_memory<Memory>();
  const std::int64_t C = a.channels;
  const TileOf tile = tile_of<Tiling>(a.main.z.pixels, a.channels, a.across);
  Accumulators<Tiling> sum;
  Pointwise<T, Tiling, kWide>::add(sum, memory.product, a.main.z, a.main.weight, a.channels, tile.row, tile.column);
  normalise<kWide>(sum, a.main.vectors, kProjection ? a.projection.vectors : a.vectors2, tile.column, a.channels);
  if constexpr (kProjection) {
    Accumulators<Tiling> second;
    Pointwise<T, Tiling, kWide>::template add<kActivated>(second, memory.product, a.projection.z, a.projection.weight,
                                                          a.channels, tile.row, tile.column);
    add_scaled<kWide>(sum, second, a.projection.vectors, tile.column, a.channels);
  }

  constexpr int kCount = kGroup<T>;
  const Place at = place_of<T, Tiling>(tile, a.channels);
  const std::int64_t first = tile.row + Result::row();
  const T* other = static_cast<const T*>(a.other) + first * C + at.channel;
  T* out = static_cast<T*>(a.out) + first * C + at.channel;
  int row_bytes = (a.channels + 7) / 8;
  ptx::keep(row_bytes);
  std::uint8_t* signs = a.signs == nullptr ? nullptr : a.signs + (first * row_bytes + at.channel / 8);
  const bool joined = !kProjection && a.other != nullptr;
  const bool kept = a.signs != nullptr && at.valid > 0 && at.channel % 8 == 0;
  float scale2[kCount];
#pragma unroll
  for (float& scale : scale2) scale = 1.f;
  if (!kProjection && a.vectors2 != nullptr) load_vector<kWide>(scale2, a.vectors2 + kScale * C + at.channel, at.valid);
  Result::each(
      sum, memory.groups,
      [&](TileRow row) {
        return load<T, kWide>(other + row.down * a.channels, joined && row < tile.left ? at.valid : 0);
      },
      [&](TileRow row, const float (&value)[kCount], const Pack& joins) {
        const int valid = row < tile.left ? at.valid : 0;
        float result[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          result[j] = relu(kProjection ? value[j] : fmaf(get<T>(joins, j), scale2[j], value[j]));
        }
        const Pack rounded = pack<T>(result);
        store<T, kWide>(out + row.down * a.channels, rounded, valid);
        unsigned open = opened<T>(rounded);
        // The neighbour has the byte's upper half.
        if constexpr (kCount == 4) open |= __shfl_down_sync(~0u, open, 1) << 4;
        if (kept && row < tile.left) signs[row.down * row_bytes] = static_cast<std::uint8_t>(open);
      });
}

template <class T>
void pointwise_tail(const PointwiseTail& a, Tile tile, const Queue& queue) {
  const auto with = [&](auto tiling, auto wide, auto projection, auto activated) {
    using Tiling = typename decltype(tiling)::type;
    PointwiseTail arguments = a;
    arguments.across = tiles_across<Tiling>(a.channels);
    launch(pointwise_tail_kernel<T, Tiling, decltype(wide)::value, decltype(projection)::value,
                                 decltype(activated)::value>,
           tiles_of<Tiling>(a.main.z.pixels, a.channels), queue, arguments, Tiling::kThreads);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  const bool projects = a.projection.weight != nullptr;
  const Activation &z = a.main.z, &z2 = a.projection.z;
  const bool wide = moves_wide(a.channels, kGroup<T>, {a.main.weight, a.main.vectors, a.other, a.vectors2, a.out}) &&
                    moves_wide(z.channels, kGroup<T>, {z.image, z.vectors}) &&
                    (!projects || moves_wide(z2.channels, kGroup<T>,
                                             {z2.image, z2.vectors, a.projection.weight, a.projection.vectors}));
  if (!wide) {
    projects ? with(Type<SmallTiling>{}, no, yes, yes) : with(Type<SmallForwardTiling>{}, no, no, no);
  } else if (projects && (tile == Tile::kSmall || z2.vectors != nullptr)) {
    with(Type<SmallTiling>{}, yes, yes, yes);
  } else if (projects) {
    with(Type<LargeForwardTiling>{}, yes, yes, no);
  } else if (tile == Tile::kSmall) {
    with(Type<SmallForwardTiling>{}, yes, no, no);
  } else {
    with(Type<LargeForwardTiling>{}, yes, no, no);
  }
}

}  // namespace fused_res::cuda
