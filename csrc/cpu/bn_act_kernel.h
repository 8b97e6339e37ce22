// out = relu(scale * y + shift [+ skip] [+ scale2 * y2 + shift2]) and its signs, row by row.
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

template <class T, Shortcut shortcut>
void bn_act_rows(const BnAct& a, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const int64_t channels = a.channels, bytes = (channels + 7) / 8;
  const A *scale = static_cast<const A*>(a.vectors) + 3 * channels, *shift = scale + channels;
  const A *scale2 = nullptr, *shift2 = nullptr;
  if (shortcut == kSecond) {
    scale2 = static_cast<const A*>(a.vectors2) + 3 * channels;
    shift2 = scale2 + channels;
  }
  Row<T> results(a.out, channels, a.stream);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = p * channels;
    const T* y = static_cast<const T*>(a.y) + row;
    T* out = results.begin(p);
    uint8_t* signs = a.signs == nullptr ? nullptr : a.signs + p * bytes;
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      V v = affine<T>(load<V>(y + c, lanes), scale, shift, c, lanes);
      if (shortcut == kSkip) v = v + load<V>(static_cast<const T*>(a.skip) + row + c, lanes);
      if (shortcut == kSecond) {
        v = v + affine<T>(load<V>(static_cast<const T*>(a.y2) + row + c, lanes), scale2, shift2, c, lanes);
      }
      const V rounded = store(out + c, v.relu(), lanes);
      if (signs != nullptr) store_bits<V::width>(signs + c / 8, rounded.open(), lanes);
    });
    results.end(p);
  }
}

template <class T>
void bn_act(const BnAct& a, int64_t begin, int64_t end) {
  const auto run = a.skip != nullptr ? bn_act_rows<T, kSkip>
                   : a.y2 != nullptr ? bn_act_rows<T, kSecond>
                                     : bn_act_rows<T, kNone>;
  run(a, begin, end);
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
