// The end of a block: a block of the last product, and of the projection's if there is one, then bn_act over it.
#pragma once

#include "product_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

template <class T>
void pointwise_tail(const PointwiseTail& a, int64_t begin, int64_t end, void* memory) {
  using A = typename Arithmetic<T>::type;
  const Tiling& tiling = a.tiling;
  const int64_t channels = tiling.channels, bytes = (channels + 7) / 8, row = scratch_row<A>(kStretch);
  Scratch scratch(memory);
  A *y = scratch.take<A>(tiling.rows, kStretch), *y2 = scratch.take<A>(tiling.rows, kStretch);
  Multiplier<T> main(a.main, tiling.rows, scratch), projection(a.projection, tiling.rows, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task / tiling.stretches * tiling.rows, n = min(tiling.rows, tiling.pixels - first);
    const int64_t from = task % tiling.stretches * kStretch, columns = min(kStretch, channels - from);
    Ahead ahead;
    if (from == 0) {
      const int64_t bytes = n * channels * static_cast<int64_t>(sizeof(T));
      const T* other = static_cast<const T*>(a.skip != nullptr ? a.skip : a.y2);
      if (other != nullptr) ahead.want(other + first * channels, bytes);
      if (!a.stream) ahead.want(static_cast<const T*>(a.out) + first * channels, bytes);
      const int64_t next = first + n, more = min(tiling.rows, tiling.pixels - next);
      want_rows<T>(ahead, a.main.left, next, more);
      if (projection) want_rows<T>(ahead, a.projection.left, next, more);
      ahead.spread(product_steps<typename Arithmetic<T>::Vec>(n, a.main.left.channels, columns));
    }
    main.run(first, n, from, columns, y, row, false, ahead);
    if (projection) projection.run(first, n, from, columns, y2, row, false, ahead);
    const A *scale = static_cast<const A*>(a.vectors) + kScale * channels + from, *shift = scale + channels;
    const A* scale2 = a.vectors2 == nullptr ? nullptr : static_cast<const A*>(a.vectors2) + kScale * channels + from;
    const A* shift2 = scale2 == nullptr ? nullptr : scale2 + channels;
    Row<T> results(static_cast<T*>(a.out) + from, columns, a.stream, channels);
    for (int64_t p = 0; p < n; ++p) {
      const int64_t at = (first + p) * channels + from;
      T* out = results.begin(first + p);
      uint8_t* signs = a.signs == nullptr ? nullptr : a.signs + (first + p) * bytes + from / 8;
      const A* value = y + p * row;
      if (!a.relu) {
        const T* skip = a.skip == nullptr ? nullptr : static_cast<const T*>(a.skip) + at;
        const auto plain =
            skip == nullptr ? bn_act_row<T, kNone, false, A, T, A> : bn_act_row<T, kSkip, false, A, T, A>;
        plain(columns, value, scale, shift, skip, scale2, shift2, out, signs);
      } else if (projection) {
        bn_act_row<T, kSecond>(columns, value, scale, shift, y2 + p * row, scale2, shift2, out, signs);
      } else if (a.skip != nullptr) {
        bn_act_row<T, kSkip>(columns, value, scale, shift, static_cast<const T*>(a.skip) + at, scale2, shift2, out,
                             signs);
      } else if (a.y2 != nullptr) {
        bn_act_row<T, kSecond>(columns, value, scale, shift, static_cast<const T*>(a.y2) + at, scale2, shift2, out,
                               signs);
      } else {
        bn_act_row<T, kNone>(columns, value, scale, shift, value, scale2, shift2, out, signs);
      }
      results.end(first + p);
    }
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
