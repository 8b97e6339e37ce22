// The first step of `pointwise_tail_backward`: back through a 1x1 convolution and its BN in the moment form, sums over
// all pixels. What is between it and the last one is in pointwise_tail_backward_finalize.cuh.
#pragma once

#include "block_product.cuh"
#include "masked.cuh"
#include "through.cuh"

namespace fused_res::cuda {

struct TailReduce {
  Incoming g;
  Activation z;        // [P, K]
  const void* scaled;  // A [C, K] with `through`
  void* through;       // g A [P, K], or null
  float* starts;       // [T, K]: what the columns of z count from in a tile
  float* totals;       // [T, 2, C]: sums of g, and of g as it is multiplied
  float* products;     // [T, C, K]: g with z from there, scaled by the column's `reach`
  std::int64_t rows;   // of a tile
};

/// Channels by inner channels of a block. As many threads share a line as of the small one: so many parts has a sum.
using TallTiling = Tiling<128, 64, 64, 3, 8>;
using WideTiling = Tiling<128, 128, 64, 3, 4>;

/// Of a multiprocessor at once, in the registers that there are.
template <class Tiling, bool kWide>
constexpr int kReduceBlocks = !kWide || Tiling::kColumns > 64 ? 1
                              : Tiling::kRows > 64            ? 2
                                                              : 3;

template <class T, class Tiling, bool kWide>
__global__ void __launch_bounds__(Tiling::kThreads, (kReduceBlocks<Tiling, kWide>))
    pointwise_tail_backward_reduce_kernel(TailReduce a) {
  using Core = Product<T, Tiling, Major::kExtent, Major::kExtent, kWide>;
  // Within a factor of 2 of a start the differences need no rounding.
  using Pivots = Pivots<T, Tiling, kWide, 8, 4>;
  using Sums = ColumnSums<T, Tiling::kThreads>;
  constexpr int kAcross = Tiling::kRows / kGroup<T>;
  using Result = Groups<float, Tiling>;
  constexpr bool kThrough = Tiling::kRows == 64;
  using Through = std::conditional_t<kThrough, Through<T, Tiling, kWide>, NoThrough>;
  // As a base, which takes no room where it is empty.
  struct alignas(512) Memory : Through::Second {
    union {
      typename Core::Memory product;
      typename Pivots::Memory pivots;
      typename Sums::Memory sums;
      typename Result::Memory groups;
    };
  };
  Memory& memory = shared_memory<Memory>();
  const std::int64_t C = a.g.channels, K = a.z.channels;
  const unsigned across = (static_cast<unsigned>(K) + Tiling::kColumns - 1) / Tiling::kColumns;
  const unsigned blocks = (static_cast<unsigned>(C) + Tiling::kRows - 1) / Tiling::kRows * across;
  const std::int64_t tile = blockIdx.x / blocks;
  const int row = static_cast<int>(blockIdx.x % blocks / across) * Tiling::kRows;
  const int column = static_cast<int>(blockIdx.x % across) * Tiling::kColumns;
  const Range pixels{tile * a.rows, (tile + 1) * a.rows < a.z.pixels ? (tile + 1) * a.rows : a.z.pixels};
  const auto place = [](std::int64_t from, int across, std::int64_t channels) {
    const std::int64_t channel = from + static_cast<int>(threadIdx.x) % across * kGroup<T>, left = channels - channel;
    const int valid = left <= 0 ? 0 : left < kGroup<T> ? static_cast<int>(left) : kGroup<T>;
    return Place{0, 0, 0, static_cast<int>(channel), valid};
  };

  const Lines<T> z = lines_of<T>(a.z);
  const Place inner = place(column, Pivots::kAcross, K);
  Centred<T> centred{activated<T>(a.z), false, false, {}, {}};
  centred.far = Pivots::find(memory.pivots, z, centred.z, inner.channel, inner.valid, pixels, centred.start);
  if (row == 0 && threadIdx.x < Pivots::kAcross) {
    store_vector<kWide>(a.starts + tile * K + inner.channel, centred.start, inner.valid);
  }
  const Masked<T> g = masked<T>(a.g);
  Accumulators<Tiling> sum;
  const bool through = kThrough && a.through != nullptr;
  if constexpr (kThrough) {
    if (through) Through::load(memory, a.scaled, a.g.channels, a.z.channels);
  }
  const auto beside = [&](const typename Core::Stage& stage, int step) {
    if constexpr (kThrough) {
      if (!through) return;
      const std::int64_t pixel = pixels.begin + std::int64_t{step} * Core::kDepth;
      Through::store_rows(stage.first, memory, static_cast<T*>(a.through) + pixel * K, pixels.end - pixel,
                          a.z.channels);
    }
  };
  const Lines<T> dout = lines_of<T>(a.g.dout, a.z.pixels, a.g.channels);
  if (centred.far) {
    Core::add(sum, memory.product, dout, row, g, z, column, centred, pixels, beside);
  } else {
    Core::add(sum, memory.product, dout, row, g, z, column, AsMultiplied<T>{centred.z}, pixels, beside);
  }

  if (column == 0) {
    const Place outer = place(row, kAcross, C);
    float* totals = a.totals + tile * 2 * C + outer.channel;
    Sums::template merge_every<kAcross>(memory.sums, g.sum);
    if (threadIdx.x < kAcross) store_vector<kWide>(totals, g.sum, outer.valid);
    __syncthreads();
    if constexpr (sizeof(T) == 4) {
      Sums::template merge_every<kAcross>(memory.sums, g.multiplied);
      if (threadIdx.x < kAcross) store_vector<kWide>(totals + C, g.multiplied, outer.valid);
      __syncthreads();
    } else if (threadIdx.x < kAcross) {
      store_vector<kWide>(totals + C, g.sum, outer.valid);
    }
  }
  const std::int64_t channel = std::int64_t{column} + Result::column(), left = K - channel;
  const int valid = left <= 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
  float* products = a.products + (tile * C + row) * K + channel;
  Result::each(
      sum, memory.groups, [](int) { return 0; },
      [&](int r, const float (&value)[4], int) {
        store<float, kWide>(products + r * K, pack<float>(value), row + r < C ? valid : 0);
      });
}

/// How many tiles there are and their rows: about 256 blocks.
inline Tiles tail_reduce_tiles(std::int64_t pixels, std::int64_t channels, std::int64_t inner) {
  const std::int64_t blocks = (channels + 127) / 128 * ((inner + 127) / 128), wanted = (pixels * blocks + 255) / 256;
  const std::int64_t rows = (wanted < 128 ? 128 : wanted > 2048 ? 2048 : wanted) / 32 * 32;
  return {(pixels + rows - 1) / rows, rows};
}

struct TailMerge {
  const float *starts, *totals, *products;  // as in TailReduce
  const double* mean;                       // [K], or null for 0
  double *total, *product;                  // [C], [C, K]
  std::int64_t tiles;
  int channels, inner;
  bool halves;  // float16
};

/// sum g, and M = g^T (z - mean).
static __global__ void __launch_bounds__(kThreads) pointwise_tail_backward_merge_kernel(TailMerge a) {
  constexpr int kElements = 16, kSlots = kThreads / kElements;
  const int slot = static_cast<int>(threadIdx.x) / kElements;
  const unsigned across = (static_cast<unsigned>(a.inner) + kElements - 1) / kElements;
  const std::int64_t C = a.channels, K = a.inner, c = blockIdx.x / across;
  const std::int64_t k = std::int64_t{blockIdx.x % across} * kElements + threadIdx.x % kElements;
  const bool inside = k < K;
  const double mean = inside && a.mean != nullptr ? a.mean[k] : 0.;
  double total = 0., product = 0.;
#pragma unroll 4
  for (std::int64_t t = inside ? slot : a.tiles; t < a.tiles; t += kSlots) {
    const float start = a.starts[t * K + k];
    double value = a.products[(t * C + c) * K + k];
    if (a.halves) value /= reach<Half>(start);
    total += static_cast<double>(a.totals[t * 2 * C + c]);
    product += value + static_cast<double>(a.totals[(t * 2 + 1) * C + c]) * (static_cast<double>(start) - mean);
  }
  merge_double(total, slot, kSlots, kElements);
  merge_double(product, slot, kSlots, kElements);
  if (slot > 0 || !inside) return;
  a.product[c * K + k] = product;
  if (k == 0) a.total[c] = total;
}

struct TailSums {
  const double* mean;       // [K], or null for 0
  double *total, *product;  // [C], [C, K]
};

/// Both steps; a has memory for what the first hands to the second.
template <class T>
void pointwise_tail_backward_reduce(const TailReduce& a, const TailSums& sums, const Queue& queue) {
  const std::int64_t pixels = a.z.pixels, tiles = (pixels + a.rows - 1) / a.rows;
  const int C = a.g.channels, K = a.z.channels;
  const auto with = [&](auto tiling, auto wide) {
    using Tiling = typename decltype(tiling)::type;
    const std::int64_t blocks = (std::int64_t{C} + Tiling::kRows - 1) / Tiling::kRows *
                                ((std::int64_t{K} + Tiling::kColumns - 1) / Tiling::kColumns);
    launch(pointwise_tail_backward_reduce_kernel<T, Tiling, decltype(wide)::value>,
           static_cast<unsigned>(tiles * blocks), queue, a, Tiling::kThreads);
  };
  const bool wide = moves_wide(C, kGroup<T>, {a.g.dout, a.totals}) &&
                    moves_wide(K, kGroup<T>, {a.z.image, a.z.vectors, a.scaled, a.through, a.starts, a.products});
  // The tiling changes no bit of the result.
  if (!wide) {
    with(Type<SmallTiling>{}, std::false_type{});
  } else if (C <= 64) {
    with(Type<SmallTiling>{}, std::true_type{});
  } else if (K <= 64) {
    with(Type<TallTiling>{}, std::true_type{});
  } else {
    with(Type<WideTiling>{}, std::true_type{});
  }
  const std::int64_t across = (std::int64_t{K} + 15) / 16;
  launch(pointwise_tail_backward_merge_kernel, static_cast<unsigned>(C * across), queue,
         TailMerge{a.starts, a.totals, a.products, sums.mean, sums.total, sums.product, tiles, C, K,
                   std::is_same_v<T, Half>});
}

}  // namespace fused_res::cuda
