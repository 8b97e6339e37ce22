// Kernels of `moments`: the products of all pairs of columns of z over tiles of its pixels, in float; merged in double.
#pragma once

#include "block_product.cuh"
#include "pivots.cuh"

namespace fused_res::cuda {

struct MomentTiles {
  Activation z;       // [P, K]
  float* vectors;     // [T, 2, K]: what the columns of a tile count from, and their sums from there
  float* products;    // [T, K, K], scaled by both columns' `reach`; blocks below the diagonal are not written
  std::int64_t rows;  // of a tile
};

/// Products of columns with columns, over rows: both factors are columns of the same matrix.
///
/// Tensor cores cut off what they add to a sum. The 32 or 64 rows of a stage have sums of their own, which join the
/// others rounded.
template <class T, class Tiling, bool kWide>
struct Gram {
  static constexpr int kDepth = Tiling::kDepthBytes / static_cast<int>(sizeof(T));
  static constexpr int kSteps = kDepth / (2 * kGroup<T>);
  static_assert(Tiling::kRows == Tiling::kColumns);
  using Factor = Panel<T, Tiling::kColumns, kDepth, Major::kExtent>;
  template <class Prologue>
  using Columns = Feed<T, Factor, Major::kExtent, Tiling::kThreads, kWide, Prologue>;

  struct Stage {
    Factor first, second;
  };
  struct Memory {
    Stage stage[Tiling::kStages];
  };

  /// The sums of the warp's rows of the result's first factor, 16 by 16: of the lane's row of the upper 8 and of the
  /// lower ones.
  struct ColumnTotals {
    float value[Tiling::kTilesDown][2] = {};
  };

  /// Of the columns from `column` on with themselves, and their sums; twice as many rows a step. Threads and memory as
  /// for `pipelined`.
  static __device__ __forceinline__ void add_squares(Accumulators<Tiling>& sum, ColumnTotals& totals, Memory& memory,
                                                     const Lines<T>& z, int column, const AsMultiplied<T>& prologue,
                                                     Range rows) {
    Columns<AsMultiplied<T>> a(z, column, rows, prologue);
    const Places places;
    pipelined(
        memory.stage, (steps(rows) + 1) / 2,
        [&](Stage& stage, int step) {
          a.copy(stage.first, 2 * step);
          a.copy(stage.second, 2 * step + 1);
        },
        [](int) {},
        [&](Stage& stage, int step) {
          a.apply(stage.first, 2 * step);
          a.apply(stage.second, 2 * step + 1);
        },
        [&](const Stage& stage, int) {
          const Factor* const both[] = {&stage.first, &stage.second};
          multiply<2, true>(sum, totals, both, both, places);
        });
  }

  /// Of the columns from `row` on with those from `column` on, each as its prologue makes it.
  static __device__ __forceinline__ void add(Accumulators<Tiling>& sum, Memory& memory, const Lines<T>& z, int row,
                                             const Centred<T>& first, int column, const Centred<T>& second,
                                             Range rows) {
    Columns<Centred<T>> a(z, row, rows, first), b(z, column, rows, second);
    const Places places;
    pipelined(
        memory.stage, steps(rows),
        [&](Stage& stage, int step) {
          a.copy(stage.first, step);
          b.copy(stage.second, step);
        },
        [&](int step) { a.fetch(step); },
        [&](Stage& stage, int step) {
          a.apply(stage.first, step);
          b.fetch(step);
          b.apply(stage.second, step);
        },
        [&](const Stage& stage, int) {
          const Factor *const left[] = {&stage.first}, *const right[] = {&stage.second};
          ColumnTotals none;
          multiply<1, false>(sum, none, left, right, places);
        });
  }

 private:
  static __device__ __forceinline__ int steps(Range rows) {
    return static_cast<int>((rows.end - rows.begin + kDepth - 1) / kDepth);
  }

  /// Of the warp's rows and columns in a factor.
  struct Places {
    int first = Factor::first_place(Tiling::warp_row()), second = Factor::second_place(Tiling::warp_column());

    __device__ __forceinline__ Places() {
      ptx::keep(first);
      ptx::keep(second);
    }
  };

