// One factor of a product in shared memory: a tile of a matrix, in chunks of 16 bytes, and the words that `multiply`
// takes of it.
#pragma once

#include "ptx.cuh"

namespace fused_res::cuda {

/// What lies side by side in a line of a factor's memory: its depth, which the product sums over (the channels of a
/// pixel, of a weight's row); or its extent, the rows or columns of the result (the channels of a pixel, summing over
/// pixels).
enum class Major { kDepth, kExtent };

/// kExtent rows of a first factor or columns of a second one, over kDepth elements.
///
/// The chunks of a line change places by a pattern that depends on the line: whatever is written or read at once, a
/// line or the same chunk of lines that follow each other, lies in different banks. Panels start at multiples of 512
/// bytes.
template <class T, int kExtent, int kDepth, Major kMajor>
struct Panel {
  static constexpr int kLines = kMajor == Major::kDepth ? kExtent : kDepth;
  static constexpr int kChunks = (kMajor == Major::kDepth ? kDepth : kExtent) / kGroup<T>;
  static constexpr bool kSingles = kMajor == Major::kExtent && sizeof(T) == 4;
  static_assert(kExtent % 16 == 0 && kDepth % (2 * kGroup<T>) == 0 && kLines % 8 == 0);
  static_assert(kMajor == Major::kDepth ? kChunks == 2 || kChunks == 4 || kChunks % 8 == 0
                                        : kChunks % 8 == 0 && (kChunks & (kChunks - 1)) == 0);

  alignas(16) std::uint32_t word[kLines * kChunks * 4];

  /// A chunk's number in memory.
  static __device__ __forceinline__ unsigned place(unsigned line, unsigned chunk) {
    // Of single elements lanes read 8 of each of 4 lines, two chunks; and as matrices the same chunk of 8 lines.
    const unsigned turn = kSingles       ? line % 4 * 2 + line / 4 % 2
                          : kChunks >= 8 ? line % 8
                          : kChunks == 4 ? line / 2 % 4
                                         : line / 4 % 2;
    return line * kChunks + (chunk ^ turn);
  }

  /// Where a chunk is.
  __device__ __forceinline__ void* at(unsigned line, unsigned chunk) { return word + 4 * place(line, chunk); }
  __device__ __forceinline__ const void* at(unsigned line, unsigned chunk) const {
    return word + 4 * place(line, chunk);
  }

  /// Where a lane reads, in words, what `load_first` takes from row `row` on, and `load_second` from column `column`
  /// on, multiples of 16: what it needs beside is constants away, or changes single bits. A multiple, too, of the power
  /// of 2 that the warp goes further from there.
  static __device__ __forceinline__ int first_place(unsigned row) {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (kMajor == Major::kDepth) return static_cast<int>(4 * (place(lane % 16, lane / 16) + row * kChunks));
    if constexpr (kSingles) return single_place(row);
    return static_cast<int>(4 * (place(lane / 16 * 8 + lane % 8, lane / 8 % 2) ^ row / 8));
  }
  static __device__ __forceinline__ int second_place(unsigned column) {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (kMajor == Major::kDepth) {
      return static_cast<int>(4 * (place(lane / 16 * 8 + lane % 8, lane / 8 % 2) + column * kChunks));
    }
    if constexpr (kSingles) return single_place(column);
    return static_cast<int>(4 * (place(lane / 8 % 2 * 8 + lane % 8, lane / 16) ^ column / 8));
  }

  /// As a first factor: 16 rows, `further` behind such a place, over the step-th two chunks of the depth.
  __device__ __forceinline__ void load_first(std::uint32_t (&to)[4], int from, int further, int step) const {
    if constexpr (kSingles) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = single(from, further + i % 2 * 8, 2 * step + i / 2);
    } else {
      load(to, from, further, step);
    }
  }

  /// As a second factor: two words of 8 columns, `further` behind such a place, and two of the next 8.
  __device__ __forceinline__ void load_second(std::uint32_t (&to)[4], int from, int further, int step) const {
    if constexpr (kSingles) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = single(from, further + i / 2 * 8, 2 * step + i % 2);
    } else {
      load(to, from, further, step);
    }
  }

 private:
  __device__ __forceinline__ void load(std::uint32_t (&to)[4], int from, int further, int step) const {
    if constexpr (kMajor == Major::kDepth) {
      ptx::load_matrices(to, word + (from ^ 8 * step) + 4 * further * kChunks);
    } else {
      ptx::load_matrices_transposed(to, word + (from ^ further / 2) + 64 * step * kChunks);
    }
  }

  /// Of single elements a lane reads those of an eighth of the extent, number lane / 4, in every fourth line.
  static __device__ __forceinline__ int single_place(unsigned element) {
    const unsigned lane = threadIdx.x % 32;
    return static_cast<int>(4 * (place(lane % 4, lane / 16) ^ element / 4) + lane / 4 % 4);
  }

  /// In the lines `four` times 4 behind the place; these change the lowest bit of where chunks lie in turn.
  __device__ __forceinline__ std::uint32_t single(int from, int further, int four) const {
    return ptx::shared_load<std::uint32_t>(word + (from ^ further ^ 4 * (four % 2)) + 16 * four * kChunks);
  }
};

}  // namespace fused_res::cuda
