// The incoming gradient of a block, where its last ReLU was open.
#pragma once

#include "pivots.cuh"

namespace fused_res::cuda {

/// The incoming gradient [P, C], and where the outer ReLU was open.
struct Incoming {
  const void* dout;           // [P, C]
  const std::uint8_t* signs;  // [P, ceil(C / 8)]
  int channels;
};

/// The prologue of g: dout where the outer ReLU was open, 0 elsewhere. Its sums are taken on the way, of g and, of
/// float32, of g as it is multiplied.
template <class T>
struct Masked {
  // Of lines that there are not all is shut out.
  static constexpr bool kActive = true, kSums = false, kRounds = true;
  static constexpr int kCount = kGroup<T>;
  struct Column {};
  using Piece = unsigned;
  struct Way {
    const std::uint8_t* signs;
    int upper;  // whether the byte's upper half is the group's
  };

  const std::uint8_t* signs;
  int row_bytes;
  mutable float sum[kCount], multiplied[kCount];

  __device__ __forceinline__ bool on() const { return true; }

  template <bool kWide>
  __device__ __forceinline__ Column column(int, int) const {
    return {};
  }

  __device__ __forceinline__ Way line(std::int64_t line, int channel) const {
    const std::uint8_t* at = signs + line * row_bytes + channel / 8;
    ptx::keep(at);
    return {at, channel % 8};
  }

  __device__ __forceinline__ Piece piece(const Way& way, int lines, int channels, int valid) const {
    if (valid <= 0) return 0;
    const std::uint64_t further = std::uint64_t{static_cast<unsigned>(lines)} * static_cast<unsigned>(row_bytes);
    const unsigned byte = __ldg(way.signs + further + channels / 8);
    return kCount == 4 && way.upper ? byte >> 4 : byte;
  }

  __device__ __forceinline__ Pack apply(const Column&, const Piece& open, const Pack& values) const {
    Pack result;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float v = open >> j & 1u ? get<T>(values, j) : 0.f, as_multiplied = rounded<T>(v);
        sum[j] += v;
        multiplied[j] += as_multiplied;
        result.word[j] = __float_as_uint(as_multiplied);
      }
    } else {
      // Of the bits for two channels, the one for the first goes to the top of a byte, the other to that of the next.
      const std::uint32_t apart = open | open << 7;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        result.word[i] = values.word[i] & ptx::halves(apart << (7 - 2 * i));
#pragma unroll
        for (int h = 0; h < 2; ++h) sum[2 * i + h] += half_of<T>(result.word[i], h);
      }
    }
    return result;
  }
};

template <class T>
__device__ __forceinline__ Masked<T> masked(const Incoming& g) {
  int row_bytes = (g.channels + 7) / 8;
  ptx::keep(row_bytes);
  return {g.signs, row_bytes, {}, {}};
}

}  // namespace fused_res::cuda