  /// kTotals: products with ones, too.
  template <int kPanels, bool kTotals>
  static __device__ __forceinline__ void multiply(Accumulators<Tiling>& sum, ColumnTotals& totals,
                                                  const Factor* const (&first)[kPanels],
                                                  const Factor* const (&second)[kPanels], const Places& places) {
    constexpr int kAll = kPanels * kSteps;
    std::uint32_t a[Tiling::kTilesDown][kAll][4];
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
      for (int s = 0; s < kAll; ++s) first[s / kSteps]->load_first(a[i][s], places.first, 16 * i, s % kSteps);
      if constexpr (kTotals) {
        float part[4] = {};
#pragma unroll
        for (int s = 0; s < kAll; ++s) ptx::multiply<T>(part, a[i][s], ones<T>(), ones<T>());
        totals.value[i][0] += part[0];
        totals.value[i][1] += part[2];
      }
    }
#pragma unroll
    for (int j = 0; j < Tiling::kTilesAcross; j += 2) {
      std::uint32_t b[kAll][4];
#pragma unroll
      for (int s = 0; s < kAll; ++s) second[s / kSteps]->load_second(b[s], places.second, 8 * j, s % kSteps);
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float part[4] = {};
#pragma unroll
          for (int s = 0; s < kAll; ++s) {
            ptx::multiply<T>(part, a[i][s], b[s][2 * half], b[s][2 * half + 1]);
          }
#pragma unroll
          for (int r = 0; r < 4; ++r) sum.value[i][j + half][r] += part[r];
        }
      }
    }
  }
};

/// Columns that a block has of both factors.
using NarrowColumns = Tiling<64, 64, 64, 4, 4>;
using WideColumns = Tiling<128, 128, 64, 3, 4>;

/// Blocks of columns, and pairs of them on and above the diagonal.
template <class Tiling>
unsigned moment_blocks(int channels) {
  return (static_cast<unsigned>(channels) + Tiling::kColumns - 1) / Tiling::kColumns;
}

template <class Tiling>
unsigned moment_pairs(int channels) {
  return moment_blocks<Tiling>(channels) * (moment_blocks<Tiling>(channels) + 1) / 2;
}

/// What a block works on: a tile of pixels, and the columns from `row` and from `column` on, no lower ones.
struct PairOf {
  std::int64_t tile;
  int row, column;
};

template <class Tiling>
__device__ __forceinline__ PairOf pair_of(int channels) {
  const unsigned blocks = (static_cast<unsigned>(channels) + Tiling::kColumns - 1) / Tiling::kColumns;
  const unsigned pairs = blocks * (blocks + 1) / 2, tile = blockIdx.x / pairs;
  unsigned i = 0, j = blockIdx.x - tile * pairs;
  for (unsigned left = blocks; j >= left; --left) {
    j -= left;
    ++i;
  }
  return {tile, static_cast<int>(i) * Tiling::kRows, static_cast<int>(i + j) * Tiling::kColumns};
}

/// The same worked out once more, where there are no registers to keep it in over the loops.
template <class Tiling>
__device__ __forceinline__ PairOf pair_anew(int channels) {
  ptx::keep(channels);
  return pair_of<Tiling>(channels);
}

/// The vectors of a block's tile.
__device__ __forceinline__ float* vectors_of(const MomentTiles& a, const PairOf& pair) {
  return a.vectors + pair.tile * 2 * a.z.channels;
}

/// A thread's group of the columns from `from` on, which kAcross threads have side by side.
template <class T, int kAcross>
__device__ __forceinline__ Place group_of(int from, int channels) {
  const int channel = from + static_cast<int>(threadIdx.x) % kAcross * kGroup<T>, left = channels - channel;
  return {0, 0, 0, channel, left <= 0 ? 0 : left < kGroup<T> ? left : kGroup<T>};
}

/// Of a multiprocessor at once, in the registers that there are.
template <class Tiling, bool kWide>
constexpr int kMomentBlocks = kWide && Tiling::kThreads == 128 ? 2 : 1;

