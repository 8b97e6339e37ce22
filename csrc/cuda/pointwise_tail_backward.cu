// The passes of pointwise_tail_backward on a GPU. Their kernels are compiled one format a file:
// pointwise_tail_backward_<format>.cu.
#include "moment_checks.h"
#include "pointwise_ops.cuh"
#include "pointwise_tail_backward_apply.cuh"
#include "pointwise_tail_backward_reduce.cuh"

namespace fused_res::cuda {

#define FUSED_RES_DECLARE(T)                                                                                \
  extern template void pointwise_tail_backward_reduce<T>(const TailReduce&, const TailSums&, const Queue&); \
  extern template void pointwise_tail_backward_apply<T>(const TailApply&, const Queue&);
FUSED_RES_DECLARE(float)
FUSED_RES_DECLARE(Half)
FUSED_RES_DECLARE(BFloat16)
#undef FUSED_RES_DECLARE

namespace {

Incoming incoming(const Tensor& dout, const Tensor& signs) {
  return {data(dout), bytes(signs), product_columns("dout", dout.size(1))};
}

float* floats_of(const OptionalTensor& tensor) { return static_cast<float*>(output(tensor)); }
double* doubles_of(const Tensor& tensor) { return static_cast<double*>(output(tensor)); }

std::tuple<Tensor, Tensor, OptionalTensor> reduce_op(const Tensor& dout, const Tensor& signs, const Tensor& z,
                                                     const OptionalTensor& z_vectors, std::int64_t down,
                                                     std::int64_t right, const OptionalTensor& mean,
                                                     const OptionalTensor& scaled) {
  check_pointwise_tail_backward_reduce(dout, signs, z, z_vectors, down, right, mean, scaled);
  const Number number = number_of("z", z);
  const Activation operand = activation("z", z, z_vectors, down, right);
  const std::int64_t channels = dout.size(1), inner = operand.channels;
  STD_TORCH_CHECK(operand.pixels >= 1, "z: expected at least one row, got none");
  const Tiles tiles = tail_reduce_tiles(operand.pixels, channels, inner);
  const OnDevice device(z);
  check_multiplies(z);
  const OptionalTensor starts = new_tensor(z, {tiles.count, inner}, ScalarType::Float);
  const OptionalTensor totals = new_tensor(z, {tiles.count, 2, channels}, ScalarType::Float);
  const OptionalTensor products = new_tensor(z, {tiles.count, channels, inner}, ScalarType::Float);
  const Tensor total = new_tensor(z, {channels}, ScalarType::Double);
  const Tensor product = new_tensor(z, {channels, inner}, ScalarType::Double);
  OptionalTensor through;
  if (scaled && goes_through(channels, inner)) through = new_tensor(z, {operand.pixels, inner});
  const TailReduce a{incoming(dout, signs), operand,           data(scaled),        output(through),
                     floats_of(starts),     floats_of(totals), floats_of(products), tiles.rows};
  const TailSums sums{doubles(mean), doubles_of(total), doubles_of(product)};
  with_number(number, [&](auto type) {
    pointwise_tail_backward_reduce<typename decltype(type)::type>(a, sums, device.queue());
  });
  return {total, product, through};
}

OptionalTensor apply_op(const Tensor& dz, const OptionalTensor& through, const Tensor& dout, const Tensor& signs,
                        const Tensor& z, const OptionalTensor& z_vectors, std::int64_t down, std::int64_t right,
                        const Tensor& scaled, const OptionalTensor& mean, const OptionalTensor& quadratic,
                        const OptionalTensor& constant, bool inner, bool joins) {
  check_pointwise_tail_backward_apply(dz, std::nullopt, dout, signs, z, z_vectors, down, right, scaled, mean, quadratic,
                                      constant, inner, joins);
  const Number number = number_of("z", z);
  const Activation operand = activation("z", z, z_vectors, down, right);
  const std::int64_t most = std::numeric_limits<int>::max(), tiles = operand.pixels / kTailApplyRows + 1;
  STD_TORCH_CHECK(tiles <= most / (operand.channels / SmallTiling::kColumns + 1), "z: too many channels, ",
                  operand.channels, ", for ", operand.pixels, " pixels");
  const int channels = operand.channels;
  if (through) fused_res::check("through", *through, {operand.pixels, channels}, z.scalar_type(), z);
  const OnDevice device(z);
  check_multiplies(z);
  OptionalTensor partials;
  if (inner) {
    const std::int64_t rows = (operand.pixels + kTailApplyRows - 1) / kTailApplyRows;
    partials = new_tensor(z, {rows, 2, channels}, ScalarType::Float);
  }
  // Where dz is joined, g A is computed once more: what is known of it lies elsewhere.
  const TailApply a{incoming(dout, signs),
                    operand,
                    data(scaled),
                    doubles(mean),
                    data(quadratic),
                    floats(constant),
                    joins ? nullptr : data(through),
                    output(dz),
                    floats_of(partials),
                    joins};
  with_number(number,
              [&](auto type) { pointwise_tail_backward_apply<typename decltype(type)::type>(a, device.queue()); });
  return partials;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) {
  m.impl("pointwise_tail_backward_reduce", TORCH_BOX(&reduce_op));
  m.impl("pointwise_tail_backward_apply", TORCH_BOX(&apply_op));
}

}  // namespace
}  // namespace fused_res::cuda
