// Vectors of `width` lanes in the dtype of the arithmetic (float, or double for double), by the instruction set that
// this file is compiled for. Loads convert to that dtype and stores round to the tensor's, in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fused_res::cpu::FUSED_RES_VARIANT {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// How many lanes of a vector count: all of them, or the first n at the end of a row.
struct Full {};
struct Part {
  int n;
};

}  // namespace fused_res::cpu::FUSED_RES_VARIANT

#include "simd_plain.h"
#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#endif

namespace fused_res::cpu::FUSED_RES_VARIANT {

#if defined(__AVX512F__)
using FloatVec = Avx512Vec;
#elif defined(__AVX2__)
using FloatVec = Avx2Vec;
#else
using FloatVec = PlainVec<float, uint32_t>;
#endif

// The arithmetic of tensors of T: the type of their statistics, and vectors of it.
template <class T>
struct Arithmetic {
  using type = float;
  using Vec = FloatVec;
};
template <>
struct Arithmetic<double> {
  using type = double;
  using Vec = PlainVec<double, uint64_t>;
};

template <class V, class T>
inline V load(const T* p, Full) {
  return V::load(p);
}

template <class V, class T>
inline V load(const T* p, Part part) {
  return V::load_part(p, part.n);
}

// The stores give back what the memory now holds.
template <class V, class T>
inline V store(T* p, V v, Full) {
  return v.store(p);
}

template <class V, class T>
inline V store(T* p, V v, Part part) {
  return v.store_part(p, part.n);
}

// Sign bits of a vector: bit i stands for lane i.
template <int width>
inline uint32_t load_bits(const uint8_t* p, Full) {
  uint32_t bits = p[0];
  if (width > 8) bits |= static_cast<uint32_t>(p[1]) << 8;
  return bits;
}

template <int width>
inline uint32_t load_bits(const uint8_t* p, Part part) {
  uint32_t bits = p[0];
  if (part.n > 8) bits |= static_cast<uint32_t>(p[1]) << 8;
  return bits;
}

template <int width>
inline void store_bits(uint8_t* p, uint32_t bits, Full) {
  p[0] = static_cast<uint8_t>(bits);
  if (width > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}

template <int width>
inline void store_bits(uint8_t* p, uint32_t bits, Part part) {
  bits &= (1u << part.n) - 1;
  p[0] = static_cast<uint8_t>(bits);
  if (part.n > 8) p[1] = static_cast<uint8_t>(bits >> 8);
}

// Calls f(c, lanes) for the channels 0, width, 2 * width, ..., the last time perhaps with fewer lanes.
template <int width, class F>
inline void for_channels(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + width <= channels; c += width) f(c, Full{});
  if (c < channels) f(c, Part{static_cast<int>(channels - c)});
}

// Where a row of results is put together: in place, or, where results go past the caches, in a buffer from which whole
// cache lines are then written. That takes rows of whole, aligned lines, of at most kStreamedRow bytes.
template <class T>
class Row {
 public:
  Row(void* tensor, int64_t channels, bool stream) : Row(tensor, channels, stream, channels) {}

  // Only so many channels of rows that are further apart.
  Row(void* tensor, int64_t channels, bool stream, int64_t stride)
      : to_(static_cast<T*>(tensor)), channels_(channels), stride_(stride), stream_(stream) {}

  explicit operator bool() const { return to_ != nullptr; }

  T* begin(int64_t p) { return stream_ ? reinterpret_cast<T*>(lines_) : to_ + p * stride_; }

  void end(int64_t p) {
#if defined(__AVX2__)
    if (!stream_ || to_ == nullptr) return;
    __m256i* to = reinterpret_cast<__m256i*>(to_ + p * stride_);
    const __m256i* from = reinterpret_cast<const __m256i*>(lines_);
    for (const __m256i* last = from + channels_ * static_cast<int64_t>(sizeof(T)) / 32; from != last;
         from += 2, to += 2) {
      _mm256_stream_si256(to, from[0]);
      _mm256_stream_si256(to + 1, from[1]);
    }
#else
    if (stream_ && to_ != nullptr) std::memcpy(to_ + p * stride_, lines_, channels_ * sizeof(T));
#endif
  }

  // What was written past the caches becomes visible to the other threads.
  ~Row() {
#if defined(__AVX2__)
    if (stream_) _mm_sfence();
#endif
  }

 private:
  alignas(64) unsigned char lines_[kStreamedRow];
  T* to_;
  int64_t channels_, stride_;
  bool stream_;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