template <class T, class Tiling, bool kWide>
__global__ void __launch_bounds__(Tiling::kThreads, (kMomentBlocks<Tiling, kWide>)) moments_kernel(MomentTiles a) {
  using Pivots = Pivots<T, Tiling, kWide, 7, 7>;
  using Sums = ColumnSums<T, Tiling::kThreads>;
  using Result = Groups<float, Tiling>;
  using Core = Gram<T, Tiling, kWide>;
  union alignas(512) Memory {
    typename Core::Memory product;
    typename Pivots::Memory pivots;
    typename Sums::Memory sums;
    typename Result::Memory groups;
  };
  Memory& memory = shared_memory<Memory>();
  const PairOf pair = pair_of<Tiling>(a.z.channels);
  const bool diagonal = pair.row == pair.column;
  const std::int64_t begin = pair.tile * a.rows, end = begin + a.rows;
  const Range rows{begin, end < a.z.pixels ? end : a.z.pixels};
  const Lines<T> z = lines_of<T>(a.z);
  const Activated<T> prologue = activated<T>(a.z);
  Centred<T> first{prologue, false, false, {}, {}}, second = first;
  // Of columns and rows, which are the same on the diagonal, the latter come last.
#pragma unroll 1
  for (int side = diagonal ? 1 : 0; side < 2; ++side) {
    const Place at = group_of<T, Pivots::kAcross>(side == 0 ? pair.column : pair.row, a.z.channels);
    if (side == 1) {
#pragma unroll
      for (int c = 0; c < kGroup<T>; ++c) second.start[c] = first.start[c];
    }
    if (Pivots::find(memory.pivots, z, prologue, at.channel, at.valid, rows, first.start)) first.far = true;
    if (diagonal && threadIdx.x < Pivots::kAcross) {
      store_vector<kWide>(vectors_of(a, pair) + at.channel, first.start, at.valid);
    }
  }
  if (diagonal) {
#pragma unroll
    for (int c = 0; c < kGroup<T>; ++c) second.start[c] = first.start[c];
  }
  second.far = first.far;

  Accumulators<Tiling> sum;
  if (diagonal && !first.far) {
    typename Core::ColumnTotals totals;
    Core::add_squares(sum, totals, memory.product, z, pair.row, {prologue}, rows);
    const PairOf again = pair_anew<Tiling>(a.z.channels);
    float* sums = vectors_of(a, again) + a.z.channels;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int t = 0; t < 2 * Tiling::kTilesDown; ++t) {
      const int column = again.row + Tiling::warp_row() + 8 * t + lane / 4;
      const bool own = Tiling::warp_column() == 0 && lane % 4 == 0;
      if (own && column < a.z.channels) sums[column] = totals.value[t / 2][t % 2];
    }
  } else {
    // bfloat16's lower halves count among themselves, too; the others' are below 2^-11 each.
    const int passes = !first.far ? 1 : std::is_same_v<T, BFloat16> ? 4 : 3;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      first.low = pass / 2 != 0;
      second.low = pass % 2 != 0;
      Core::add(sum, memory.product, z, pair.row, first, pair.column, second, rows);
      if (pass > 0 || !diagonal) continue;
      Sums::template merge_every<Pivots::kAcross>(memory.sums, first.sum);
      if (threadIdx.x < Pivots::kAcross) {
        const PairOf again = pair_anew<Tiling>(a.z.channels);
        const Place at = group_of<T, Pivots::kAcross>(again.row, a.z.channels);
        store_vector<kWide>(vectors_of(a, again) + a.z.channels + at.channel, first.sum, at.valid);
      }
      __syncthreads();
    }
  }

  const PairOf again = pair_anew<Tiling>(a.z.channels);
  const std::int64_t K = a.z.channels;
  const int channel = again.column + Result::column(), left = a.z.channels - channel;
  const int valid = left <= 0 ? 0 : left < 4 ? left : 4;
  float* products = a.products + (again.tile * K + again.row) * K + channel;
  Result::each(
      sum, memory.groups, [](int) { return 0; },
      [&](int r, const float (&value)[4], int) {
        store<float, kWide>(products + r * K, pack<float>(value), again.row + r < a.z.channels ? valid : 0);
      });
}

/// How many tiles there are and their rows: about 256 blocks; more than 1024 rows would leave too much to sums in
/// float.
inline Tiles moment_tiles(std::int64_t pixels, std::int64_t channels) {
  const std::int64_t across = channels <= 64 ? 1 : (channels + 127) / 128, pairs = across * (across + 1) / 2;
  const std::int64_t wanted = (pixels * pairs + 255) / 256;
  const std::int64_t rows = (wanted < 256 ? 256 : wanted > 1024 ? 1024 : wanted) / 32 * 32;
  return {(pixels + rows - 1) / rows, rows};
}

template <class T>
void moment_products(const MomentTiles& a, const Queue& queue) {
  const std::int64_t tiles = (a.z.pixels + a.rows - 1) / a.rows;
  const auto with = [&](auto tiling, auto wide) {
    using Tiling = typename decltype(tiling)::type;
    launch(moments_kernel<T, Tiling, decltype(wide)::value>,
           static_cast<unsigned>(tiles * moment_pairs<Tiling>(a.z.channels)), queue, a, Tiling::kThreads);
  };
  // Which columns stand in a block decides how they are summed: that does not depend on where they lie in memory.
  const bool wide = moves_wide(a.z.channels, kGroup<T>, {a.z.image, a.z.vectors, a.vectors, a.products});
  if (a.z.channels <= 64) {
    wide ? with(Type<NarrowColumns>{}, std::true_type{}) : with(Type<NarrowColumns>{}, std::false_type{});
  } else {
    wide ? with(Type<WideColumns>{}, std::true_type{}) : with(Type<WideColumns>{}, std::false_type{});
  }
}

