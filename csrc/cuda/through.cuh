// g A in the pass that reduces: of narrow shapes, whose channels are all in one block.
#pragma once

#include "pointwise.cuh"

namespace fused_res::cuda {

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
    const int second_place = Second::second_place(column);
    float sum[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kChannels / (2 * kGroup<T>); ++step) {
      std::uint32_t a[4];
      ptx::load_matrices(a, g.at(row + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        std::uint32_t b[4];
        factor.load_second(b, second_place, 8 * j, step);
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

struct NoThrough {
  struct Second {};
};

/// Whether a block that reduces has all channels of both, and may write g A, too.
inline bool goes_through(std::int64_t channels, std::int64_t inner) { return channels <= 64 && inner <= 64; }

}  // namespace fused_res::cuda
