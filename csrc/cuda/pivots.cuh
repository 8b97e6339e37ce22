// Columns counted from a value of theirs, so that the digits of a mean far from 0 are kept, and their sums.
#pragma once

#include "pointwise.cuh"

namespace fused_res::cuda {

/// What differences from `start` are multiplied by before they are rounded: float16 may not hold those from a far one.
/// Halves of those from a start of 8 and more lose nothing: their last digits lie far above the smallest float16.
template <class T>
__device__ __forceinline__ float reach(float start) {
  return std::is_same_v<T, Half> && fabsf(start) >= 8.f ? 0.5f : 1.f;
}

/// A float as a product of T multiplies it.
template <class T>
__device__ __forceinline__ float rounded(float v) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(ptx::to_tf32(__float_as_uint(v)));
  return widen(narrow<T>(v));
}

/// Floats as a product of T multiplies them.
template <class T>
__device__ __forceinline__ void round_group(float (&v)[kGroup<T>]) {
#pragma unroll
  for (int j = 0; j < kGroup<T>; j += 2) {
    if constexpr (sizeof(T) == 4) {
      v[j] = rounded<T>(v[j]);
      v[j + 1] = rounded<T>(v[j + 1]);
    } else {
      round_pair<T>(v[j], v[j + 1]);
    }
  }
}

/// z as products multiply it.
template <class T>
struct AsMultiplied {
  static constexpr bool kActive = true, kSums = false, kRounds = true;
  using Column = Affine<kGroup<T>>;
  struct Piece {};
  struct Way {};

  Activated<T> z;

  __device__ __forceinline__ bool on() const { return sizeof(T) == 4 || z.on(); }

  template <bool kWide>
  __device__ __forceinline__ Column column(int channel, int valid) const {
    return z.on() ? z.template column<kWide>(channel, valid) : Column{};
  }

  __device__ __forceinline__ Way line(std::int64_t, int) const { return {}; }

  __device__ __forceinline__ Piece piece(const Way&, int, int, int) const { return {}; }

  __device__ __forceinline__ Pack apply(const Column& column, const Piece&, const Pack& values) const {
    Pack value = z.on() ? z.apply(column, {}, values) : values;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (std::uint32_t& word : value.word) word = ptx::to_tf32(word);
    }
    return value;
  }
};

/// A word of ones.
template <class T>
constexpr std::uint32_t ones() {
  return sizeof(T) == 4 ? 0x3f800000u : std::is_same_v<T, Half> ? 0x3c003c00u : 0x3f803f80u;
}

/// z as products multiply it, counted from a start for each column; its sums are taken on the way. Differences that
/// need more digits than T has come in two parts.
template <class T>
struct Centred {
  static constexpr bool kActive = true, kSums = true, kRounds = true;
  static constexpr int kCount = kGroup<T>;
  using Column = Affine<kCount>;
  struct Piece {};
  struct Way {};

  Activated<T> z;
  bool far, low;  // whether any start of the block is not 0; which part
  float start[kCount];
  mutable float sum[kCount];

  __device__ __forceinline__ bool on() const { return true; }

  template <bool kWide>
  __device__ __forceinline__ Column column(int channel, int valid) const {
    return z.on() ? z.template column<kWide>(channel, valid) : Column{};
  }

  __device__ __forceinline__ Way line(std::int64_t, int) const { return {}; }

  __device__ __forceinline__ Piece piece(const Way&, int, int, int) const { return {}; }

  __device__ __forceinline__ Pack apply(const Column& column, const Piece&, const Pack& values) const {
    const Pack value = z.on() ? z.apply(column, {}, values) : values;
    float result[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      result[j] = sizeof(T) == 4 ? rounded<T>(get<T>(value, j)) : get<T>(value, j);
      if (far) result[j] -= start[j];
      sum[j] += result[j];
    }
    if (!far && sizeof(T) == 2) return value;
    if (far) {
      float high[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) high[j] = result[j] *= reach<T>(start[j]);
      round_group<T>(high);
#pragma unroll
      for (int j = 0; j < kCount; ++j) result[j] -= high[j];
      if (low) {
        round_group<T>(result);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) result[j] = high[j];
      }
    }
    return pack<T>(result);
  }
};

/// What a thread's columns count from: 0, or where a column is far from 0 the median of three of its values in the
/// tile.
///
/// It is far where of the tile's first 64 rows at least kShare eighths are no farther from the median than kReach
/// eighths of it. Values near 0 lose nothing by counting from there. Every block that asks for a column of a tile gets
/// the same, to the bit.
template <class T, class Tiling, bool kWide, int kShare, int kReach>
struct Pivots {
  static constexpr int kCount = kGroup<T>, kAcross = Tiling::kColumns / kCount, kDown = Tiling::kThreads / kAcross;
  static constexpr int kRows = 64, kWords = kCount / 4;
  static_assert(kRows < 256 && kRows % kDown == 0);

