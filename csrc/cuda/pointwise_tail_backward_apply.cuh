// The last step of `pointwise_tail_backward`: the gradient of what the 1x1 convolution reads, pixel by pixel.
#pragma once

#include "masked.cuh"

namespace fused_res::cuda {

/// The prologue mean - z, of z as products multiply it, scaled by kReach: float16 holds the half of any difference of
/// its values.
template <class T>
struct FromMean {
  static constexpr bool kActive = true, kSums = false, kRounds = true;
  static constexpr int kCount = kGroup<T>;
  static constexpr float kReach = std::is_same_v<T, Half> ? 0.5f : 1.f;
  struct Column {
    Affine<kCount> affine;
    float mean[kCount];
  };
  struct Piece {};
  struct Way {};

  Activated<T> z;
  const double* mean;  // [K]

  __device__ __forceinline__ bool on() const { return true; }

  template <bool kWide>
  __device__ __forceinline__ Column column(int channel, int valid) const {
    Column column{};
    if (z.on()) column.affine = z.template column<kWide>(channel, valid);
#pragma unroll
    for (int j = 0; j < kCount; ++j) column.mean[j] = j < valid ? static_cast<float>(__ldg(mean + channel + j)) : 0.f;
    return column;
  }

  __device__ __forceinline__ Way line(std::int64_t, int) const { return {}; }

  __device__ __forceinline__ Piece piece(const Way&, int, int, int) const { return {}; }

