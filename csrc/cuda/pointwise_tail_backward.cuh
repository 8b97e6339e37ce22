// Kernels of `pointwise_tail_backward`: back through a 1x1 convolution and its BN in the moment form. The first step
// reduces, the last one applies; what is between them is in pointwise_tail_backward_finalize.cuh.
#pragma once

#include "block_product.cuh"
#include "pivots.cuh"

namespace fused_res::cuda {

/// The incoming gradient [P, C], and where the outer ReLU was open.
struct Incoming {
  const void* dout;           // [P, C]
  const std::uint8_t* signs;  // [P, ceil(C / 8)]
  int channels;
};

/// The prologue of g: dout where the outer ReLU was open, 0 elsewhere. Its sums are taken on the way, of g and of g as
/// it is multiplied.
template <class T>
struct Masked {
  static constexpr bool kActive = true, kSums = true;
  static constexpr int kCount = kGroup<T>;
  struct Column {};
  using Piece = unsigned;

  const std::uint8_t* signs;
  int channels;
  mutable float sum[kCount], multiplied[kCount];

  __device__ __forceinline__ bool on() const { return true; }

  template <bool kWide>
  __device__ __forceinline__ Column column(int, int) const {
    return {};
  }

  __device__ __forceinline__ Piece piece(std::int64_t line, int channel, int valid) const {
    return load_signs<kCount>(signs, line, channel, valid, channels);
  }

  __device__ __forceinline__ Pack apply(const Column&, const Piece& open, const Pack& values) const {
    float result[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      result[j] = open >> j & 1u ? get<T>(values, j) : 0.f;
      sum[j] += result[j];
      if constexpr (sizeof(T) == 4) {
        result[j] = rounded<T>(result[j]);
        multiplied[j] += result[j];
      }
    }
    return pack<T>(result);
  }
};

template <class T>
__device__ __forceinline__ Masked<T> masked(const Incoming& g) {
  return {g.signs, g.channels, {}, {}};
}

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

/// g A of the pixels of a stage, where one block has all channels of both: g lies in the stage already, A in memory of
/// its own. g is summed over pixels there, and here over channels: its lines are rows, not columns.
template <class T, class Tiling, bool kWide>
struct Through {
  static constexpr int kPixels = Tiling::kDepthBytes / static_cast<int>(sizeof(T)), kChannels = 64;
  static constexpr int kAcross = Tiling::kWarps * 16 / kPixels, kColumns = kChannels / kAcross, kTiles = kColumns / 8;
  using Second = Panel<T, kChannels, kChannels, Major::kExtent>;
  static_assert(Tiling::kRows == kChannels && Tiling::kColumns == kChannels && kTiles == kGroup<T> / 2);

  /// Its copies are a group of their own.
  static __device__ __forceinline__ void load(Second& factor, const void* scaled, int channels, int inner) {
    const Lines<T> lines = lines_of<T>(scaled, channels, inner);
    Feed<T, Second, Major::kExtent, Tiling::kThreads, kWide, AsIs>(lines, 0, Range{0, channels}, AsIs{})
        .copy(factor, 0);
    ptx::commit_copies();
  }

