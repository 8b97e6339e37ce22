// pointwise_tail on the CPU, and the same without signs as a convolution in evaluation.
#include "../convolution_checks.h"
#include "../moment_checks.h"
#include "products.h"

namespace fused_res::cpu {
namespace {

std::tuple<Tensor, OptionalTensor> pointwise_tail(const Tensor& z, const OptionalTensor& z_vectors, int64_t down,
                                                  int64_t right, const Tensor& weight, const Tensor& vectors,
                                                  const OptionalTensor& skip, const OptionalTensor& y2,
                                                  const OptionalTensor& x, const OptionalTensor& x_vectors,
                                                  int64_t x_down, int64_t x_right, const OptionalTensor& weight2,
                                                  const OptionalTensor& vectors2, bool keep_signs) {
  check_pointwise_tail(z, z_vectors, down, right, weight, vectors, skip, y2, x, x_vectors, x_down, x_right, weight2,
                       vectors2);
  const int64_t pixels = sampled(z, down, right), channels = weight.size(0);
  const Tensor out = new_tensor(z, {pixels, channels});
  OptionalTensor signs;
  if (keep_signs) signs = new_tensor(z, {pixels, sign_bytes(channels)}, ScalarType::Byte);
  const Tensor matrix = packed(weight, true);
  PointwiseTail arguments{};
  arguments.tiling = product_tiling(pixels, channels);
  arguments.main = {activation(z, z_vectors, down, right), data(matrix)};
  arguments.vectors = data(vectors);
  arguments.skip = data(skip);
  arguments.y2 = data(y2);
  arguments.vectors2 = data(vectors2);
  arguments.out = output(out);
  arguments.signs = static_cast<uint8_t*>(output(signs));
  arguments.stream = streams(out, {output(out)});
  const int64_t rows = arguments.tiling.rows;
  int64_t elements = 2 * block_elements(rows, kStretch) + block_elements(rows, z.size(3));
  OptionalTensor matrix2;
  if (x) {
    matrix2 = packed(*weight2, true);
    arguments.projection = {activation(*x, x_vectors, x_down, x_right), data(matrix2)};
    elements += block_elements(rows, x->size(3));
  }
  run_products(kernels().pointwise_tail[dtype_of(z)], arguments, arguments.tiling.tiles * arguments.tiling.stretches,
               elements * arithmetic_size(z));
  return {out, signs};
}

// The weight [K, C] in panels, to be kept.
Tensor pointwise_prepare(const Tensor& weight) {
  check_prepared_matrix(weight);
  return packed(weight, true);
}

}  // namespace

// relu(scale * y + shift [+ skip]), or that without the ReLU, rows [P, K], on panels that were prepared.
Tensor pointwise_bn_act(const Tensor& x, const Tensor& panels, int64_t channels, int64_t down, int64_t right,
                        const Tensor& vectors, const OptionalTensor& skip, bool relu) {
  check_pointwise_bn_act(x, channels, down, right, vectors, skip);
  check("panels", panels, {whole_panels(channels) * x.size(3)}, statistics_dtype(x.scalar_type()), x);
  const int64_t height = divide_up(x.size(1), down), width = divide_up(x.size(2), right);
  const int64_t pixels = x.size(0) * height * width;
  const Tensor out = torch::stable::new_empty(x, {pixels, channels});
  PointwiseTail arguments{};
  arguments.tiling = product_tiling(pixels, channels);
  arguments.main = {activation(x, {}, down, right), data(panels)};
  arguments.vectors = data(vectors);
  arguments.skip = data(skip);
  arguments.out = output(out);
  arguments.stream = streams(out, {output(out)});
  arguments.relu = relu;
  const int64_t rows = arguments.tiling.rows;
  const int64_t elements = 2 * block_elements(rows, kStretch) + block_elements(rows, x.size(3));
  run_products(kernels().pointwise_tail[dtype_of(x)], arguments, arguments.tiling.tiles * arguments.tiling.stretches,
               elements * arithmetic_size(x));
  return out;
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "pointwise_tail", TORCH_BOX(&pointwise_tail));
  implement(m, "pointwise_prepare", TORCH_BOX(&pointwise_prepare));
  implement(m, "pointwise_bn_act", TORCH_BOX(&pointwise_bn_act));
}

}  // namespace
}  // namespace fused_res::cpu
