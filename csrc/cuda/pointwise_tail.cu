// pointwise_tail on a GPU.
#include "moment_checks.h"
#include "operands.cuh"
#include "pointwise_ops.cuh"

namespace fused_res::cuda {
namespace {

std::tuple<Tensor, OptionalTensor> pointwise_tail_op(const Tensor& z, const OptionalTensor& z_vectors,
                                                     std::int64_t down, std::int64_t right, const Tensor& weight,
                                                     const Tensor& vectors, const OptionalTensor& skip,
                                                     const OptionalTensor& y2, const OptionalTensor& x,
                                                     const OptionalTensor& x_vectors, std::int64_t x_down,
                                                     std::int64_t x_right, const OptionalTensor& weight2,
                                                     const OptionalTensor& vectors2, bool keep_signs) {
  check_pointwise_tail(z, z_vectors, down, right, weight, vectors, skip, y2, x, x_vectors, x_down, x_right, weight2,
                       vectors2);
  const Number number = number_of("z", z);
  PointwiseTail a{};
  a.main = {activation("z", z, z_vectors, down, right), data(weight), floats(vectors)};
  const std::int64_t pixels = a.main.z.pixels;
  a.channels = product_channels("weight", weight, pixels);
  if (x) {
    a.projection = {activation("x", *x, x_vectors, x_down, x_right), data(*weight2), floats(vectors2)};
  } else {
    a.other = skip ? data(skip) : data(y2);
    a.vectors2 = floats(vectors2);
  }
  const OnDevice device(z);
  check_multiplies(z);
  const Tensor out = new_tensor(z, {pixels, a.channels});
  OptionalTensor signs;
  if (keep_signs) signs = new_tensor(z, {pixels, sign_bytes(a.channels)}, ScalarType::Byte);
  a.out = output(out);
  a.signs = static_cast<std::uint8_t*>(output(signs));
  const Tile tile = tail_tile(a, device.queue());
  with_number(number, [&](auto type) { pointwise_tail<typename decltype(type)::type>(a, tile, device.queue()); });
  return {out, signs};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("pointwise_tail", TORCH_BOX(&pointwise_tail_op)); }

}  // namespace
}  // namespace fused_res::cuda
