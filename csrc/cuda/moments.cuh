// Kernels of `moments`: the products of all pairs of columns of z over tiles of its pixels, in float; merged in double.
#pragma once

#include "block_product.cuh"
#include "pointwise.cuh"

namespace fused_res::cuda {

struct MomentTiles {
  Activation z;       // [P, K]
  float* vectors;     // [T, 2, K]: what the columns of a tile count from, and their sums from there
  float* products;    // [T, K, K], scaled by both columns' `reach`; blocks below the diagonal are not written
  std::int64_t rows;  // of a tile
};

/// What differences from `start` are multiplied by before they are rounded: float16 may not hold those from a far one.
/// Halves of those from a start of 8 and more lose nothing: their last digits lie far above the smallest float16.
template <class T>
__device__ __forceinline__ float reach(float start) {
  return std::is_same_v<T, Half> && fabsf(start) >= 8.f ? 0.5f : 1.f;
}

/// A float as a product of T multiplies it.
template <class T>
__device__ __forceinline__ float rounded(float v) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(ptx::to_tf32(__float_as_uint(v)));
  return widen(narrow<T>(v));
}

/// z as products multiply it, counted from a start for each column; its sums are taken on the way. Differences that
/// need more digits than T has come in two parts.
template <class T>
struct Centred {
  static constexpr bool kActive = true;
  static constexpr int kCount = kGroup<T>;
  using Column = Affine<kCount>;
  struct Piece {};

  Activated<T> z;
  bool far, low;  // whether any start of the block is not 0; which part
  float start[kCount];
  mutable float sum[kCount];

  __device__ __forceinline__ bool on() const { return true; }

  template <bool kWide>
  __device__ __forceinline__ Column column(int channel, int valid) const {
    return z.on() ? z.template column<kWide>(channel, valid) : Column{};
  }

  __device__ __forceinline__ Piece piece(std::int64_t, int, int) const { return {}; }

  __device__ __forceinline__ Pack apply(const Column& column, const Piece&, const Pack& values) const {
    const Pack value = z.on() ? z.apply(column, {}, values) : values;
    float result[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      result[j] = sizeof(T) == 4 ? rounded<T>(get<T>(value, j)) : get<T>(value, j);
      if (far) result[j] -= start[j];
      sum[j] += result[j];
    }
    if (far) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float reached = result[j] * reach<T>(start[j]), high = rounded<T>(reached);
        result[j] = low ? rounded<T>(reached - high) : high;
      }
    } else if (sizeof(T) == 2) {
      return value;
    }
    return pack<T>(result);
  }
};

/// What a thread's columns count from: 0, or where a column is far from 0 the median of three of its values in the
/// tile.
///
/// It is far where of the tile's first 64 rows at least 7 of 8 are no farther from the median than 7/8 of it. Values
/// near 0 lose nothing by counting from there. Every block that asks for a column of a tile gets the same, to the bit.
template <class T, class Tiling, bool kWide>
struct Pivots {
  static constexpr int kCount = kGroup<T>, kAcross = Tiling::kColumns / kCount, kDown = Tiling::kThreads / kAcross;
  static constexpr int kRows = 64, kWords = kCount / 4;
  static_assert(kRows < 256 && kRows % kDown == 0);

  struct Memory {
    alignas(16) std::uint32_t near[kWords][kDown][kAcross];  // a byte for each column
    float start[kCount][kAcross];
    std::uint32_t far[kAcross];
  };

  /// All threads must come. Returns whether any of the block's columns is far.
  static __device__ __forceinline__ bool find(Memory& memory, const Lines<T>& z, const Activated<T>& prologue,
                                              int channel, int valid, Range rows, float (&start)[kCount]) {
    const int across = static_cast<int>(threadIdx.x) % kAcross, slot = static_cast<int>(threadIdx.x) / kAcross;
    Affine<kCount> affine{};
    if (prologue.on()) affine = prologue.template column<kWide>(channel, valid);
    const auto values = [&](std::int64_t row, float (&to)[kCount]) {
      const Pack lies = load<T, kWide>(valid > 0 ? z.at(row) + channel : z.data, valid);
      const Pack value = prologue.on() ? prologue.apply(affine, {}, lies) : lies;
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = rounded<T>(get<T>(value, j));
    };
    float middle[kCount], last[kCount];
    values(rows.begin, start);
    values(rows.begin + (rows.end - rows.begin) / 2, middle);
    values(rows.end - 1, last);
#pragma unroll
    for (int j = 0; j < kCount; ++j) start[j] = median(start[j], middle[j], last[j]);

    std::uint32_t near[kWords] = {};
#pragma unroll 2
    for (int row = slot; row < kRows; row += kDown) {
      if (rows.begin + row >= rows.end) break;
      float value[kCount];
      values(rows.begin + row, value);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const bool is_near = fabsf(value[j] - start[j]) <= 0.875f * fabsf(start[j]);
        near[j / 4] += static_cast<std::uint32_t>(is_near) << (8 * (j % 4));
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) ptx::shared_store(&memory.near[w][slot][across], near[w]);
    __syncthreads();
    if (slot == 0) {
      const std::int64_t seen = rows.end - rows.begin < kRows ? rows.end - rows.begin : kRows;
      std::uint32_t far = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        near[w] = 0;
        for (int s = 0; s < kDown; ++s) near[w] += ptx::shared_load<std::uint32_t>(&memory.near[w][s][across]);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (static_cast<int>(near[j / 4] >> (8 * (j % 4)) & 255u) * 8 < 7 * seen) start[j] = 0.f;
        if (start[j] != 0.f) far = 1;
        ptx::shared_store(&memory.start[j][across], start[j]);
      }
      ptx::shared_store(&memory.far[across], far);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kCount; ++j) start[j] = ptx::shared_load<float>(&memory.start[j][across]);
    std::uint32_t far = 0;
    for (int i = 0; i < kAcross; ++i) far |= ptx::shared_load<std::uint32_t>(&memory.far[i]);
    __syncthreads();
    return far != 0;
  }

 private:
  /// The middle one of three values; any of them where one is NaN.
  static __device__ __forceinline__ float median(float a, float b, float c) {
    const float low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c < high ? c : high;
  }
};

