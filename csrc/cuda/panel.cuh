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
  static_assert(kChunks == 2 || kChunks == 4 || kChunks % 8 == 0);
  static_assert(!kSingles || kChunks % 8 == 0);

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

  /// Where a lane's line is of what `load_first` takes from row `row` on, and `load_second` from column `column` on:
  /// what it needs beside is constants away.
  static __device__ __forceinline__ int first_place(unsigned row) {
    const unsigned lane = threadIdx.x % 32;
    return static_cast<int>(place(lane % 16, lane / 16) + row * kChunks);
  }
  static __device__ __forceinline__ int second_place(unsigned column) {
    const unsigned lane = threadIdx.x % 32;
    return static_cast<int>(place(lane / 16 * 8 + lane % 8, lane / 8 % 2) + column * kChunks);
  }

  /// What a lane reads of the step-th two chunks, `further` lines, a multiple of 8, behind such a place.
  __device__ __forceinline__ void load(std::uint32_t (&to)[4], int from, unsigned further, unsigned step) const {
    static_assert(kMajor == Major::kDepth);
    ptx::load_matrices(to, word + 4 * (from ^ static_cast<int>(2 * step)) + 4 * further * kChunks);
  }

  /// As a first factor: rows from `row` on, a multiple of 16, over the step-th two chunks of the depth.
  __device__ __forceinline__ void load_first(std::uint32_t (&to)[4], unsigned row, unsigned step) const {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (kMajor == Major::kDepth) {
      load(to, first_place(row), 0, step);
    } else if constexpr (kSingles) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = single(8 * step + lane % 4 + i / 2 * 4, row + lane / 4 + i % 2 * 8);
    } else {
      ptx::load_matrices_transposed(to, at(16 * step + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
    }
  }

  /// As a second factor: two words of 8 columns from `column` on, a multiple of 16, and two of the next 8.
  __device__ __forceinline__ void load_second(std::uint32_t (&to)[4], unsigned column, unsigned step) const {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (kMajor == Major::kDepth) {
      load(to, second_place(column), 0, step);
    } else if constexpr (kSingles) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = single(8 * step + lane % 4 + i % 2 * 4, column + lane / 4 + i / 2 * 8);
    } else {
      ptx::load_matrices_transposed(to, at(16 * step + lane / 8 % 2 * 8 + lane % 8, column / 8 + lane / 16));
    }
  }

 private:
  __device__ __forceinline__ std::uint32_t single(unsigned line, unsigned element) const {
    return ptx::shared_load<std::uint32_t>(word + 4 * place(line, element / 4) + element % 4);
  }
};

}  // namespace fused_res::cuda
