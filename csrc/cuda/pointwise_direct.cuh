// Kernel of `pointwise_direct`: sums over y = W z in double, for the few channels in which the moment form would
// cancel. Which these are the device decides; without any a block is done at once.
#pragma once

#include "multiplied.cuh"
#include "spread.cuh"

namespace fused_res::cuda {

constexpr int kDirectChannels = 64;

/// Rows of a tile, and how many tiles there are: about 256 blocks.
inline Tiles direct_tiles(std::int64_t pixels, std::int64_t channels) {
  const std::int64_t across = (channels + kDirectChannels - 1) / kDirectChannels;
  const std::int64_t wanted = (pixels * across + 255) / 256, rows = (wanted > 256 ? wanted + 15 : 256) / 16 * 16;
  return {(pixels + rows - 1) / rows, rows};
}

struct PointwiseDirect {
  Pixels z;                   // [P, K]
  Parameter weight;           // [C, K]
  Suspects suspects;          // [C]
  Parameter dout;             // [P, C] or null
  const std::uint8_t* signs;  // [P, ceil(C / 8)] with dout
  const float* mean;          // [C] with dout
  double* partials;   // [T, 3, C]: sums of y - start and of its square, and start; with dout [T, C]: of g * (y - mean)
  std::int64_t rows;  // of a tile
  int channels;
};

/// Channel c of y at a pixel.
__device__ __forceinline__ double direct_value(const PointwiseDirect& a, std::int64_t pixel, std::int64_t c) {
  const std::int64_t K = a.z.channels, start = a.z.start(pixel);
  double y = 0.;
#pragma unroll 1
  for (int k = 0; k < a.z.channels; ++k) y += a.weight.wide(c * K + k) * static_cast<double>(a.z.at(start, k));
  return y;
}

// With a number of blocks: without, ptxas keeps to 48 registers on compute capability 8.0, and lets some go to memory.
static __global__ void __launch_bounds__(kThreads, 4) pointwise_direct_kernel(PointwiseDirect a) {
  struct Flags {
    bool suspect[kDirectChannels];
  };
  Flags& flags = shared_memory<Flags>();
  const std::int64_t C = a.channels;
  const unsigned across = (static_cast<unsigned>(a.channels) + kDirectChannels - 1) / kDirectChannels;
  const std::int64_t tile = blockIdx.x / across, begin = std::int64_t{blockIdx.x % across} * kDirectChannels;
  const std::int64_t first = tile * a.rows, end = first + a.rows < a.z.count ? first + a.rows : a.z.count;
  const int thread = static_cast<int>(threadIdx.x);
  const bool stats = a.dout.data == nullptr;

  if (thread < kDirectChannels) flags.suspect[thread] = begin + thread < C && a.suspects.at(begin + thread, C);
  __syncthreads();
  for (int i = 0; i < kDirectChannels; ++i) {
    if (!flags.suspect[i]) continue;
    const std::int64_t c = begin + i;
    // Counted from the tile's first row, which keeps the digits of a mean far from 0.
    const double start = stats ? direct_value(a, first, c) : static_cast<double>(a.mean[c]);
    double total = 0., squares = 0.;
    for (std::int64_t pixel = first + thread; pixel < end; pixel += kThreads) {
      if (stats) {
        const double y = direct_value(a, pixel, c) - start;
        total += y;
        squares += y * y;
      } else if (a.signs[sign_byte(pixel, static_cast<int>(c), a.channels)] >> (c % 8) & 1u) {
        total += static_cast<double>(a.dout.at(pixel * C + c)) * (direct_value(a, pixel, c) - start);
      }
    }
    merge_double(total, thread, kThreads, 1);
    if (stats) merge_double(squares, thread, kThreads, 1);
    if (thread > 0) continue;
    a.partials[tile * (stats ? 3 : 1) * C + c] = total;
    if (stats) {
      a.partials[(tile * 3 + 1) * C + c] = squares;
      a.partials[(tile * 3 + 2) * C + c] = start;
    }
  }
}

inline void pointwise_direct(const PointwiseDirect& a, const Queue& queue) {
  const std::int64_t across = (std::int64_t{a.channels} + kDirectChannels - 1) / kDirectChannels;
  const std::int64_t tiles = (a.z.count + a.rows - 1) / a.rows;
  launch(pointwise_direct_kernel, static_cast<unsigned>(tiles * across), queue, a);
}

/// What `pointwise_direct_kernel` has left.
struct DirectPartials {
  const double* partials;
  std::int64_t tiles;
  double rows, last, pixels;                          // of a tile, of the last one, in all
  double share_of_rows, share_of_last, share_of_all;  // 1 / each

  __device__ __forceinline__ double sum(std::int64_t c, std::int64_t C) const {
    double total = 0.;
    for (std::int64_t t = 0; t < tiles; ++t) total += partials[t * C + c];
    return total;
  }

  /// Mean and biased variance of a suspect channel.
  __device__ __forceinline__ void statistics(std::int64_t c, std::int64_t C, double& mean, double& var) const {
    double total = 0., squares = 0.;
    for (std::int64_t t = 0; t < tiles; ++t) {
      const double* from = partials + t * 3 * C + c;
      total += from[0] + from[2 * C] * (t < tiles - 1 ? rows : last);
    }
    mean = total * share_of_all;
    for (std::int64_t t = 0; t < tiles; ++t) {
      const double* from = partials + t * 3 * C + c;
      const double near = from[0] * (t < tiles - 1 ? share_of_rows : share_of_last), far = from[2 * C] + near - mean;
      squares += from[C] + (t < tiles - 1 ? rows : last) * (far * far - near * near);
    }
    var = squares < 0. ? 0. : squares * share_of_all;
  }
};

inline DirectPartials direct_partials(const double* partials, const Tiles& tiles, std::int64_t pixels) {
  const double rows = static_cast<double>(tiles.rows), all = static_cast<double>(pixels);
  const double last = static_cast<double>(pixels - tiles.rows * (tiles.count - 1));
  return {partials, tiles.count, rows, last, all, 1. / rows, 1. / last, 1. / all};
}

}  // namespace fused_res::cuda
