// The work of a block that multiplies, and the way of its result from registers to memory.
#pragma once

#include "launch.cuh"
#include "ptx.cuh"

namespace fused_res::cuda {

/// The work of a block: rows x columns of a result, in steps of kDepthBytes of each line; stages of copies; how its
/// warps share it. A warp has 64 columns.
template <int kRows_, int kColumns_, int kDepthBytes_, int kStages_, int kWarpsDown_>
struct Tiling {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_, kDepthBytes = kDepthBytes_;
  static constexpr int kWarpsDown = kWarpsDown_, kWarpColumns = 64, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarps = kWarpsDown * kWarpsAcross, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = kRows / kWarpsDown;
  static constexpr int kTilesDown = kWarpRows / 16, kTilesAcross = kWarpColumns / 8;
  /// Of a multiprocessor at once: 16 warps of 128 registers a thread, or of 64 results 12 warps of 168, or of 128 8.
  static constexpr int kBlocks = (kTilesDown == 1 ? 512 : kTilesDown == 2 ? 384 : 256) / kThreads;
  static_assert(kColumns % kWarpColumns == 0 && kWarpRows % 16 == 0 && kStages >= 2);

  /// The first row and column of the thread's warp.
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x / 32 / kWarpsAcross) * kWarpRows;
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x / 32 % kWarpsAcross) * kWarpColumns;
  }
};

/// A warp's part of the result, in the words of `multiply`.
template <class Tiling>
struct Accumulators {
  float value[Tiling::kTilesDown][Tiling::kTilesAcross][4] = {};
};

/// A row of a block's tile: the lane's first, and how many further down, which is a constant once loops are unrolled.
struct TileRow {
  int first, down;

  __device__ __forceinline__ operator int() const { return first + down; }
};

/// What is done with a value: nothing.
struct Unchanged {
  __device__ __forceinline__ float operator()(float value) const { return value; }
};

/// The way of a result from registers to memory: a warp hands 16 rows of it at a time to its lanes, in groups of 16
/// bytes of the format T that it is stored in. A lane's groups all begin at the same column.
template <class T, class Tiling>
struct Groups {
  static constexpr int kCount = kGroup<T>, kAcross = Tiling::kWarpColumns / kCount, kDown = 32 / kAcross;
  /// Of 4 rows lanes write 8 columns at once, and of 8 columns each they read chunks that a pair of them has swapped.
  static constexpr int kPitch = Tiling::kWarpColumns + 8;

  struct Memory {
    alignas(16) float value[Tiling::kWarps][16 * kPitch];
  };

  /// The lane's column in the block's tile.
  static __device__ __forceinline__ int column() {
    return Tiling::warp_column() + static_cast<int>(threadIdx.x % kAcross) * kCount;
  }

  /// The lane's first row in the block's tile.
  static __device__ __forceinline__ int row() {
    return Tiling::warp_row() + static_cast<int>(threadIdx.x % 32 / kAcross);
  }

  /// Calls `finish(row in the block's tile, values, fetched)` in all lanes, with what `fetch(row)` has returned
  /// earlier: for several rows at once, so that their loads are on their way together.
  template <class Fetch, class Finish>
  static __device__ __forceinline__ void each(const Accumulators<Tiling>& sum, Memory& memory, Fetch fetch,
                                              Finish finish) {
    using Fetched = decltype(fetch(TileRow{}));
    constexpr int kPasses = 16 / kDown, kAtOnce = 4;
    const unsigned lane = threadIdx.x % 32;
    float* slab = memory.value[threadIdx.x / 32];
    // Columns 32 and more lie in swapped chunks; what is written and read is constants away from these.
    float* to[2] = {slab + place(lane / 4, lane % 4 * 2, 0), slab + place(lane / 4, lane % 4 * 2, 1)};
    const unsigned across = lane % kAcross * kCount, swapped = across / 32 % 2;
    const float* from[2] = {slab + place(lane / kAcross, across, swapped),
                            slab + place(lane / kAcross, across + 4, swapped)};
#pragma unroll
    for (int i = 0; i < Tiling::kTilesDown; ++i) {
      Fetched fetched[kAtOnce];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) fetched[p] = fetch(TileRow{row(), 16 * i + p * kDown});
      // What was there has been read.
      __syncwarp();
#pragma unroll
      for (int j = 0; j < Tiling::kTilesAcross; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto& v = sum.value[i][j];
          ptx::shared_store(to[j / 4 % 2] + 8 * h * kPitch + 8 * j, make_float2(v[2 * h], v[2 * h + 1]));
        }
      }
      __syncwarp();
#pragma unroll
      for (int batch = 0; batch < kPasses; batch += kAtOnce) {
        if (batch > 0) {
#pragma unroll
          for (int p = 0; p < kAtOnce; ++p) fetched[p] = fetch(TileRow{row(), 16 * i + (batch + p) * kDown});
        }
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          const int down = (batch + p) * kDown;
          float value[kCount];
#pragma unroll
          for (int q = 0; q < kCount / 4; ++q) {
            const uint4 v = ptx::shared_load<uint4>(from[q] + down * kPitch);
            value[4 * q] = __uint_as_float(v.x);
            value[4 * q + 1] = __uint_as_float(v.y);
            value[4 * q + 2] = __uint_as_float(v.z);
            value[4 * q + 3] = __uint_as_float(v.w);
          }
          finish(TileRow{row(), 16 * i + down}, value, fetched[p]);
        }
      }
    }
  }

  /// The same of values rounded to T, without anything fetched: `finish(row, their group)`. Before they are rounded,
  /// they go through `last`.
  template <class Finish, class Last = Unchanged>
  static __device__ __forceinline__ void each_rounded(const Accumulators<Tiling>& sum, Memory& memory, Finish finish,
                                                      Last last = {}) {
    if constexpr (sizeof(T) == 4) {
      each(
          sum, memory, [](TileRow) { return 0; },
          [&](TileRow row, const float (&value)[kCount], int) {
            float result[kCount];
#pragma unroll
            for (int q = 0; q < kCount; ++q) result[q] = last(value[q]);
            finish(row, pack<T>(result));
          });
    } else {
      // Of 8 rows lanes write 4 words at once; 8 lanes read a row.
      constexpr int kPitch = Tiling::kWarpColumns / 2 + 4;
      const unsigned lane = threadIdx.x % 32;
      float* slab = memory.value[threadIdx.x / 32];
      float* to = slab + lane / 4 * kPitch + lane % 4;
      const float* from = slab + lane / kAcross * kPitch + lane % kAcross * 4;
#pragma unroll
      for (int i = 0; i < Tiling::kTilesDown; ++i) {
        // What was there has been read.
        __syncwarp();
#pragma unroll
        for (int j = 0; j < Tiling::kTilesAcross; ++j) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto& v = sum.value[i][j];
            ptx::shared_store(to + 8 * h * kPitch + 4 * j, narrow_pair<T>(last(v[2 * h]), last(v[2 * h + 1])));
          }
        }
        __syncwarp();
#pragma unroll
        for (int down = 0; down < 16; down += kDown) {
          const uint4 v = ptx::shared_load<uint4>(from + down * kPitch);
          finish(TileRow{row(), 16 * i + down}, Pack{{v.x, v.y, v.z, v.w}});
        }
      }
    }
  }

 private:
  /// swapped: whether it is of columns 32 to 63 of each 64.
  static __device__ __forceinline__ unsigned place(unsigned row, unsigned column, unsigned swapped) {
    return row * kPitch + (column / 4 ^ swapped) * 4 + column % 4;
  }
};

}  // namespace fused_res::cuda