/// Products of columns with columns, over rows: both factors are columns of the same matrix.
///
/// Tensor cores cut off what they add to a sum. Each stage has sums of its own, which join the others rounded.
template <class T, class Tiling, bool kWide>
struct Gram {
  static constexpr int kDepth = Tiling::kDepthBytes / static_cast<int>(sizeof(T));
  static constexpr int kSteps = kDepth / (2 * kGroup<T>), kAhead = Tiling::kStages - 1;
  static_assert(Tiling::kRows == Tiling::kColumns);
  using Factor = Panel<T, Tiling::kColumns, kDepth, Major::kExtent>;
  using Columns = Feed<T, Factor, Major::kExtent, Tiling::kThreads, kWide, Centred<T>>;

  struct Stage {
    Factor first, second;
  };
  struct Memory {
    Stage stage[Tiling::kStages];
  };

  /// With `same` both factors are the first one. Begins and ends as `Product::add` does.
  static __device__ __forceinline__ void add(Accumulators<Tiling>& sum, Memory& memory, const Lines<T>& z, int row,
                                             const Centred<T>& first, int column, const Centred<T>& second, bool same,
                                             Range rows) {
    Columns a(z, row, rows, first), b(z, column, rows, second);
    const int steps = static_cast<int>((rows.end - rows.begin + kDepth - 1) / kDepth);
    const auto copy = [&](Stage& stage, int step) {
      a.copy(stage.first, step);
      if (!same) b.copy(stage.second, step);
    };
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      if (step < steps) copy(memory.stage[step], step);
      ptx::commit_copies();
    }
    int read = 0, write = kAhead;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Stage& stage = memory.stage[read];
      a.fetch(step);
      ptx::wait_copies<kAhead - 1>();
      a.apply(stage.first, step);
      if (!same) {
        b.fetch(step);
        b.apply(stage.second, step);
      }
      __syncthreads();
      if (step + kAhead < steps) copy(memory.stage[write], step + kAhead);
      ptx::commit_copies();
      multiply(sum, stage.first, same ? stage.first : stage.second);
      read = read + 1 == Tiling::kStages ? 0 : read + 1;
      write = write + 1 == Tiling::kStages ? 0 : write + 1;
    }
    __syncthreads();
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

/// The sums of a column over all threads that have read parts of it.
template <class T, class Tiling>
struct ColumnSums {
  static constexpr int kCount = kGroup<T>, kAcross = Tiling::kColumns / kCount, kDown = Tiling::kThreads / kAcross;

  struct Memory {
    float sum[kCount][kDown][kAcross];
  };

  /// In the first kAcross threads. All threads must come; what was in the memory before must have been read.
  static __device__ __forceinline__ void merge(Memory& memory, float (&sum)[kCount]) {
    const int across = static_cast<int>(threadIdx.x) % kAcross, slot = static_cast<int>(threadIdx.x) / kAcross;
#pragma unroll
    for (int j = 0; j < kCount; ++j) ptx::shared_store(&memory.sum[j][slot][across], sum[j]);
    __syncthreads();
    if (slot > 0) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      for (int s = 1; s < kDown; ++s) sum[j] += ptx::shared_load<float>(&memory.sum[j][s][across]);
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
template <class T, class Tiling, bool kWide>
constexpr int kMomentBlocks = !kWide || Tiling::kThreads > 128 ? 1
                              : sizeof(T) == 4                 ? 2
                                                               : 3;

template <class T, class Tiling, bool kWide>
__global__ void __launch_bounds__(Tiling::kThreads, (kMomentBlocks<T, Tiling, kWide>)) moments_kernel(MomentTiles a) {
  using Pivots = Pivots<T, Tiling, kWide>;
  using Sums = ColumnSums<T, Tiling>;
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
      Sums::merge(memory.sums, first.sum);
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