struct MomentsMerge {
  const float* vectors;   // [T, 2, K]
  const float* products;  // [T, K, K]
  double* mean;           // [K]
  double* covariance;     // [K, K]
  std::int64_t tiles;
  double rows, last, share;  // of a tile, of the last one, 1 / P
  int channels;
  bool halves;  // float16
};

/// Elements of the covariance that a block has, and among how many threads it shares the tiles.
constexpr int kMergeElements = 16, kMergeSlots = kThreads / kMergeElements;

static __global__ void __launch_bounds__(kThreads) moments_merge_kernel(MomentsMerge a) {
  const int slot = static_cast<int>(threadIdx.x) / kMergeElements;
  const unsigned K = static_cast<unsigned>(a.channels), across = (K + kMergeElements - 1) / kMergeElements;
  const unsigned j = blockIdx.x / across, k = blockIdx.x % across * kMergeElements + threadIdx.x % kMergeElements;
  // What is above the diagonal stands below it, too: symmetric whatever is rounded on the way.
  const bool inside = k < K && j <= k;
  const std::int64_t wide = K;
  const auto start_of = [&](std::int64_t t, unsigned c) { return a.vectors[t * 2 * wide + c]; };
  // Means and products count from the first tile's starts, which keeps the digits of a mean far from 0.
  const double from_j = inside ? static_cast<double>(start_of(0, j)) : 0.,
               from_k = inside ? static_cast<double>(start_of(0, k)) : 0.;
  double total_j = 0., total_k = 0., square = 0.;
#pragma unroll 4
  for (std::int64_t t = inside ? slot : a.tiles; t < a.tiles; t += kMergeSlots) {
    const double count = t < a.tiles - 1 ? a.rows : a.last;
    const float at_j = start_of(t, j), at_k = start_of(t, k);
    const double sum_j = a.vectors[(t * 2 + 1) * wide + j], sum_k = a.vectors[(t * 2 + 1) * wide + k];
    const double start_j = static_cast<double>(at_j) - from_j, start_k = static_cast<double>(at_k) - from_k;
    double value = a.products[(t * wide + j) * wide + k];
    if (a.halves) value /= reach<Half>(at_j) * reach<Half>(at_k);
    // sum (z_j - from_j) (z_k - from_k), where the tile has the product and the sums of what z is from its own starts.
    square += value + start_j * sum_k + start_k * (sum_j + count * start_j);
    total_j += sum_j + count * start_j;
    total_k += sum_k + count * start_k;
  }
  merge_double(square, slot, kMergeSlots, kMergeElements);
  merge_double(total_j, slot, kMergeSlots, kMergeElements);
  merge_double(total_k, slot, kMergeSlots, kMergeElements);
  if (slot > 0 || !inside) return;
  const double far_j = total_j * a.share, far_k = total_k * a.share, found = square * a.share - far_j * far_k;
  a.covariance[j * wide + k] = found;
  a.covariance[k * wide + j] = found;
  if (j == k) a.mean[k] = from_k + far_k;
}

inline void moments_merge(const MomentsMerge& a, const Queue& queue) {
  const std::int64_t across = (std::int64_t{a.channels} + kMergeElements - 1) / kMergeElements;
  launch(moments_merge_kernel, static_cast<unsigned>(a.channels * across), queue, a);
}

struct MomentsResult {
  double* mean;        // [K]
  double* covariance;  // [K, K]
};

/// Both steps; a has memory for what the first hands to the second.
template <class T>
void moments(const MomentTiles& a, const MomentsResult& result, const Queue& queue) {
  const std::int64_t pixels = a.z.pixels, tiles = (pixels + a.rows - 1) / a.rows;
  moment_products<T>(a, queue);
  moments_merge({a.vectors, a.products, result.mean, result.covariance, tiles, static_cast<double>(a.rows),
                 static_cast<double>(pixels - a.rows * (tiles - 1)), 1. / static_cast<double>(pixels), a.z.channels,
                 std::is_same_v<T, Half>},
                queue);
}

}  // namespace fused_res::cuda
