// Products over the pixels: left^T right, block after block while both are in the cache.
#pragma once

#include "matrix_kernel.h"
#include "operand_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// sums += the columns' sums of n rows.
template <class V, class A>
inline void add_rows(const A* rows, int64_t row, int64_t n, int64_t channels, A* sums) {
  for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
    V sum = V::set(0);
    for (int64_t p = 0; p < n; ++p) sum = sum + load<V>(rows + p * row + c, lanes);
    store(sums + c, load<V>(sums + c, lanes) + sum, lanes);
  });
}

template <class T>
void reduction(const Reduction& a, int64_t begin, int64_t end, void* memory) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const Tiling& tiling = a.tiling;
  const int64_t width = (a.right.channels + kPanel - 1) / kPanel * kPanel;
  Scratch scratch(memory);
  A* left = scratch.take<A>(tiling.block, a.stretch);
  A* right = scratch.take<A>(tiling.block, a.right.channels);
  const int64_t left_row = scratch_row<A>(a.stretch), right_row = scratch_row<A>(a.right.channels);
  const int64_t across = a.right.channels, panels = whole_panels<V>(across);
  A* through = a.through == nullptr || panels == across ? nullptr : scratch.take<A>(tiling.block, across);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task / tiling.stretches, from = task % tiling.stretches * a.stretch;
    const int64_t first = tile * tiling.rows, rows = min(tiling.rows, tiling.pixels - first);
    const int64_t channels = min(a.stretch, tiling.channels - from);
    A* products = static_cast<A*>(a.products) + (tile * tiling.channels + from) * width;
    A* sums = a.sums == nullptr ? nullptr : static_cast<A*>(a.sums) + tile * tiling.channels + from;
    std::memset(products, 0, channels * width * sizeof(A));
    if (sums != nullptr) std::memset(sums, 0, channels * sizeof(A));
    for (int64_t seen = 0; seen < rows; seen += tiling.block) {
      const int64_t at = first + seen, n = min(tiling.block, rows - seen);
      read_rows<T>(a.left, at, n, from, channels, left, left_row);
      read_rows<T>(a.right, at, n, 0, across, right, right_row);
      Ahead ahead;
      const int64_t more = min(tiling.block, tiling.pixels - at - n);
      want_rows<T>(ahead, a.left, at + n, more);
      want_rows<T>(ahead, a.right, at + n, more);
      ahead.spread(product_steps<V>(channels, n, a.right.channels));
      add_transposed_product<V>(n, channels, panels, left, left_row, right, right_row, products, width, false, ahead);
      if (sums != nullptr) add_rows<V>(left, left_row, n, channels, sums);
      if (a.through == nullptr) continue;
      A* to = static_cast<A*>(a.through) + at * across;
      multiply<V>(n, channels, panels, left, left_row, static_cast<const A*>(a.packed),
                  through == nullptr ? to : through, through == nullptr ? across : right_row, false, ahead);
      for (int64_t p = 0; through != nullptr && p < n; ++p) {
        std::memcpy(to + p * across, through + p * right_row, across * sizeof(A));
      }
    }
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
