// Products over the pixels on the CPU: left^T right, by tiles that are merged in double.
#pragma once

#include "products.h"

namespace fused_res::cpu {

// The products and sums of every tile.
struct Partials {
  Tiling tiling;
  int64_t width;  // elements of a row of products
  bool doubles;
  const void *products, *sums;

  // Row c of the products of all tiles together.
  void products_row(int64_t c, int64_t columns, double* to) const {
    std::fill(to, to + columns, 0.0);
    for (int64_t t = 0; t < tiling.tiles; ++t) {
      const int64_t at = (t * tiling.channels + c) * width;
      if (doubles) {
        add(static_cast<const double*>(products) + at, columns, to);
      } else {
        add(static_cast<const float*>(products) + at, columns, to);
      }
    }
  }

  // The sums of all tiles together.
  void all_sums(double* to) const {
    std::fill(to, to + tiling.channels, 0.0);
    for (int64_t t = 0; t < tiling.tiles; ++t) {
      const int64_t at = t * tiling.channels;
      if (doubles) {
        add(static_cast<const double*>(sums) + at, tiling.channels, to);
      } else {
        add(static_cast<const float*>(sums) + at, tiling.channels, to);
      }
    }
  }

 private:
  template <class A>
  static void add(const A* from, int64_t n, double* to) {
    for (int64_t i = 0; i < n; ++i) to[i] += static_cast<double>(from[i]);
  }
};

// Runs the reduction of `left` and `right`, of `like`'s dtype. `sums`: also the sums of left. With `matrix`, packed,
// and where the channels of left need not be cut: also through = left * matrix, otherwise `through` stays empty.
inline Partials reduce(const Operand& left, const Operand& right, int64_t pixels, bool sums, const Tensor& like,
                       const OptionalTensor& matrix, OptionalTensor& through) {
  Reduction arguments{};
  const int64_t item = arithmetic_size(like), width = whole_panels(right.channels);
  const int64_t most = std::max(kPanel, kProductBytes / (width * item) / kPanel * kPanel);
  arguments.stretch = std::min(left.channels, most);
  const int64_t stretches = divide_up(left.channels, arguments.stretch), bytes = left.channels * width * item;
  const int64_t block = block_rows(pixels, kBlockRows);
  arguments.tiling = reduction_tiling(pixels, left.channels, block, stretches, bytes);
  arguments.left = left;
  arguments.right = right;
  const int64_t products = arguments.tiling.tiles * left.channels * width;
  char* memory = static_cast<char*>(partial_memory.get((products + arguments.tiling.tiles * left.channels) * item));
  arguments.products = memory;
  arguments.sums = sums ? memory + products * item : nullptr;
  int64_t elements = block_elements(block, arguments.stretch) + block_elements(block, right.channels);
  if (matrix && stretches == 1) {
    through = fresh_statistics(like, {pixels, right.channels});
    arguments.packed = data(matrix);
    arguments.through = output(through);
    elements += block_elements(block, right.channels);
  }
  run_products(kernels().reduction[dtype_of(like)], arguments, arguments.tiling.tiles * stretches, elements * item);
  return {arguments.tiling, width, item == 8, arguments.products, arguments.sums};
}

// Runs f(c) over the rows of the products.
template <class F>
void for_products(const Partials& partials, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (partials.width * partials.tiling.tiles));
  torch::stable::parallel_for(0, partials.tiling.channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c);
  });
}

}  // namespace fused_res::cpu
