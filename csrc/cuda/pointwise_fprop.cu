// pointwise_fprop on a GPU.
#include "convolution_checks.h"
#include "operands.cuh"
#include "pointwise_ops.cuh"

namespace fused_res::cuda {
namespace {

std::tuple<Tensor, OptionalTensor, std::int64_t> pointwise_fprop_op(const Tensor& x, const OptionalTensor& x_vectors,
                                                                    std::int64_t down, std::int64_t right,
                                                                    const Tensor& weight, bool statistics) {
  check_pointwise_fprop(x, x_vectors, down, right, weight, statistics);
  const Number number = number_of("x", x);
  const Activation z = activation("x", x, x_vectors, down, right);
  const int channels = product_channels("weight", weight, z.pixels);
  const OnDevice device(x);
  check_multiplies(x);
  const Tensor y = new_tensor(x, {z.pixels, channels});
  OptionalTensor partials;
  if (statistics) {
    partials = new_tensor(x, {(z.pixels + kFpropRows - 1) / kFpropRows, 2, channels}, ScalarType::Float);
  }
  const PointwiseFprop a{z, data(weight), output(y), static_cast<float*>(output(partials)), channels};
  const Tile tile = default_tile<TallForwardTiling>(z.pixels, channels);
  with_number(number, [&](auto type) { pointwise_fprop<typename decltype(type)::type>(a, tile, device.queue()); });
  return {y, partials, kFpropRows};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("pointwise_fprop", TORCH_BOX(&pointwise_fprop_op)); }

}  // namespace
}  // namespace fused_res::cuda
