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

/// A pair of a per-channel vector's elements of which `left` are there.
template <bool kWide>
__device__ __forceinline__ float2 load_pair(const float* from, int left) {
  if constexpr (kWide) return left > 0 ? __ldg(reinterpret_cast<const float2*>(from)) : float2{};
  return {left > 0 ? __ldg(from) : 0.f, left > 1 ? __ldg(from + 1) : 0.f};
}

/// `scale * value + shift`, into `value` or added to `to`: two channels of each 8 are a lane's.
template <bool kWide, class Tiling>
__device__ __forceinline__ void normalise(Accumulators<Tiling>& value, const float* vectors, int column, int channels,
                                          Accumulators<Tiling>* to = nullptr) {
  const int first = column + Tiling::warp_column() + static_cast<int>(threadIdx.x % 4) * 2, left = channels - first;
  const float* scales = vectors + std::int64_t{kScale} * channels + first;
  const float* shifts = scales + channels;
  static_assert(kShift == kScale + 1);
#pragma unroll
  for (int j = 0; j < Tiling::kTilesAcross; ++j) {
    const float2 scale = load_pair<kWide>(scales + 8 * j, left - 8 * j);
    const float2 shift = load_pair<kWide>(shifts + 8 * j, left - 8 * j);
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

/// The open channels of a group behind a ReLU, one bit each: what is not 0 there, of either sign, is positive or NaN.
template <class T>
__device__ __forceinline__ unsigned opened(const Pack& values) {
  unsigned open = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t word = values.word[i];
    if constexpr (sizeof(T) == 4) {
      open |= static_cast<unsigned>((word & 0x7fffffffu) != 0) << i;
    } else {
      // The top bit of each half whose other bits are not all 0.
      const std::uint32_t top = (word & 0x7fff7fffu) + 0x7fff7fffu;
      open |= (top >> 15 & 0x00010001u) << 2 * i;
    }
  }
  return sizeof(T) == 4 ? open : (open | open >> 15) & 0xffu;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kTailWarps = 8;  // ptxas takes a few more registers there
#else
constexpr int kTailWarps = 12;
#endif

/// Blocks of a multiprocessor at once, of more than 128 registers a thread: 64 results, or two accumulators.
template <class Tiling, bool kWide, bool kProjection>
constexpr int kTailBlocks = !kWide        ? 1
                            : kProjection ? 384 / Tiling::kThreads
                                          : 32 * kTailWarps / Tiling::kThreads;

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
  normalise<kWide>(sum, a.main.vectors, tile.column, a.channels);
  if constexpr (kProjection) {
    Accumulators<Tiling> second;
    Pointwise<T, Tiling, kWide>::add(second, memory.product, a.projection.z, a.projection.weight, a.channels, tile.row,
                                     tile.column);
    normalise<kWide>(second, a.projection.vectors, tile.column, a.channels, &sum);
  }

  constexpr int kCount = kGroup<T>;
  const Place at = place_of<T, Tiling>(tile, a.channels);
  const T* other = static_cast<const T*>(a.other) + tile.row * C + at.channel;
  T* out = static_cast<T*>(a.out) + tile.row * C + at.channel;
  std::uint8_t* signs = a.signs == nullptr ? nullptr : a.signs + sign_byte(tile.row, 0, a.channels);
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
      [&](int row) { return load<T, kWide>(other + row * a.channels, joined && row < tile.left ? at.valid : 0); },
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
        store<T, kWide>(out + row * a.channels, rounded, valid);
        store_signs<kCount>(signs, opened<T>(rounded), row, at.channel, signs == nullptr ? 0 : valid, a.channels);
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
  const Activation &z = a.main.z, &z2 = a.projection.z;
  const bool wide = moves_wide(a.channels, kGroup<T>, {a.main.weight, a.main.vectors, a.other, a.vectors2, a.out}) &&
                    moves_wide(z.channels, kGroup<T>, {z.image, z.vectors}) &&
                    (!projects || moves_wide(z2.channels, kGroup<T>,
                                             {z2.image, z2.vectors, a.projection.weight, a.projection.vectors}));
  if (!wide) {
    projects ? with(Type<SmallTiling>{}, std::false_type{}, std::true_type{})
             : with(Type<SmallForwardTiling>{}, std::false_type{}, std::false_type{});
  } else if (projects) {
    with(Type<SmallTiling>{}, std::true_type{}, std::true_type{});
  } else if (tile == Tile::kSmall) {
    with(Type<SmallForwardTiling>{}, std::true_type{}, std::false_type{});
  } else {
    with(Type<LargeForwardTiling>{}, std::true_type{}, std::false_type{});
  }
}

}  // namespace fused_res::cuda
