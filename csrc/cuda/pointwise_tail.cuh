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

/// The first kDown times 16 rows of a warp's accumulator in shared memory, while another one has its registers. A
/// thread reads what it has written itself.
template <class Tiling, int kDown>
struct Parked {
  alignas(16) uint4 words[kDown][Tiling::kTilesAcross][Tiling::kThreads];

  __device__ __forceinline__ void put(int i, int j, const float (&value)[4]) {
    if (i >= kDown) return;
    ptx::shared_store(&words[i][j][threadIdx.x], make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]),
                                                            __float_as_uint(value[2]), __float_as_uint(value[3])));
  }

  __device__ __forceinline__ void get(int i, int j, float (&value)[4]) const {
    if (i >= kDown) return;
    const uint4 v = ptx::shared_load<uint4>(&words[i][j][threadIdx.x]);
    value[0] = __uint_as_float(v.x);
    value[1] = __uint_as_float(v.y);
    value[2] = __uint_as_float(v.z);
    value[3] = __uint_as_float(v.w);
  }
};

template <class Tiling>
struct Parked<Tiling, 0> {
  __device__ __forceinline__ void put(int, int, const float (&)[4]) {}
  __device__ __forceinline__ void get(int, int, float (&)[4]) const {}
};

/// value = scale * value + shift; with the shift of the shortcut's BN, if there is one, on top: on the accumulator's
/// own rounding it costs nothing. What has a place in `parked` goes there.
template <bool kWide, class Tiling, int kDown>
__device__ __forceinline__ void normalise(Accumulators<Tiling>& value, Parked<Tiling, kDown>& parked,
                                          const float* vectors, const float* vectors2, int column, int channels) {
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
      parked.put(i, j, value.value[i][j]);
    }
  }
}

