// moments_finalize on a GPU, which decides itself which channels need the direct pass.
#include "moment_checks.h"
#include "moments_finalize.cuh"
#include "operands.cuh"

namespace fused_res::cuda {
namespace {

std::tuple<Tensor, Tensor> finalize_op(const Tensor& mean, const Tensor& covariance, const Tensor& z,
                                       const OptionalTensor& z_vectors, std::int64_t down, std::int64_t right,
                                       bool tf32, const Tensor& weight, const OptionalTensor& gamma,
                                       const OptionalTensor& beta, double eps, const OptionalTensor& residual_scale,
                                       double ratio) {
  check_moments_finalize(mean, covariance, weight, gamma, beta, residual_scale, std::nullopt);
  const Pixels pixels = pixels_of("z", z, "z_vectors", z_vectors, down, right, tf32);
  check_weight("weight", weight, z, 1);
  STD_TORCH_CHECK(pixels.count >= 1, "z: expected at least one pixel, got none");
  const int channels = fewer_channels("weight", weight.size(0)), depth = pixels.channels;
  const std::int64_t stretches = spread_stretches(depth);
  const Tiles tiles = direct_tiles(pixels.count, channels);
  const OnDevice device(z);
  const Tensor parts = new_tensor(weight, {stretches, kSpreadParts, channels}, ScalarType::Double);
  const Tensor direct = new_tensor(weight, {tiles.count, 3, channels}, ScalarType::Double);
  const Tensor vectors = new_tensor(weight, {kVectors, channels}, ScalarType::Float);
  const Tensor suspect = new_tensor(weight, {channels}, ScalarType::Bool);
  const Spreads spreads{doubles(parts), stretches, ratio};
  spread({doubles(mean), doubles(covariance), parameter(weight), static_cast<double*>(output(parts)), channels, depth},
         device.queue());
  pointwise_direct({pixels,
                    parameter(weight),
                    {nullptr, spreads},
                    {},
                    nullptr,
                    nullptr,
                    static_cast<double*>(output(direct)),
                    tiles.rows,
                    channels},
                   device.queue());
  moments_finalize({spreads, direct_partials(doubles(direct), tiles, pixels.count), parameter(gamma), parameter(beta),
                    parameter(residual_scale), static_cast<float*>(output(vectors)),
                    static_cast<bool*>(output(suspect)), eps, channels},
                   device.queue());
  return {vectors, suspect};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("moments_finalize_direct", TORCH_BOX(&finalize_op)); }

}  // namespace
}  // namespace fused_res::cuda
