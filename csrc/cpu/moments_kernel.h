// Second moments of blocks of rows, each about its own mean.
#pragma once

#include "reduction_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// Rows whose products are added up by themselves. A ReLU leaves channels that are nearly always 0: their many equal,
// small squares, added to one large sum, would all be rounded the same way.
constexpr int64_t kChain = 32;

// Takes the mean, as far as A holds it, off every column; gives it, and the sum of what is left.
template <class V, class A>
inline void centre(A* rows, int64_t row, int64_t n, int64_t channels, double* centres, double* rests) {
  const V share = V::set(1 / static_cast<A>(n));
  for_channels<V::width>(channels, [&](int64_t c, auto lanes) {
    A lane[V::width];
    V sum = V::set(0), rest = V::set(0);
    for (int64_t p = 0; p < n; ++p) sum = sum + load<V>(rows + p * row + c, lanes);
    const V mean = sum * share;
    for (int64_t p = 0; p < n; ++p) {
      const V left = load<V>(rows + p * row + c, lanes) - mean;
      store(rows + p * row + c, left, lanes);
      rest = rest + left;
    }
    const int64_t count = min(V::width, channels - c);
    mean.store(lane);
    for (int64_t i = 0; i < count; ++i) centres[c + i] = static_cast<double>(lane[i]);
    rest.store(lane);
    for (int64_t i = 0; i < count; ++i) rests[c + i] = static_cast<double>(lane[i]);
  });
}

template <class T>
void moments(const MomentsReduction& a, int64_t begin, int64_t end, void* memory) {
  using V = typename Arithmetic<T>::Vec;
  using A = typename Arithmetic<T>::type;
  const Tiling& tiling = a.tiling;
  const int64_t channels = tiling.channels, row = scratch_row<A>(channels);
  const int64_t width = (channels + kPanel - 1) / kPanel * kPanel;
  A* z = Scratch(memory).take<A>(tiling.block, channels);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * tiling.rows, rows = min(tiling.rows, tiling.pixels - first);
    A* products = static_cast<A*>(a.products) + tile * channels * width;
    std::memset(products, 0, channels * width * sizeof(A));
    for (int64_t seen = 0; seen < rows; seen += tiling.block) {
      const int64_t at = first + seen, n = min(tiling.block, rows - seen), block = at / tiling.block;
      read_rows<T>(a.operand, at, n, 0, channels, z, row);
      centre<V>(z, row, n, channels, a.centres + block * channels, a.rests + block * channels);
      Ahead ahead;
      want_rows<T>(ahead, a.operand, at + n, min(tiling.block, tiling.pixels - at - n));
      ahead.spread(product_steps<V>(channels, n, channels) / 2);
      for (int64_t p = 0; p < n; p += kChain) {
        add_transposed_product<V>(min(kChain, n - p), channels, whole_panels<V>(channels), z + p * row, row,
                                  z + p * row, row, products, width, true, ahead);
      }
    }
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