  __device__ __forceinline__ Pack apply(const Column& column, const Piece&, const Pack& values) const {
    const Pack value = z.on() ? z.apply(column.affine, {}, values) : values;
    float result[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float v = get<T>(value, j), as_multiplied = sizeof(T) == 4 ? rounded<T>(v) : v;
      result[j] = (column.mean[j] - as_multiplied) * kReach;
      if constexpr (sizeof(T) == 4) result[j] = rounded<T>(result[j]);
    }
    return pack<T>(result);
  }
};

struct TailApply {
  Incoming g;
  Activation z;           // [P, K]
  const void* scaled;     // A [C, K]
  const double* mean;     // [K], null: nothing but g A
  const void* quadratic;  // B [K, K] with mean
  const float* constant;  // b [K] with mean
  const void* through;    // g A [P, K] where that is known, or null; not with `joins`
  void* dz;               // [P, K]; with `joins` images like z; it may be `through`
  float* partials;  // [T, 2, K], or null: sums of the BN below over tiles of kTailApplyRows, which makes z of its image
  bool joins;       // dz is added to
  Divider across = 1;  // by tiles side by side, which the launcher knows
};

/// A warp has 32 rows of either, so that no bit of a result, sums included, depends on which it is.
using NarrowApplyTiling = Tiling<128, 64, 64, 3, 4>;
using WideApplyTiling = Tiling<128, 128, 64, 3, 4>;
constexpr int kTailApplyRows = 128;

template <class T, class Tiling, bool kWide>
__global__ void __launch_bounds__(Tiling::kThreads, kWide ? 384 / Tiling::kThreads : 1)
    pointwise_tail_backward_apply_kernel(TailApply a) {
  static_assert(Tiling::kRows == kTailApplyRows);
  using Core = Product<T, Tiling, Major::kDepth, Major::kExtent, kWide>;
  using Result = Groups<T, Tiling>;
  using Sums = ColumnSums<T, Tiling::kThreads>;
  constexpr int kCount = kGroup<T>;
  constexpr float kReach = FromMean<T>::kReach;
  union alignas(512) Memory {
    typename Core::Memory product;
    typename Result::Memory groups;
    typename Sums::Memory sums;
  };
  Memory& memory = shared_memory<Memory>();
  const std::int64_t P = a.z.pixels, K = a.z.channels;
  const TileOf tile = tile_of<Tiling>(P, a.z.channels, a.across);
  Accumulators<Tiling> sum;
  if (a.through == nullptr) {
    Core::add(sum, memory.product, lines_of<T>(a.g.dout, P, a.g.channels), tile.row, masked<T>(a.g),
              lines_of<T>(a.scaled, a.g.channels, a.z.channels), tile.column, AsIs{}, Range{0, a.g.channels});
  }
  if (a.mean != nullptr) {
    if constexpr (kReach != 1.f) {
#pragma unroll
      for (auto& across : sum.value) {
#pragma unroll
        for (auto& words : across) {
#pragma unroll
          for (float& value : words) value *= kReach;
        }
      }
    }
    Core::add(sum, memory.product, lines_of<T>(a.z), tile.row, FromMean<T>{activated<T>(a.z), a.mean},
              lines_of<T>(a.quadratic, a.z.channels, a.z.channels), tile.column, AsIs{}, Range{0, K});
  }

  const Place at = place_of<T, Tiling>(tile, a.z.channels);
  const bool inner = a.partials != nullptr;
  const float scale = a.mean != nullptr ? 1.f / kReach : 1.f;
  float constant[kCount] = {}, below[kCount] = {}, sums[2][kCount] = {};
  Affine<kCount> affine{};
  if (a.mean != nullptr) load_vector<kWide>(constant, a.constant + at.channel, at.valid);
  if (inner) {
    affine = load_affine<kWide, kCount>(a.z.vectors, K, at);
    load_vector<kWide>(below, a.z.vectors + kMean * K + at.channel, at.valid);
  }
  const Lines<T> images = lines_of<T>(a.z);
  const auto line = [&](int row) {
    const std::int64_t pixel = tile.row + row;
    const bool apart = a.joins && images.sampled;
    return (apart ? sampled_row(images.sampling, static_cast<unsigned>(pixel)) : pixel) * K + at.channel;
  };
  struct Fetched {
    Pack other, y;
  };
  const T* through = static_cast<const T*>(a.through);
  T* dz = static_cast<T*>(a.dz);
  Result::each(
      sum, memory.groups,
      [&](int row) {
        const int valid = row < tile.left ? at.valid : 0;
        Fetched fetched{};
        if (valid > 0) {
          if (a.joins) fetched.other = load<T, kWide, cuda::Memory::kWritten>(dz + line(row), valid);
          if (through != nullptr) {
            fetched.other = load<T, kWide, cuda::Memory::kWritten>(through + (tile.row + row) * K + at.channel, valid);
          }
          if (inner) fetched.y = load<T, kWide>(images.data + (tile.row + row) * K + at.channel, valid);
        }
        return fetched;
      },
      [&](int row, const float (&value)[kCount], const Fetched& fetched) {
        const int valid = row < tile.left ? at.valid : 0;
        float result[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          result[j] = value[j] * scale + get<T>(fetched.other, j) - constant[j];
          if (inner && !is_open(affine(j, get<T>(fetched.y, j)))) result[j] = 0.f;
        }
        const Pack stored = pack<T>(result);
        if (valid > 0) store<T, kWide>(dz + line(row), stored, valid);
        if (!inner) return;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float g = j < valid ? get<T>(stored, j) : 0.f;
          sums[0][j] += g;
          sums[1][j] += g * (get<T>(fetched.y, j) - below[j]);
        }
      });
  if (!inner) return;
  // Of a column the lanes have parts that are kAcross apart, and all warps below each other.
  constexpr int kAcross = Result::kAcross;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool first = warp < Tiling::kWarpsAcross && lane < kAcross;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int by = kAcross; by < 32; by *= 2) sums[s][j] += __shfl_xor_sync(~0u, sums[s][j], by);
    }
    __syncthreads();
    Sums::merge(memory.sums, sums[s], first, Tiling::kWarpsDown,
                [&](int part) { return (warp + part * Tiling::kWarpsAcross) * 32 + lane; });
    if (first) store_vector<kWide>(a.partials + (tile.tile * 2 + s) * K + at.channel, sums[s], at.valid);
  }
}

template <class T>
void pointwise_tail_backward_apply(const TailApply& a, const Queue& queue) {
  const int C = a.g.channels, K = a.z.channels;
  const auto with = [&](auto tiling, auto wide) {
    using Tiling = typename decltype(tiling)::type;
    TailApply arguments = a;
    arguments.across = tiles_across<Tiling>(K);
    launch(pointwise_tail_backward_apply_kernel<T, Tiling, decltype(wide)::value>, tiles_of<Tiling>(a.z.pixels, K),
           queue, arguments, Tiling::kThreads);
  };
  const bool wide = moves_wide(C, kGroup<T>, {a.g.dout}) && moves_wide(K, kGroup<T>,
                                                                       {a.z.image, a.z.vectors, a.scaled, a.quadratic,
                                                                        a.constant, a.through, a.dz, a.partials});
  if (!wide) {
    with(Type<NarrowApplyTiling>{}, std::false_type{});
  } else if (K <= 64) {
    with(Type<NarrowApplyTiling>{}, std::true_type{});
  } else {
    with(Type<WideApplyTiling>{}, std::true_type{});
  }
}

}  // namespace fused_res::cuda
