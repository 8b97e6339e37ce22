// Maxima over windows, pixel by pixel; NaN where a window has one, as torch's max_pool2d.
#pragma once

#include "simd.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// The taps of a window that lie in the image.
struct Taps {
  int64_t begin, end, first;  // first: where tap 0 lies

  Taps(const PoolSteps& s, int64_t window) : begin(0), end(s.taps), first(window * s.stride - s.padding) {
    if (first < 0) begin = (-first + s.dilation - 1) / s.dilation;
    const int64_t inside = first < s.size ? (s.size - first - 1) / s.dilation + 1 : 0;
    if (inside < end) end = inside;
  }
};

template <class T>
void max_pool(const MaxPool& a, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Vec;
  const int64_t channels = a.channels, across = a.columns.windows, area = a.rows.windows * across;
  for (int64_t p = begin; p < end; ++p) {
    const Taps rows(a.rows, p % area / across), columns(a.columns, p % across);
    const T* image = static_cast<const T*>(a.image) + p / area * a.rows.size * a.columns.size * channels;
    T* out = static_cast<T*>(a.out) + p * channels;
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      V most = V::set(-__builtin_inff());
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const T* line = image + (rows.first + r * a.rows.dilation) * a.columns.size * channels + c;
        for (int64_t s = columns.begin; s < columns.end; ++s) {
          most = larger(most, load<V>(line + (columns.first + s * a.columns.dilation) * channels, lanes));
        }
      }
      store(out + c, most, lanes);
    });
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
