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
/// Tensor cores cut off what they add to a sum. Each stage has sums of its own, which join the others rounded.
template <class T, class Tiling, bool kWide>
struct Gram {
  static constexpr int kDepth = Tiling::kDepthBytes / static_cast<int>(sizeof(T));
  static constexpr int kSteps = kDepth / (2 * kGroup<T>);
  static_assert(Tiling::kRows == Tiling::kColumns);
  using Factor = Panel<T, Tiling::kColumns, kDepth, Major::kExtent>;
  using Columns = Feed<T, Factor, Major::kExtent, Tiling::kThreads, kWide, Centred<T>>;

  struct Stage {
    Factor first, second;
  };
  struct Memory {
    Stage stage[Tiling::kStages];
  };

  /// With `same` both factors are the first one. Threads and memory as for `pipelined`.
  static __device__ __forceinline__ void add(Accumulators<Tiling>& sum, Memory& memory, const Lines<T>& z, int row,
                                             const Centred<T>& first, int column, const Centred<T>& second, bool same,
                                             Range rows) {
    Columns a(z, row, rows, first), b(z, column, rows, second);
    pipelined(
        memory.stage, static_cast<int>((rows.end - rows.begin + kDepth - 1) / kDepth),
        [&](Stage& stage, int step) {
          a.copy(stage.first, step);
          if (!same) b.copy(stage.second, step);
        },
        [&](int step) { a.fetch(step); },
        [&](Stage& stage, int step) {
          a.apply(stage.first, step);
          if (same) return;
          b.fetch(step);
          b.apply(stage.second, step);
        },
        [&](const Stage& stage, int) { multiply(sum, stage.first, same ? stage.first : stage.second); });
  }

 private:
  static __device__ __forceinline__ void multiply(Accumulators<Tiling>& sum, const Factor& first,
                                                  const Factor& second) {
    std::uint32_t a[Tiling::kTilesDown][kSteps][4];
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) first.load_first(a[i][step], Tiling::warp_row() + 16 * i, step);
    }
#pragma unroll
    for (int j = 0; j < Tiling::kTilesAcross; j += 2) {
      std::uint32_t b[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) second.load_second(b[step], Tiling::warp_column() + 8 * j, step);
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float part[4] = {};
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            ptx::multiply<T>(part, a[i][step], b[step][2 * half], b[step][2 * half + 1]);
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

/// Of a multiprocessor at once, in the registers that there are.
template <class Tiling, bool kWide>
constexpr int kMomentBlocks = kWide && Tiling::kThreads == 128 ? 2 : 1;

template <class T, class Tiling, bool kWide>
__global__ void __launch_bounds__(Tiling::kThreads, (kMomentBlocks<Tiling, kWide>)) moments_kernel(MomentTiles a) {
  using Pivots = Pivots<T, Tiling, kWide, 7, 7>;
  using Sums = ColumnSums<T, Tiling::kThreads>;
  using Result = Groups<float, Tiling>;
  union alignas(512) Memory {
    typename Gram<T, Tiling, kWide>::Memory product;
    typename Pivots::Memory pivots;
    typename Sums::Memory sums;
    typename Result::Memory groups;
  };
  Memory& memory = shared_memory<Memory>();
  const int K = a.z.channels;
  const unsigned blocks = (static_cast<unsigned>(K) + Tiling::kColumns - 1) / Tiling::kColumns;
  const unsigned pairs = blocks * (blocks + 1) / 2;
  const std::int64_t tile = blockIdx.x / pairs;
  unsigned i = 0, j = blockIdx.x % pairs;
  for (unsigned row = blocks; j >= row; --row) {
    j -= row;
    ++i;
  }
  j += i;
  const Range rows{tile * a.rows, (tile + 1) * a.rows < a.z.pixels ? (tile + 1) * a.rows : a.z.pixels};
  const int row = static_cast<int>(i) * Tiling::kRows, column = static_cast<int>(j) * Tiling::kColumns;
  const Lines<T> z = lines_of<T>(a.z);

  const auto place = [&](int from) {
    const std::int64_t channel = std::int64_t{from} + static_cast<int>(threadIdx.x) % Pivots::kAcross * kGroup<T>;
    const std::int64_t left = K - channel;
    return Place{0, 0, 0, static_cast<int>(channel),
                 left <= 0          ? 0
                 : left < kGroup<T> ? static_cast<int>(left)
                                    : kGroup<T>};
  };
  Centred<T> first{activated<T>(a.z), false, false, {}, {}}, second = first;
  const Place at = place(row);
  bool far = Pivots::find(memory.pivots, z, first.z, at.channel, at.valid, rows, first.start);
  if (i == j) {
#pragma unroll
    for (int c = 0; c < kGroup<T>; ++c) second.start[c] = first.start[c];
  } else {
    const Place other = place(column);
    far = Pivots::find(memory.pivots, z, first.z, other.channel, other.valid, rows, second.start) || far;
  }
  first.far = second.far = far;

  Accumulators<Tiling> sum;
  // bfloat16's lower halves count among themselves, too; the others' are below 2^-11 each.
  const int passes = !far ? 1 : std::is_same_v<T, BFloat16> ? 4 : 3;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    first.low = pass / 2 != 0;
    second.low = pass % 2 != 0;
    Gram<T, Tiling, kWide>::add(sum, memory.product, z, row, first, column, second, i == j && !far, rows);
    if (pass == 0 && i == j) {
      Sums::template merge_every<Pivots::kAcross>(memory.sums, first.sum);
      if (threadIdx.x < Pivots::kAcross) {
        float* vectors = a.vectors + tile * 2 * K + at.channel;
        store_vector<kWide>(vectors, first.start, at.valid);
        store_vector<kWide>(vectors + K, first.sum, at.valid);
      }
      __syncthreads();
    }
  }

  const std::int64_t channel = std::int64_t{column} + Result::column(), left = K - channel;
  const int valid = left <= 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
  float* products = a.products + (tile * K + row) * K + channel;
  Result::each(
      sum, memory.groups, [](int) { return 0; },
      [&](int r, const float (&value)[4], int) {
        store<float, kWide>(products + std::int64_t{r} * K, pack<float>(value), row + r < K ? valid : 0);
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
  // The tiling changes no bit of the result.
  if (!moves_wide(a.z.channels, kGroup<T>, {a.z.image, a.z.vectors, a.vectors, a.products})) {
    with(Type<NarrowColumns>{}, std::false_type{});
  } else if (a.z.channels <= 64) {
    with(Type<NarrowColumns>{}, std::true_type{});
  } else {
    with(Type<WideColumns>{}, std::true_type{});
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