  /// A warp has 16 pixels and kColumns columns, and a lane of a row one group of 16 bytes.
  template <class Panel>
  static __device__ __forceinline__ void store_rows(const Panel& g, const Second& factor, T* to, std::int64_t left,
                                                    int inner) {
    static_assert(Panel::kLines == kPixels);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, member = lane % 4;
    const int row = warp / kAcross * 16, column = warp % kAcross * kColumns;
    float sum[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kChannels / (2 * kGroup<T>); ++step) {
      std::uint32_t a[4];
      ptx::load_matrices(a, g.at(row + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        std::uint32_t b[4];
        factor.load_second(b, column + 8 * j, step);
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (std::uint32_t& word : b) word = ptx::to_tf32(word);
        }
        ptx::multiply<T>(sum[j], a, b[0], b[1]);
        ptx::multiply<T>(sum[j + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pack group = group_of(sum, half, member);
      // TF32: of 8 columns the lower four are those of the first two lanes.
      const int r = row + 8 * half + lane / 4;
      const int at = column + (sizeof(T) == 2 ? 8 * member : member % 2 * 8 + member / 2 * 4), there = inner - at;
      store<T, kWide>(to + std::int64_t{r} * inner + at, group, r < left ? (there < kGroup<T> ? there : kGroup<T>) : 0);
    }
  }

 private:
  /// Of a row the four lanes have two columns each of every 8; each gets the group that is its own.
  static __device__ __forceinline__ Pack group_of(const float (&sum)[kTiles][4], int half, int member) {
    std::uint32_t word[4];
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = __float_as_uint(sum[j / 2][2 * half + j % 2]);
      const bool upper = member % 2 != 0;
      const std::uint32_t first = __shfl_xor_sync(~0u, upper ? word[0] : word[2], 1);
      const std::uint32_t second = __shfl_xor_sync(~0u, upper ? word[1] : word[3], 1);
      if (upper) return {{first, second, word[2], word[3]}};
      return {{word[0], word[1], first, second}};
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = narrow_pair<T>(sum[j][2 * half], sum[j][2 * half + 1]);
#pragma unroll
      for (int by = 1; by < 4; by *= 2) {
        const bool upper = member & by;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j & by) continue;
          const std::uint32_t other = __shfl_xor_sync(~0u, upper ? word[j] : word[j + by], by);
          (upper ? word[j] : word[j + by]) = other;
        }
      }
      return {{word[0], word[1], word[2], word[3]}};
    }
  }
};

/// Channels by inner channels of a block. As many threads share a line as of the small one: so many parts has a sum.
using TallTiling = Tiling<128, 64, 64, 3, 8>;

struct NoThrough {
  struct Second {};
};

/// Whether a block that reduces has all channels of both, and may write g A, too.
inline bool goes_through(std::int64_t channels, std::int64_t inner) { return channels <= 64 && inner <= 64; }

/// Of a multiprocessor at once, in the registers that there are.
template <class Tiling, bool kWide>
constexpr int kReduceBlocks = !kWide               ? 1
                              : Tiling::kRows > 64 ? 2
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
  struct alignas(512) Memory {
    union {
      typename Core::Memory product;
      typename Pivots::Memory pivots;
      typename Sums::Memory sums;
      typename Result::Memory groups;
    };
    typename Through::Second scaled;
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
    if (through) Through::load(memory.scaled, a.scaled, a.g.channels, a.z.channels);
  }
  Core::add(sum, memory.product, lines_of<T>(a.g.dout, a.z.pixels, a.g.channels), row, g, z, column, centred, pixels,
            [&](const typename Core::Stage& stage, int step) {
              if constexpr (kThrough) {
                if (!through) return;
                const std::int64_t pixel = pixels.begin + std::int64_t{step} * Core::kDepth;
                Through::store_rows(stage.first, memory.scaled, static_cast<T*>(a.through) + pixel * K,
                                    pixels.end - pixel, a.z.channels);
              }
            });

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
  const std::int64_t blocks = (channels + 127) / 128 * ((inner + 63) / 64), wanted = (pixels * blocks + 255) / 256;
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
  } else {
    with(Type<TallTiling>{}, std::true_type{});
  }
  const std::int64_t across = (std::int64_t{K} + 15) / 16;
  launch(pointwise_tail_backward_merge_kernel, static_cast<unsigned>(C * across), queue,
         TailMerge{a.starts, a.totals, a.products, sums.mean, sums.total, sums.product, tiles, C, K,
                   std::is_same_v<T, Half>});
}

/// The prologue mean - z, of z as products multiply it, scaled by kReach: float16 holds the half of any difference of
/// its values.
template <class T>
struct FromMean {
  static constexpr bool kActive = true, kSums = false;
  static constexpr int kCount = kGroup<T>;
  static constexpr float kReach = std::is_same_v<T, Half> ? 0.5f : 1.f;
  struct Column {
    Affine<kCount> affine;
    float mean[kCount];
  };
  struct Piece {};

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

  __device__ __forceinline__ Piece piece(std::int64_t, int, int) const { return {}; }

  __device__ __forceinline__ Pack apply(const Column& column, const Piece&, const Pack& values) const {
    const Pack value = z.on() ? z.apply(column.affine, {}, values) : values;
    float result[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) result[j] = (column.mean[j] - rounded<T>(get<T>(value, j))) * kReach;
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

constexpr int kTailApplyRows = 64;

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
    return (a.joins && images.sampled ? source_row<Sample::kSome>(images.sampling, pixel) : pixel) * K + at.channel;
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
  // Of a column all warps below each other have parts, and of a warp the lanes that are kAcross apart.
  constexpr int kAcross = Result::kAcross, kDown = 32 / kAcross;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool first = warp < Tiling::kWarpsAcross && lane < kAcross;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    __syncthreads();
    Sums::merge(memory.sums, sums[s], first, kDown * Tiling::kWarpsDown, [&](int part) {
      return (warp + part / kDown * Tiling::kWarpsAcross) * 32 + part % kDown * kAcross + lane;
    });
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
  // The tile changes no bit of the result.
  if (!wide) {
    with(Type<SmallTiling>{}, std::false_type{});
  } else if (K <= 64) {
    with(Type<SmallTiling>{}, std::true_type{});
  } else {
    with(Type<LargeTiling>{}, std::true_type{});
  }
}

}  // namespace fused_res::cuda
