// The convolutions whose kernel is 1x1, on the CPU: products of matrices.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "../convolution_checks.h"
#include "reduction.h"

namespace fused_res::cpu {
namespace {

// y, and where asked for its partial statistics and the rows of their tiles.
std::tuple<Tensor, OptionalTensor, int64_t> fprop(const Tensor& x, const OptionalTensor& x_vectors, int64_t down,
                                                  int64_t right, const Tensor& weight, bool statistics) {
  check_pointwise_fprop(x, x_vectors, down, right, weight, statistics);
  const int64_t pixels = sampled(x, down, right), channels = weight.size(0);
  const Tensor y = new_tensor(x, {pixels, channels}), matrix = packed(weight, true);
  Product arguments{};
  arguments.tiling = product_tiling(pixels, channels);
  arguments.first = {activation(x, x_vectors, down, right), data(matrix)};
  arguments.out = output(y);
  const int64_t rows = arguments.tiling.rows;
  OptionalTensor partials;
  if (statistics) {
    partials = fresh_statistics(x, {arguments.tiling.tiles, 2, channels});
    arguments.statistics = {arguments.tiling, data(y), output(partials)};
  }
  run_products(kernels().product[dtype_of(x)], arguments, arguments.tiling.tiles * arguments.tiling.stretches,
               (block_elements(rows, kStretch) + block_elements(rows, x.size(3))) * arithmetic_size(x));
  return {y, partials, rows};
}

// dx, images [N, H, W, C], and where asked for the partial sums of the BN below.
std::tuple<Tensor, OptionalTensor> dgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
                                         const OptionalTensor& coefficients, const OptionalTensor& signs, bool training,
                                         const Tensor& weight, const OptionalTensor& inner,
                                         const OptionalTensor& inner_vectors, const OptionalTensor& addend,
                                         const OptionalTensor& addend_signs, int64_t down, int64_t right) {
  check_pointwise_dgrad(dy, y, vectors, coefficients, signs, weight, inner, inner_vectors, addend);
  const int64_t n = dy.size(0), h = dy.size(1), w = dy.size(2), channels = weight.size(1), pixels = n * h * w;
  const Tensor dx = new_tensor(dy, {n, h, w, channels}), matrix = packed(weight, false);
  Product arguments{};
  arguments.tiling = product_tiling(pixels, channels);
  arguments.first = {gradient(dy, y, vectors, coefficients, signs, training), data(matrix)};
  arguments.out = output(dx);
  if (addend) {
    check_addend(dx, *addend, addend_signs, down, right);
    arguments.addend = data(addend);
    arguments.addend_signs = static_cast<const uint8_t*>(data(addend_signs));
    arguments.addend_sampling = sampling_of(dx, down, right);
    arguments.stream = streams(dx, {output(dx)});
  }
  OptionalTensor partials;
  if (inner) {
    partials = fresh_statistics(dx, {arguments.tiling.tiles, 2, channels});
    arguments.sums = {arguments.tiling, data(dx), data(inner), data(inner_vectors),
                      nullptr,          nullptr,  nullptr,     output(partials)};
  }
  const int64_t rows = arguments.tiling.rows;
  run_products(kernels().product[dtype_of(dy)], arguments, arguments.tiling.tiles * arguments.tiling.stretches,
               (block_elements(rows, kStretch) + block_elements(rows, dy.size(3))) * arithmetic_size(dy));
  return {dx, partials};
}

template <class To>
void merge(const Partials& partials, int64_t columns, void* to) {
  for_products(partials, [&](int64_t c) {
    std::vector<double> row(columns);
    partials.products_row(c, columns, row.data());
    for (int64_t k = 0; k < columns; ++k) {
      if constexpr (std::is_same_v<To, double>) {
        static_cast<To*>(to)[c * columns + k] = row[k];
      } else {
        static_cast<To*>(to)[c * columns + k] = static_cast<To>(static_cast<float>(row[k]));
      }
    }
  });
}

Tensor wgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
             const OptionalTensor& coefficients, const OptionalTensor& signs, bool training, const Tensor& x,
             const OptionalTensor& x_vectors, int64_t down, int64_t right) {
  check_pointwise_wgrad(dy, y, vectors, coefficients, signs, x, x_vectors, down, right);
  const int64_t pixels = dy.size(0) * dy.size(1) * dy.size(2), channels = x.size(3);
  const Tensor dweight = new_tensor(dy, {dy.size(3), channels});
  OptionalTensor through;
  const Partials partials = reduce(gradient(dy, y, vectors, coefficients, signs, training),
                                   activation(x, x_vectors, down, right), pixels, false, dy, {}, through);
  switch (dtype_of(dy)) {
    case kHalf:
      merge<torch::headeronly::Half>(partials, channels, output(dweight));
      break;
    case kBFloat16:
      merge<torch::headeronly::BFloat16>(partials, channels, output(dweight));
      break;
    case kDouble:
      merge<double>(partials, channels, output(dweight));
      break;
    default:
      merge<float>(partials, channels, output(dweight));
  }
  return dweight;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "pointwise_fprop", TORCH_BOX(&fprop));
  implement(m, "pointwise_dgrad", TORCH_BOX(&dgrad));
  implement(m, "pointwise_wgrad", TORCH_BOX(&wgrad));
}

}  // namespace
}  // namespace fused_res::cpu
