// Merging what the threads of a block have summed up, in an order that is always the same.
#pragma once

#include "launch.cuh"

namespace fused_res::cuda {

#ifdef __CUDACC__
/// The block's shared memory, one T.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T storage;
  return storage;
}
#endif

/// The same where it may be more than a kernel can have by itself: the launch gives it.
template <class T>
__device__ __forceinline__ T& large_shared_memory() {
#ifdef __CUDACC__
  if constexpr (sizeof(T) > kStaticMemory) {
    static_assert(alignof(T) <= 512);
    extern __shared__ __align__(512) unsigned char given[];
    return *reinterpret_cast<T*>(given);
  } else {
    return shared_memory<T>();
  }
#else
  return shared_memory<T>();
#endif
}

/// Reduce the values of threads that lie `stride` apart, `count` of them, onto the first: number `row` hands its value
/// to number `row - half` through `write`, which takes it through `read(thread that wrote it)`.
///
/// A thread writes once, into a place of its own: one barrier a step is enough.
template <class Write, class Read>
__device__ __forceinline__ void merge_rows(int row, int count, int stride, Write write, Read read) {
  int half = 1;
  while (half * 2 < count) half *= 2;
  for (; half > 0; half /= 2) {
    if (row >= half && row < 2 * half && row < count) write();
    __syncthreads();
    if (row < half && row + half < count) read(static_cast<int>(threadIdx.x) + half * stride);
  }
}

/// Count, mean and sum of squared deviations of kCount channels.
template <int kCount>
struct Moments {
  float count;
  float mean[kCount];
  float squares[kCount];

  /// Chan, Golub and LeVeque's formula. Merging nothing changes nothing, infinities included.
  template <class Other>
  __device__ __forceinline__ void merge(float other_count, Other other) {
    if (other_count == 0.f) return;
    const float both = count + other_count;
    const float weight = other_count / both;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float other_mean, other_squares;
      other(j, other_mean, other_squares);
      const float delta = other_mean - mean[j];
      mean[j] += delta * weight;
      squares[j] += other_squares + delta * delta * (count * weight);
    }
    count = both;
  }
};

/// The moments of all threads of a column, onto its first thread.
template <int kCount>
__device__ __forceinline__ void merge_moments(Moments<kCount>& mine, int row, int rows, int stride) {
  struct Scratch {
    float count[kThreads];
    float mean[kCount][kThreads];
    float squares[kCount][kThreads];
  };
  Scratch& scratch = shared_memory<Scratch>();
  merge_rows(
      row, rows, stride,
      [&] {
        const unsigned to = threadIdx.x;
        scratch.count[to] = mine.count;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          scratch.mean[j][to] = mine.mean[j];
          scratch.squares[j][to] = mine.squares[j];
        }
      },
      [&](int from) {
        mine.merge(scratch.count[from], [&](int j, float& mean, float& squares) {
          mean = scratch.mean[j][from];
          squares = scratch.squares[j][from];
        });
      });
}

/// The sums of all threads of a column, onto its first thread.
template <int kSums, int kCount>
__device__ __forceinline__ void merge_sums(float (&mine)[kSums][kCount], int row, int rows, int stride) {
  struct Scratch {
    float sum[kSums][kCount][kThreads];
  };
  Scratch& scratch = shared_memory<Scratch>();
  merge_rows(
      row, rows, stride,
      [&] {
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) scratch.sum[s][j][threadIdx.x] = mine[s][j];
        }
      },
      [&](int from) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) mine[s][j] += scratch.sum[s][j][from];
        }
      });
}

}  // namespace fused_res::cuda
