// moments on a GPU. Its kernels are compiled one format a file: moments_<format>.cu.
#include "moment_checks.h"
#include "moments.cuh"
#include "pointwise_ops.cuh"

namespace fused_res::cuda {

extern template void moments<float>(const MomentTiles&, const MomentsResult&, const Queue&);
extern template void moments<Half>(const MomentTiles&, const MomentsResult&, const Queue&);
extern template void moments<BFloat16>(const MomentTiles&, const MomentsResult&, const Queue&);

namespace {

std::tuple<Tensor, Tensor> moments_op(const Tensor& z, const OptionalTensor& z_vectors, std::int64_t down,
                                      std::int64_t right) {
  check_activation("z", z, "z_vectors", z_vectors, down, right);
  const Number number = number_of("z", z);
  const Activation operand = activation("z", z, z_vectors, down, right);
  const std::int64_t channels = operand.channels;
  STD_TORCH_CHECK(operand.pixels >= 1, "z: expected at least one row, got none");
  const Tiles tiles = moment_tiles(operand.pixels, channels);
  const OnDevice device(z);
  check_multiplies(z);
  const Tensor vectors = new_tensor(z, {tiles.count, 2, channels}, ScalarType::Float);
  const Tensor products = new_tensor(z, {tiles.count, channels, channels}, ScalarType::Float);
  const Tensor mean = new_tensor(z, {channels}, ScalarType::Double);
  const Tensor covariance = new_tensor(z, {channels, channels}, ScalarType::Double);
  const MomentTiles a{operand, static_cast<float*>(output(vectors)), static_cast<float*>(output(products)), tiles.rows};
  const MomentsResult result{static_cast<double*>(output(mean)), static_cast<double*>(output(covariance))};
  with_number(number, [&](auto type) { moments<typename decltype(type)::type>(a, result, device.queue()); });
  return {mean, covariance};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("moments", TORCH_BOX(&moments_op)); }

}  // namespace
}  // namespace fused_res::cuda
