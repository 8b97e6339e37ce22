// Backward of bn_act: the reduction over tiles, and the affine map that follows it.
#pragma once

#include "bn_act_kernel.h"
#include "bn_stats_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// dout where the ReLU was open: by its saved signs, or by the sign of scale * y + shift.
template <class T, class V = typename Arithmetic<T>::Vec, class A, class Lanes>
inline V masked(V dout, V y, const uint8_t* signs, const A* scale, const A* shift, int64_t c, Lanes lanes) {
  return dout.keep(signs != nullptr ? load_bits<V::width>(signs + c / 8, lanes)
                                    : affine<T>(y, scale, shift, c, lanes).open());
}

template <class T, bool second>
void reduce_tasks(const BnActBackwardReduce& a, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  constexpr int64_t sums = second ? 3 : 2;
  const Tiling& tiling = a.tiling;
  const int64_t stride = tiling.channels, bytes = (stride + 7) / 8;
  // What each block adds up to is added to its tile's: short sums lose fewer digits.
  alignas(64) A total[sums][kStretch], block[sums][kStretch];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task / tiling.stretches, from = task % tiling.stretches * kStretch;
    const int64_t first = tile * tiling.rows, rows = min(tiling.rows, tiling.pixels - first);
    const int64_t channels = min(kStretch, stride - from);
    const A* vectors = static_cast<const A*>(a.vectors) + from;
    const A *mean = vectors, *scale = vectors + 3 * stride, *shift = vectors + 4 * stride;
    const A* mean2 = second ? static_cast<const A*>(a.vectors2) + from : nullptr;
    std::memset(total, 0, sizeof total);
    for (int64_t seen = 0; seen < rows; seen += tiling.block) {
      const int64_t more = min(tiling.block, rows - seen);
      const int64_t at = (first + seen) * stride + from;
      const T *dout = static_cast<const T*>(a.dout) + at, *y = static_cast<const T*>(a.y) + at;
      const T* y2 = second ? static_cast<const T*>(a.y2) + at : nullptr;
      const uint8_t* signs = a.signs == nullptr ? nullptr : a.signs + (first + seen) * bytes + from / 8;
      std::memset(block, 0, sizeof block);
      const auto add = [&](int64_t p, int64_t c, auto lanes, V& g, V& gy, V& gy2) {
        const int64_t i = p * stride + c;
        const V value = load<V>(y + i, lanes);
        const V kept = masked<T>(load<V>(dout + i, lanes), value, signs == nullptr ? nullptr : signs + p * bytes, scale,
                                 shift, c, lanes);
        g = g + kept;
        gy = fma(kept, value - load<V>(mean + c, lanes), gy);
        if (second) gy2 = fma(kept, load<V>(y2 + i, lanes) - load<V>(mean2 + c, lanes), gy2);
      };
      const auto add_group = [&](int64_t p, int64_t n) {
        for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
          V g = V::load(block[0] + c), gy = V::load(block[1] + c),
            gy2 = second ? V::load(block[sums - 1] + c) : V::set(0);
          for (int64_t q = p; q < p + n; ++q) add(q, c, lanes, g, gy, gy2);
          g.store(block[0] + c);
          gy.store(block[1] + c);
          if (second) gy2.store(block[sums - 1] + c);
        });
      };
      int64_t p = 0;
      for (; p + 4 <= more; p += 4) add_group(p, 4);
      if (p < more) add_group(p, more - p);
      for (int64_t s = 0; s < sums; ++s) {
        for (int64_t c = 0; c < channels; ++c) total[s][c] += block[s][c];
      }
    }
    A* partials = static_cast<A*>(a.partials) + tile * sums * stride + from;
    for (int64_t s = 0; s < sums; ++s) std::memcpy(partials + s * stride, total[s], channels * sizeof(A));
  }
}

template <class T>
void bn_act_backward_reduce(const BnActBackwardReduce& a, int64_t begin, int64_t end) {
  (a.y2 != nullptr ? reduce_tasks<T, true> : reduce_tasks<T, false>)(a, begin, end);
}

// p * g [+ q * y + r]
template <class T, class V = typename Arithmetic<T>::Vec, class A, class Lanes>
inline V gradient(V g, const T* y, const A* coefficients, int64_t channels, bool training, int64_t c, Lanes lanes) {
  V d = g * load<V>(coefficients + c, lanes);
  if (training) {
    const A *q = coefficients + kQ * channels, *r = coefficients + kR * channels;
    d = d + affine<T>(load<V>(y + c, lanes), q, r, c, lanes);
  }
  return d;
}

template <class T, bool outer>
void apply_rows(const BnActBackwardApply& a, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const int64_t channels = a.channels, bytes = (channels + 7) / 8;
  const A *scale = static_cast<const A*>(a.vectors) + kScale * channels, *shift = scale + channels;
  const A* coefficients = static_cast<const A*>(a.coefficients);
  const A* coefficients2 = static_cast<const A*>(a.coefficients2);
  const bool training = a.training, training2 = a.training2;
  Row<T> dys(a.dy, channels, a.stream), dy2s(a.dy2, channels, a.stream), kepts(a.masked, channels, a.stream);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = p * channels;
    const T *dout = static_cast<const T*>(a.dout) + row, *y = static_cast<const T*>(a.y) + row;
    const T* y2 = a.y2 == nullptr ? nullptr : static_cast<const T*>(a.y2) + row;
    T *dy = dys.begin(p), *dy2 = dy2s ? dy2s.begin(p) : nullptr, *kept = kepts ? kepts.begin(p) : nullptr;
    const uint8_t* signs = outer ? a.signs + p * bytes : nullptr;
    for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
      const V incoming = load<V>(dout + c, lanes);
      const V g = masked<T>(incoming, outer ? incoming : load<V>(y + c, lanes), signs, scale, shift, c, lanes);
      if (kept != nullptr) store(kept + c, g, lanes);
      store(dy + c, gradient(g, y, coefficients, channels, training, c, lanes), lanes);
      if (y2 != nullptr) store(dy2 + c, gradient(g, y2, coefficients2, channels, training2, c, lanes), lanes);
    });
    dys.end(p);
    dy2s.end(p);
    kepts.end(p);
  }
}

template <class T>
void bn_act_backward_apply(const BnActBackwardApply& a, int64_t begin, int64_t end) {
  (a.signs != nullptr ? apply_rows<T, true> : apply_rows<T, false>)(a, begin, end);
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
