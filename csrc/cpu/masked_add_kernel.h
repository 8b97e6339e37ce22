// out = values + where(open, addend, 0), row by row.
#pragma once

#include "operand_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// values may be `out`, or in the dtype of the arithmetic.
template <class T, class Values>
inline void masked_add_row(int64_t channels, const Values* values, const T* addend, const uint8_t* signs, T* out) {
  using V = typename Arithmetic<T>::Vec;
  for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
    V more = load<V>(addend + c, lanes);
    if (signs != nullptr) more = more.keep(load_bits<V::width>(signs + c / 8, lanes));
    store(out + c, load<V>(values + c, lanes) + more, lanes);
  });
}

// Rows of the addend.
template <class T>
void masked_add(const MaskedAdd& a, int64_t begin, int64_t end) {
  const int64_t channels = a.channels, bytes = (channels + 7) / 8;
  const T* addend = static_cast<const T*>(a.addend);
  for (int64_t p = begin; p < end; ++p) {
    T* out = static_cast<T*>(a.out) + source_row(a.sampling, p) * channels;
    masked_add_row(channels, out, addend + p * channels, a.signs == nullptr ? nullptr : a.signs + p * bytes, out);
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
