// How threads share a matrix of activations [P, C]: a thread keeps one group of channels and walks over rows.
//
// Its per-channel vectors then stay in registers. The threads of a block lie `across` groups wide and `down` rows deep,
// so that those of a warp read consecutive memory; where a row is too wide, `chunks` blocks stand side by side.
#pragma once

#include <cstdint>

#include "number.cuh"

namespace fused_res::cuda {

constexpr int kThreads = 256;
constexpr int kMostAcross = 32;

struct Layout {
  std::int64_t rows;
  int channels;
  int across;
  int down;
  int chunks;
};

/// `group`: channels of one thread. The layout never depends on alignment, so that results do not either.
inline Layout make_layout(std::int64_t rows, int channels, int group) {
  const int groups = channels > 0 ? (channels - 1) / group + 1 : 1;
  const int chunks = (groups + kMostAcross - 1) / kMostAcross;
  int across = (groups + chunks - 1) / chunks;
  // Two groups of four share a byte of signs: they must be neighbours in a warp.
  if (group < 8) across += across % 2;
  return {rows, channels, across, kThreads / across, chunks};
}

/// Rows of a reduction's tiles: what rounding and partial results depend on, hence a function of the shape alone.
struct Tiles {
  std::int64_t count;
  std::int64_t rows;
};

/// About 512 blocks: they occupy the largest GPUs, are all resident on those of 108 multiprocessors, and one block of a
/// finalize kernel reads their partial results.
inline Tiles row_tiles(std::int64_t rows, int channels, int blocks = 512) {
  const int step = channels < 1 ? 4096 : channels < 256 ? 4096 / channels : 16;
  const int chunks = channels > 0 ? (channels - 1) / 256 + 1 : 1;
  const std::int64_t most = blocks > chunks ? blocks / chunks : 1;
  const std::int64_t steps = (rows + step - 1) / step;
  const std::int64_t each = steps > most ? (steps + most - 1) / most * step : step;
  const std::int64_t count = (rows + each - 1) / each;
  return {count > 0 ? count : 1, each};
}

/// Blocks for a kernel that takes `rows_at_once` rows a step and has no partial results: no more than fit the device at
/// once, and each with the same number of steps.
inline unsigned persistent_blocks(const Layout& layout, int rows_at_once, int multiprocessors) {
  const std::int64_t steps = (layout.rows + rows_at_once - 1) / rows_at_once;
  const std::int64_t resident = std::int64_t{8} * multiprocessors / layout.chunks;
  const std::int64_t each = resident > 0 ? (steps + resident - 1) / resident : steps;
  return each > 0 ? static_cast<unsigned>((steps + each - 1) / each * layout.chunks) : 0;
}

/// A thread's share of the matrix.
struct Place {
  unsigned block;   // number of its block among those of the same chunk
  unsigned blocks;  // how many those are
  int row;          // row within the block; beyond `down` for the few threads that do not fit
  int channel;      // first channel of its group
  int valid;        // channels of its group, 0 where the thread has nothing to do
};

template <class T>
__device__ __forceinline__ Place locate(const Layout& layout) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / layout.across;
  const unsigned block = blockIdx.x / layout.chunks;
  const int chunk = static_cast<int>(blockIdx.x - block * layout.chunks);
  // In 64 bits: the last chunk's idle groups may lie past 2^31 channels.
  const std::int64_t channel = (std::int64_t{chunk} * layout.across + (thread - row * layout.across)) * kGroup<T>;
  const std::int64_t left = row < layout.down ? layout.channels - channel : 0;
  const int valid = left <= 0 ? 0 : left < kGroup<T> ? static_cast<int>(left) : kGroup<T>;
  return {block, gridDim.x / layout.chunks, row, static_cast<int>(channel), valid};
}

/// max(v, 0) that keeps NaN.
__device__ __forceinline__ float relu(float v) { return v <= 0.f ? 0.f : v; }

/// Whether the ReLU lets v's gradient pass; NaN does.
__device__ __forceinline__ bool is_open(float v) { return !(v <= 0.f); }

}  // namespace fused_res::cuda
