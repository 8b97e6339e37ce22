// image = relu(image), row by row; NaN stays NaN.
#pragma once

#include "simd.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// In 16 bits by whole numbers: those of the numbers below 0 are less than or equal to that of minus infinity, and those
// of every NaN with that sign are more.
template <class T>
inline void relu_elements(T* at, int64_t count, int16_t minus_infinity) {
  auto* const bits = reinterpret_cast<int16_t*>(at);
  for (int64_t i = 0; i < count; ++i) bits[i] = bits[i] > minus_infinity ? bits[i] : int16_t{0};
}

inline void relu_elements(half* at, int64_t count) { relu_elements(at, count, -1024); }
inline void relu_elements(bfloat16* at, int64_t count) { relu_elements(at, count, -128); }

template <class T>
inline void relu_elements(T* at, int64_t count) {
  using V = typename Arithmetic<T>::Vec;
  for_channels<V::width>(count, [&](int64_t i, auto lanes) { store(at + i, load<V>(at + i, lanes).relu(), lanes); });
}

template <class T>
void relu(const Relu& a, int64_t begin, int64_t end) {
  relu_elements(static_cast<T*>(a.image) + begin * a.channels, (end - begin) * a.channels);
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