  struct Memory {
    alignas(16) std::uint32_t near[kWords][kDown][kAcross];  // a byte for each column
    float start[kCount][kAcross];
    std::uint32_t far[kAcross];
  };

  /// All threads must come. Returns whether any of the block's columns is far.
  static __device__ __forceinline__ bool find(Memory& memory, const Lines<T>& z, const Activated<T>& prologue,
                                              int channel, int valid, Range rows, float (&start)[kCount]) {
    const int across = static_cast<int>(threadIdx.x) % kAcross, slot = static_cast<int>(threadIdx.x) / kAcross;
    Affine<kCount> affine{};
    if (prologue.on()) affine = prologue.template column<kWide>(channel, valid);
    const auto values = [&](std::int64_t row, float (&to)[kCount]) {
      const Pack lies = load<T, kWide>(valid > 0 ? z.at(row) + channel : z.data, valid);
      // Columns that there are not are 0, and near it.
      const Pack value = prologue.on() && valid > 0 ? prologue.apply(affine, {}, lies) : lies;
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = rounded<T>(get<T>(value, j));
    };
    float middle[kCount], last[kCount];
    values(rows.begin, start);
    values(rows.begin + (rows.end - rows.begin) / 2, middle);
    values(rows.end - 1, last);
#pragma unroll
    for (int j = 0; j < kCount; ++j) start[j] = median(start[j], middle[j], last[j]);

    std::uint32_t near[kWords] = {};
#pragma unroll 2
    for (int row = slot; row < kRows; row += kDown) {
      if (rows.begin + row >= rows.end) break;
      float value[kCount];
      values(rows.begin + row, value);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const bool is_near = fabsf(value[j] - start[j]) <= 0.125f * kReach * fabsf(start[j]);
        near[j / 4] += static_cast<std::uint32_t>(is_near) << (8 * (j % 4));
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) ptx::shared_store(&memory.near[w][slot][across], near[w]);
    __syncthreads();
    if (slot == 0) {
      const std::int64_t seen = rows.end - rows.begin < kRows ? rows.end - rows.begin : kRows;
      std::uint32_t far = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        near[w] = 0;
        for (int s = 0; s < kDown; ++s) near[w] += ptx::shared_load<std::uint32_t>(&memory.near[w][s][across]);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (static_cast<int>(near[j / 4] >> (8 * (j % 4)) & 255u) * 8 < kShare * seen) start[j] = 0.f;
        if (start[j] != 0.f) far = 1;
        ptx::shared_store(&memory.start[j][across], start[j]);
      }
      ptx::shared_store(&memory.far[across], far);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kCount; ++j) start[j] = ptx::shared_load<float>(&memory.start[j][across]);
    std::uint32_t far = 0;
    for (int i = 0; i < kAcross; ++i) far |= ptx::shared_load<std::uint32_t>(&memory.far[i]);
    __syncthreads();
    return far != 0;
  }

 private:
  /// The middle one of three values; any of them where one is NaN.
  static __device__ __forceinline__ float median(float a, float b, float c) {
    const float low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c < high ? c : high;
  }
};

/// The sums of groups of columns over all threads that have parts of them.
template <class T, int kThreads>
struct ColumnSums {
  static constexpr int kCount = kGroup<T>;

  struct Memory {
    float sum[kCount][kThreads];
  };

  /// In the threads that are the first of their columns: of `count` threads, of which number s is thread_of(s). All
  /// threads must come; what was in the memory before must have been read.
  template <class ThreadOf>
  static __device__ __forceinline__ void merge(Memory& memory, float (&sum)[kCount], bool first, int count,
                                               ThreadOf thread_of) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) ptx::shared_store(&memory.sum[j][threadIdx.x], sum[j]);
    __syncthreads();
    if (!first) return;
    for (int s = 1; s < count; ++s) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] += ptx::shared_load<float>(&memory.sum[j][thread_of(s)]);
    }
  }

  /// Where every kAcross-th thread has the same columns: in the first kAcross.
  template <int kAcross>
  static __device__ __forceinline__ void merge_every(Memory& memory, float (&sum)[kCount]) {
    const int thread = static_cast<int>(threadIdx.x);
    merge(memory, sum, thread < kAcross, kThreads / kAcross, [&](int s) { return thread + s * kAcross; });
  }
};

}  // namespace fused_res::cuda
