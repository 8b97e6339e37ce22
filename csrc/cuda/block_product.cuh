// A block's tile of a matrix product without tensor cores: what is per pair of channels, in double where that counts.
#pragma once

#include "merge.cuh"

namespace fused_res::cuda {

/// Rows and columns of the tile; a thread has kProductCount rows of one column.
constexpr int kProductRows = 32, kProductColumns = 64;
constexpr int kProductCount = kProductRows * kProductColumns / kThreads;

/// What a block has of both factors at once. A row more, so that threads that write one element each do not all write
/// to the same banks.
template <class A>
struct ProductSlices {
  static constexpr int kDepth = 16;
  A left[kDepth][kProductRows + 1];
  A right[kDepth][kProductColumns];
};

/// Which of the left factor's elements lie side by side in memory.
enum class Lie { kAlongDepth, kAlongRows };

/// This thread's column of the tile, and the first of its rows.
__device__ __forceinline__ int product_column() { return static_cast<int>(threadIdx.x) % kProductColumns; }
__device__ __forceinline__ int product_row() { return static_cast<int>(threadIdx.x) / kProductColumns * kProductCount; }

/// sum[j] += the product of row product_row() + j and this thread's column over `depth`; left(row, d), right(d, column)
/// give the factors, 0 outside of the matrices. each(slices, d, n) sees the slice of the n places from d on.
///
/// Ends with a barrier. Every element is summed in the order of the depth.
template <Lie kLeft, class A, class Left, class Right, class Each>
__device__ __forceinline__ void block_product(int depth, A (&sum)[kProductCount], Left left, Right right, Each each) {
  using Slices = ProductSlices<A>;
  constexpr int kDepth = Slices::kDepth;
  constexpr int kLefts = kDepth * kProductRows / kThreads, kRights = kDepth * kProductColumns / kThreads;
  Slices& slices = shared_memory<Slices>();
  const int thread = static_cast<int>(threadIdx.x), column = product_column(), first_row = product_row();
  const auto row_of = [](int i) { return kLeft == Lie::kAlongDepth ? i / kDepth : i % kProductRows; };
  const auto depth_of = [](int i) { return kLeft == Lie::kAlongDepth ? i % kDepth : i / kProductRows; };

  A next_left[kLefts], next_right[kRights];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < kLefts; ++i) {
      const int e = thread + i * kThreads, d = from + depth_of(e);
      next_left[i] = d < depth ? left(row_of(e), d) : A(0);
    }
#pragma unroll
    for (int i = 0; i < kRights; ++i) {
      const int e = thread + i * kThreads, d = from + e / kProductColumns;
      next_right[i] = d < depth ? right(d, e % kProductColumns) : A(0);
    }
  };

  fetch(0);
  for (int from = 0; from < depth; from += kDepth) {
#pragma unroll
    for (int i = 0; i < kLefts; ++i) {
      const int e = thread + i * kThreads;
      slices.left[depth_of(e)][row_of(e)] = next_left[i];
    }
#pragma unroll
    for (int i = 0; i < kRights; ++i) {
      const int e = thread + i * kThreads;
      slices.right[e / kProductColumns][e % kProductColumns] = next_right[i];
    }
    __syncthreads();
    if (depth - from > kDepth) fetch(from + kDepth);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const A factor = slices.right[d][column];
#pragma unroll
      for (int j = 0; j < kProductCount; ++j) sum[j] += slices.left[d][first_row + j] * factor;
    }
    each(slices, from, depth - from < kDepth ? depth - from : kDepth);
    __syncthreads();
  }
}

/// The sums of all threads `stride` apart, `count` of them, onto the first: thread number `row` of them has this value.
/// With a count of 4 and more another such merge may follow at once: its first places have long been read.
__device__ __forceinline__ void merge_double(double& mine, int row, int count, int stride) {
  struct Scratch {
    double value[kThreads];
  };
  Scratch& scratch = shared_memory<Scratch>();
  merge_rows(
      row, count, stride, [&] { scratch.value[threadIdx.x] = mine; }, [&](int from) { mine += scratch.value[from]; });
}

}  // namespace fused_res::cuda
