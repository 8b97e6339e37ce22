// Vectors of `width` lanes in the dtype of the arithmetic (float, or double for double), by the instruction set that
// this file is compiled for. Loads convert to that dtype and stores round to the tensor's, in registers.
#pragma once

#include <cstdint>
#include <cstring>

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
inline V store(T* p, V v, Full, bool stream) {
  return stream ? v.stream(p) : v.store(p);
}

template <class V, class T>
inline V store(T* p, V v, Part part, bool) {
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

// Results written past the caches become visible to the other threads.
inline void fence(bool stream) {
#if defined(__AVX2__)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
