// out = relu(scale * y + shift [+ skip] [+ scale2 * y2 + shift2]) and its signs, or that without the ReLU, row by row.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// scale * y + shift. Forward and backward call this, so that both take the same sign for every element.
template <class T, class V = typename Arithmetic<T>::Vec, class A, class Lanes>
inline V affine(V y, const A* scale, const A* shift, int64_t c, Lanes lanes) {
  return fma(y, load<V>(scale + c, lanes), load<V>(shift + c, lanes));
}

enum Shortcut { kNone, kSkip, kSecond };

// A row of some channels. y and the shortcut may be in T or in the dtype of the arithmetic. Without `activated` it ends
// in the sum.
template <class T, Shortcut shortcut, bool activated = true, class Y, class Other, class A>
inline void bn_act_row(int64_t channels, const Y* y, const A* scale, const A* shift, const Other* other,
                       const A* scale2, const A* shift2, T* out, uint8_t* signs) {
  using V = typename Arithmetic<T>::Vec;
  for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
    V v = affine<T>(load<V>(y + c, lanes), scale, shift, c, lanes);
    if (shortcut == kSkip) v = v + load<V>(other + c, lanes);
    if (shortcut == kSecond) v = v + affine<T>(load<V>(other + c, lanes), scale2, shift2, c, lanes);
    const V rounded = store(out + c, activated ? v.relu() : v, lanes);
    if (signs != nullptr) store_bits<V::width>(signs + c / 8, rounded.open(), lanes);
  });
}

template <class T, Shortcut shortcut, bool activated>
void bn_act_rows(const BnAct& a, int64_t begin, int64_t end) {
  using A = typename Arithmetic<T>::type;
  const int64_t channels = a.channels, bytes = (channels + 7) / 8;
  const A *scale = static_cast<const A*>(a.vectors) + kScale * channels, *shift = scale + channels;
  const A *scale2 = nullptr, *shift2 = nullptr;
  if (shortcut == kSecond) {
    scale2 = static_cast<const A*>(a.vectors2) + kScale * channels;
    shift2 = scale2 + channels;
  }
  const T *y = static_cast<const T*>(a.y), *other = static_cast<const T*>(shortcut == kSkip ? a.skip : a.y2);
  Row<T> results(a.out, channels, a.stream);
  for (int64_t p = begin; p < end; ++p) {
    bn_act_row<T, shortcut, activated>(channels, y + p * channels, scale, shift,
                                       shortcut == kNone ? nullptr : other + p * channels, scale2, shift2,
                                       results.begin(p), a.signs == nullptr ? nullptr : a.signs + p * bytes);
    results.end(p);
  }
}

template <class T, bool activated>
void bn_act_of(const BnAct& a, int64_t begin, int64_t end) {
  const auto run = a.skip != nullptr ? bn_act_rows<T, kSkip, activated>
                   : a.y2 != nullptr ? bn_act_rows<T, kSecond, activated>
                                     : bn_act_rows<T, kNone, activated>;
  run(a, begin, end);
}

template <class T>
void bn_act(const BnAct& a, int64_t begin, int64_t end) {
  (a.relu ? bn_act_of<T, true> : bn_act_of<T, false>)(a, begin, end);
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
