// What the kernels of 1x1 convolutions share: their input, the BN and ReLU in front of it, and their tiles.
#pragma once

#include "product.cuh"
#include "signs.cuh"

namespace fused_res::cuda {

/// The input of a 1x1 convolution: rows [P, K], the pixels of images [N, H, W, K] at a stride, and the BN and ReLU that
/// are still to be applied to them.
struct Activation {
  const void* image;
  const float* vectors;  // [5, K] or null
  std::int64_t pixels;
  int channels;
  bool sampled;
  Sampling sampling;
};

/// Of `images` images of so many channels.
inline Activation activation_of(const void* image, const float* vectors, std::int64_t images, int channels,
                                const Sampling& sampling) {
  const bool sampled = sampling.down != 1 || sampling.right != 1;
  return {image, vectors, images * sampling.area, channels, sampled, sampling};
}

template <class T>
__device__ __forceinline__ Lines<T> lines_of(const Activation& a) {
  return {static_cast<const T*>(a.image), a.pixels, a.channels, a.sampled, a.sampling};
}

/// A dense matrix [rows, columns].
template <class T>
__device__ __forceinline__ Lines<T> lines_of(const void* matrix, std::int64_t rows, int columns) {
  return {static_cast<const T*>(matrix), rows, columns, false, {}};
}

/// The prologue relu(scale * v + shift), rounded to T; without vectors, v.
template <class T>
struct Activated {
  static constexpr bool kActive = true, kSums = false, kRounds = false;
  using Column = Affine<kGroup<T>>;
  struct Piece {};
  struct Way {};

  const float* scale;  // [K], or null for none
  int channels;

  __device__ __forceinline__ bool on() const { return scale != nullptr; }

  template <bool kWide>
  __device__ __forceinline__ Column column(int channel, int valid) const {
    static_assert(kShift == kScale + 1);
    Column column;
    // Outside of the matrix nothing is computed, and any channel's numbers will do.
    const int from = valid > 0 ? channel : 0, count = kWide ? kGroup<T> : valid;
    load_vector<kWide>(column.scale, scale + from, count);
    load_vector<kWide>(column.shift, scale + from + channels, count);
    return column;
  }

  __device__ __forceinline__ Way line(std::int64_t, int) const { return {}; }

  __device__ __forceinline__ Piece piece(const Way&, int, int, int) const { return {}; }

  __device__ __forceinline__ Pack apply(const Column& column, const Piece&, const Pack& values) const {
    float result[kGroup<T>];
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) result[j] = relu(column(j, get<T>(values, j)));
    return pack<T>(result);
  }
};

/// vectors: [5, channels] or null.
template <class T>
__device__ __forceinline__ Activated<T> activated(const float* vectors, int channels) {
  const float* scale = vectors == nullptr ? nullptr : vectors + std::int64_t{kScale} * channels;
  ptx::keep(scale);
  return {scale, channels};
}

template <class T>
__device__ __forceinline__ Activated<T> activated(const Activation& a) {
  return activated<T>(a.vectors, a.channels);
}

/// sum += (W z)^T over all of z's channels: rows of z from `row` on, rows of the weight [C, K] from `column` on.
/// Without kActivated z has no BN and ReLU.
template <class T, class Tiling, bool kWide>
struct Pointwise {
  using Core = Product<T, Tiling, Major::kDepth, Major::kDepth, kWide>;

  template <bool kActivated = true>
  static __device__ __forceinline__ void add(Accumulators<Tiling>& sum, typename Core::Memory& memory,
                                             const Activation& z, const void* weight, int channels, std::int64_t row,
                                             int column) {
    const Lines<T> second = lines_of<T>(weight, channels, z.channels);
    const Range depth{0, z.channels};
    if constexpr (kActivated) {
      Core::add(sum, memory, lines_of<T>(z), row, activated<T>(z), second, column, AsIs{}, depth);
    } else {
      Core::add(sum, memory, lines_of<T>(z), row, AsIs{}, second, column, AsIs{}, depth);
    }
  }
};

/// What a block of a kernel over tiles of [P, C] works on.
struct TileOf {
  std::int64_t tile, row;  // number of its rows' tile, its first row
  int column;              // its first column
  int left;                // rows of it that there are
};

/// Tiles side by side.
template <class Tiling>
int tiles_across(int channels) {
  return (channels + Tiling::kColumns - 1) / Tiling::kColumns;
}

template <class Tiling>
__device__ __forceinline__ TileOf tile_of(std::int64_t pixels, int channels, const Divider& across) {
  const unsigned tile = across.quotient(blockIdx.x), columns = (channels + Tiling::kColumns - 1) / Tiling::kColumns;
  const std::int64_t row = std::int64_t{tile} * Tiling::kRows;
  const int column = static_cast<int>(blockIdx.x - tile * columns) * Tiling::kColumns;
  return {tile, row, column, static_cast<int>(pixels - row < Tiling::kRows ? pixels - row : Tiling::kRows)};
}

template <class Tiling>
unsigned tiles_of(std::int64_t pixels, int channels) {
  return static_cast<unsigned>((pixels + Tiling::kRows - 1) / Tiling::kRows * tiles_across<Tiling>(channels));
}

/// Where a lane's group of channels is.
template <class T, class Tiling>
__device__ __forceinline__ Place place_of(const TileOf& tile, int channels) {
  const std::int64_t channel = std::int64_t{tile.column} + Groups<T, Tiling>::column(), left = channels - channel;
  return {0, 0, 0, static_cast<int>(channel), left <= 0 ? 0 : left < kGroup<T> ? static_cast<int>(left) : kGroup<T>};
}

// All but one take the 48 KiB of shared memory that every GPU gives without being asked, or less. Rows are shared by as
// many warps in a small tile as in a large one: no bit of a result, statistics included, depends on that.
using SmallTiling = Tiling<64, 64, 64, 4, 4>;
/// Of warps with more rows, which issue fewer instructions for each result.
using LargeForwardTiling = Tiling<64, 128, 64, 3, 2>;
using TallForwardTiling = Tiling<128, 128, 64, 3, 2>;
using SmallForwardTiling = Tiling<64, 64, 64, 4, 2>;
/// Of a projection, and 48 KiB more for an accumulator: two blocks a multiprocessor in 164 KiB.
using ProjectionTiling = Tiling<128, 128, 64, 2, 2>;

enum class Tile { kSmall, kLarge, kTall };

/// From the shape alone: a large one where there are enough of them to fill a GPU of 144 multiprocessors twice.
template <class Large>
Tile default_tile(std::int64_t pixels, int channels) {
  return channels > 64 && tiles_of<Large>(pixels, channels) >= 288 ? Tile::kLarge : Tile::kSmall;
}

}  // namespace fused_res::cuda
