// pointwise_tail_backward_finalize on a GPU, which decides itself which channels need the direct pass.
#include "moment_checks.h"
#include "operands.cuh"
#include "pointwise_tail_backward_finalize.cuh"

namespace fused_res::cuda {
namespace {

Tensor scaled_weight_op(const Tensor& weight, const OptionalTensor& vectors, bool tf32) {
  check_rows("weight", weight);
  const Number number = number_of("weight", weight);
  const int channels = fewer_channels("weight", weight.size(0));
  const int depth = channels_of("weight", weight);
  if (vectors) fused_res::check("vectors", *vectors, {kVectors, channels}, ScalarType::Float, weight);
  const OnDevice device(weight);
  const Tensor scaled = new_tensor(weight, {channels, depth});
  scaled_weight({{data(weight), number}, floats(vectors), output(scaled), channels, depth, tf32}, device.queue());
  return scaled;
}

// The direct pass over suspect channels: which these are is known, or follows from the covariance.
Tensor direct_sums(const Pixels& z, const Tensor& weight, const Suspects& suspects, const Tensor& dout,
                   const Tensor& signs, const Tensor& vectors, const Tiles& tiles, const Queue& queue) {
  const Tensor partials = new_tensor(weight, {tiles.count, weight.size(0)}, ScalarType::Double);
  pointwise_direct({z, parameter(weight), suspects, parameter(dout), bytes(signs), floats(vectors),
                    static_cast<double*>(output(partials)), tiles.rows, static_cast<int>(weight.size(0))},
                   queue);
  return partials;
}

// The gradient of the weight; [4, C] of those of gamma and beta, the shares of the residual scale's, and the bias's; B
// and b.
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor> finalize_op(
    const Tensor& total, const Tensor& product, const Tensor& dout, const Tensor& signs, const Tensor& z,
    const OptionalTensor& z_vectors, std::int64_t down, std::int64_t right, bool tf32, const OptionalTensor& mean,
    const OptionalTensor& covariance, const OptionalTensor& suspect, const Tensor& weight, const Tensor& vectors,
    const OptionalTensor& scaled, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& residual_scale, double ratio) {
  const Pixels pixels = pixels_of("z", z, "z_vectors", z_vectors, down, right, tf32);
  check_outer(dout, signs, z, z_vectors, down, right);
  check_pointwise_tail_backward_finalize(total, product, pixels.count, covariance, weight, vectors, scaled, gamma, beta,
                                         residual_scale, std::nullopt);
  check_weight("weight", weight, z, 1);
  const int channels = fewer_channels("weight", weight.size(0)), depth = pixels.channels;
  STD_TORCH_CHECK(dout.size(1) == channels, "dout: expected ", channels, " channels, got ", dout.size(1));
  STD_TORCH_CHECK(mean.has_value() == covariance.has_value(), "mean: expected together with covariance");
  if (mean) fused_res::check("mean", *mean, {depth}, ScalarType::Double, z);
  if (suspect) fused_res::check("suspect", *suspect, {channels}, ScalarType::Bool, z);
  const OnDevice device(z);
  const Tiles tiles = direct_tiles(pixels.count, channels);
  Suspects suspects{};
  OptionalTensor parts, direct;
  if (covariance) {
    const std::int64_t stretches = spread_stretches(depth);
    if (!suspect) {
      parts = new_tensor(weight, {stretches, kSpreadParts, channels}, ScalarType::Double);
      spread(
          {doubles(mean), doubles(covariance), parameter(weight), static_cast<double*>(output(parts)), channels, depth},
          device.queue());
    }
    suspects = {static_cast<const bool*>(data(suspect)), {doubles(parts), stretches, ratio}};
    direct = direct_sums(pixels, weight, suspects, dout, signs, vectors, tiles, device.queue());
  }
  const Tensor coefficients = new_tensor(vectors, {kTailCoefficients, channels});
  const Tensor shares = new_tensor(total, {channels});
  pointwise_tail_backward_finalize_rows(
      {doubles(total), doubles(product), parameter(weight), floats(vectors), suspects,
       direct_partials(doubles(direct), tiles, pixels.count), parameter(gamma), parameter(beta),
       parameter(residual_scale), static_cast<float*>(output(coefficients)), static_cast<double*>(output(shares)),
       pixels.count, channels, depth, covariance.has_value()},
      device.queue());
  const bool flows = covariance && scaled;
  const Tensor dweight = new_tensor(weight, {channels, depth});
  OptionalTensor quadratic, constant;
  if (flows) {
    quadratic = new_tensor(weight, {depth, depth});
    constant = new_tensor(vectors, {depth});
  }
  pointwise_tail_backward_finalize(
      {doubles(total), doubles(product), doubles(covariance), parameter(weight),
       flows ? parameter(scaled) : Parameter{}, floats(vectors), doubles(shares), output(dweight), output(quadratic),
       static_cast<float*>(output(constant)), pixels.count, channels, depth},
      device.queue());
  return {dweight, coefficients, quadratic, constant};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) {
  m.impl("scaled_weight", TORCH_BOX(&scaled_weight_op));
  m.impl("pointwise_tail_backward_finalize_direct", TORCH_BOX(&finalize_op));
}

}  // namespace
}  // namespace fused_res::cuda