/// value = first + scale * value, where `first` is not in `parked`.
template <bool kWide, class Tiling, int kDown>
__device__ __forceinline__ void join(Accumulators<Tiling>& value, Accumulators<Tiling>& first,
                                     const Parked<Tiling, kDown>& parked, const float* vectors, int column,
                                     int channels) {
  const Pairs<kWide, Tiling> scales(vectors, kScale, column, channels);
#pragma unroll
  for (int j = 0; j < Tiling::kTilesAcross; ++j) {
    const float2 scale = scales.at(j);
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
      parked.get(i, j, first.value[i][j]);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float& v = value.value[i][j][r];
        v = fmaf(v, r % 2 == 0 ? scale.x : scale.y, first.value[i][j][r]);
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

/// Of a projection, whose two accumulators would need all registers of warps with 64 rows.
template <class Tiling, bool kProjection>
constexpr int kParkedDown = kProjection && Tiling::kTilesDown == 4 ? 3 : 0;

/// Blocks of a multiprocessor at once. A projection has two accumulators.
template <class Tiling, bool kWide, bool kProjection>
constexpr int kTailBlocks = !kWide        ? 1
                            : kProjection ? (Tiling::kTilesDown == 1 ? 384 : 256) / Tiling::kThreads
                                          : Tiling::kBlocks;

template <class T, class Tiling, bool kWide, bool kProjection>
struct TailMemory : Parked<Tiling, kParkedDown<Tiling, kProjection>> {
  union alignas(512) {
    typename Pointwise<T, Tiling, kWide>::Core::Memory product;
    typename Groups<T, Tiling>::Memory groups;
  };
};

/// kActivated: the projection reads what a BN and ReLU make of its input, which no block of a ResNet asks for.
template <class T, class Tiling, bool kWide, bool kProjection, bool kActivated>
__global__ void __launch_bounds__(Tiling::kThreads, kTailBlocks<Tiling, kWide, kProjection>)
    pointwise_tail_kernel(PointwiseTail a) {
  using Result = Groups<T, Tiling>;
  using Memory = TailMemory<T, Tiling, kWide, kProjection>;
  constexpr int kParked = kParkedDown<Tiling, kProjection>;
  Memory& memory = large_shared_memory<Memory>();
  const std::int64_t C = a.channels;
  const TileOf tile = tile_of<Tiling>(a.main.z.pixels, a.channels, a.across);
  Accumulators<Tiling> sum;
  Pointwise<T, Tiling, kWide>::add(sum, memory.product, a.main.z, a.main.weight, a.channels, tile.row, tile.column);
  normalise<kWide, Tiling, kParked>(sum, memory, a.main.vectors, kProjection ? a.projection.vectors : a.vectors2,
                                    tile.column, a.channels);

  const Place at = place_of<T, Tiling>(tile, a.channels);
  const std::int64_t first = tile.row + Result::row();
  T* out = static_cast<T*>(a.out) + first * C + at.channel;
  int row_bytes = (a.channels + 7) / 8;
  ptx::keep(row_bytes);
  std::uint8_t* signs = a.signs == nullptr ? nullptr : a.signs + (first * row_bytes + at.channel / 8);
  const bool kept = a.signs != nullptr && at.valid > 0 && at.channel % 8 == 0;
  const auto finish = [&](TileRow row, const Pack& rounded) {
    const bool inside = row < tile.left;
    store<T, kWide>(out + row.down * a.channels, rounded, inside ? at.valid : 0);
    unsigned open = opened<T>(rounded);
    // The neighbour has the byte's upper half.
    if constexpr (kGroup<T> == 4) open |= __shfl_down_sync(~0u, open, 1) << 4;
    if (kept && inside) signs[row.down * row_bytes] = static_cast<std::uint8_t>(open);
  };
  if constexpr (kProjection) {
    Accumulators<Tiling> second;
    Pointwise<T, Tiling, kWide>::template add<kActivated>(second, memory.product, a.projection.z, a.projection.weight,
                                                          a.channels, tile.row, tile.column);
    join<kWide, Tiling, kParked>(second, sum, memory, a.projection.vectors, tile.column, a.channels);
    Result::each_rounded(second, memory.groups, finish, [](float value) { return relu(value); });
  } else {
    constexpr int kCount = kGroup<T>;
    const T* other = static_cast<const T*>(a.other) + first * C + at.channel;
    const bool joined = a.other != nullptr;
    float scale2[kCount];
#pragma unroll
    for (float& scale : scale2) scale = 1.f;
    if (a.vectors2 != nullptr) load_vector<kWide>(scale2, a.vectors2 + kScale * C + at.channel, at.valid);
    Result::each(
        sum, memory.groups,
        [&](TileRow row) {
          return load<T, kWide>(other + row.down * a.channels, joined && row < tile.left ? at.valid : 0);
        },
        [&](TileRow row, const float (&value)[kCount], const Pack& joins) {
          float result[kCount];
#pragma unroll
          for (int j = 0; j < kCount; ++j) result[j] = relu(fmaf(get<T>(joins, j), scale2[j], value[j]));
          finish(row, pack<T>(result));
        });
  }
}

/// From the shape, and from whether two blocks of a projection's tile fit a multiprocessor, of which each block takes
/// one KiB more for the system.
inline Tile tail_tile(const PointwiseTail& a, const Queue& queue) {
  constexpr int kBlock = static_cast<int>(sizeof(TailMemory<float, ProjectionTiling, true, true>)) + 1024;
  if (a.projection.weight != nullptr && 2 * kBlock <= queue.shared_memory &&
      default_tile<ProjectionTiling>(a.main.z.pixels, a.channels) == Tile::kLarge) {
    return Tile::kTall;
  }
  return default_tile<LargeForwardTiling>(a.main.z.pixels, a.channels);
}

template <class T>
void pointwise_tail(const PointwiseTail& a, Tile tile, const Queue& queue) {
  const auto with = [&](auto tiling, auto wide, auto projection, auto activated) {
    using Tiling = typename decltype(tiling)::type;
    PointwiseTail arguments = a;
    arguments.across = tiles_across<Tiling>(a.channels);
    launch(pointwise_tail_kernel<T, Tiling, decltype(wide)::value, decltype(projection)::value,
                                 decltype(activated)::value>,
           tiles_of<Tiling>(a.main.z.pixels, a.channels), queue, arguments, Tiling::kThreads,
           sizeof(TailMemory<T, Tiling, decltype(wide)::value, decltype(projection)::value>));
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
  } else if (projects && tile == Tile::kTall) {
    with(Type<ProjectionTiling>{}, yes, yes, no);
  } else if (projects) {
    with(Type<LargeForwardTiling>{}, yes, yes, no);
  } else if (tile == Tile::kSmall) {
    with(Type<SmallForwardTiling>{}, yes, no, no);
  } else {
    with(Type<LargeForwardTiling>{}, yes, no, no);
  }
}

}  // namespace fused_res::cuda
