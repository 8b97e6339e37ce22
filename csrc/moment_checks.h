// Checks of the steps of the moment form.
#pragma once

#include "operand_checks.h"

namespace fused_res {

inline void check_pointwise_tail(const Tensor& z, const OptionalTensor& z_vectors, int64_t down, int64_t right,
                                 const Tensor& weight, const Tensor& vectors, const OptionalTensor& skip,
                                 const OptionalTensor& y2, const OptionalTensor& x, const OptionalTensor& x_vectors,
                                 int64_t x_down, int64_t x_right, const OptionalTensor& weight2,
                                 const OptionalTensor& vectors2) {
  check_activation("z", z, "z_vectors", z_vectors, down, right);
  check_weight("weight", weight, z, 1);
  const int64_t pixels = sampled(z, down, right), channels = weight.size(0);
  check("vectors", vectors, {kVectors, channels}, statistics_dtype(z.scalar_type()), z);
  STD_TORCH_CHECK(skip.has_value() + y2.has_value() + x.has_value() <= 1,
                  "skip: expected at most one of skip, y2 and x");
  STD_TORCH_CHECK(vectors2.has_value() == (y2.has_value() || x.has_value()),
                  "vectors2: expected together with y2 or x");
  STD_TORCH_CHECK(weight2.has_value() == x.has_value(), "weight2: expected together with x");
  STD_TORCH_CHECK(x || !x_vectors, "x_vectors: expected together with x");
  if (skip) check("skip", *skip, {pixels, channels}, z.scalar_type(), z);
  if (y2) check("y2", *y2, {pixels, channels}, z.scalar_type(), z);
  if (vectors2) check("vectors2", *vectors2, {kVectors, channels}, vectors.scalar_type(), z);
  if (x) {
    check_activation("x", *x, "x_vectors", x_vectors, x_down, x_right);
    check_dtype("x", *x, z.scalar_type());
    check_device("x", *x, z);
    check_weight("weight2", *weight2, *x, 1);
    STD_TORCH_CHECK(weight2->size(0) == channels, "weight2: expected ", channels, " rows, got ", weight2->size(0));
    STD_TORCH_CHECK(sampled(*x, x_down, x_right) == pixels, "x: expected ", pixels, " pixels, got ",
                    sampled(*x, x_down, x_right));
  }
}

// A weight [C, K] of any floating-point dtype, and the covariance of its input.
inline void check_spread(const Tensor& weight, const OptionalTensor& covariance) {
  check_rows("weight", weight);
  STD_TORCH_CHECK(weight.size(0) >= 1 && weight.size(1) >= 1, "weight: expected at least one row and column");
  if (covariance) check("covariance", *covariance, {weight.size(1), weight.size(1)}, ScalarType::Double, weight);
}

inline void check_moments_finalize(const Tensor& mean, const Tensor& covariance, const Tensor& weight,
                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                   const OptionalTensor& residual_scale, const OptionalTensor& direct) {
  check_spread(weight, covariance);
  check("mean", mean, {weight.size(1)}, ScalarType::Double, weight);
  check_parameter("gamma", gamma, {weight.size(0)}, weight);
  check_parameter("beta", beta, {weight.size(0)}, weight);
  check_parameter("residual_scale", residual_scale, {}, weight);
  if (direct) check("direct", *direct, {2, weight.size(0)}, ScalarType::Double, weight);
}

inline void check_outer(const Tensor& dout, const Tensor& signs, const Tensor& z, const OptionalTensor& z_vectors,
                        int64_t down, int64_t right) {
  check_activation("z", z, "z_vectors", z_vectors, down, right);
  check_rows("dout", dout);
  STD_TORCH_CHECK(dout.size(1) >= 1, "dout: expected at least one channel, got none");
  check("dout", dout, {sampled(z, down, right), dout.size(1)}, z.scalar_type(), z);
  check("signs", signs, {dout.size(0), sign_bytes(dout.size(1))}, ScalarType::Byte, z);
}

inline void check_pointwise_tail_backward_reduce(const Tensor& dout, const Tensor& signs, const Tensor& z,
                                                 const OptionalTensor& z_vectors, int64_t down, int64_t right,
                                                 const OptionalTensor& mean, const OptionalTensor& scaled) {
  check_outer(dout, signs, z, z_vectors, down, right);
  if (mean) check("mean", *mean, {z.size(3)}, ScalarType::Double, z);
  if (scaled) check("scaled", *scaled, {dout.size(1), z.size(3)}, z.scalar_type(), z);
}

inline void check_pointwise_tail_backward_finalize(const Tensor& total, const Tensor& product, int64_t pixels,
                                                   const OptionalTensor& covariance, const Tensor& weight,
                                                   const Tensor& vectors, const OptionalTensor& scaled,
                                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                                   const OptionalTensor& residual_scale, const OptionalTensor& direct) {
  check_spread(weight, covariance);
  const int64_t channels = weight.size(0), depth = weight.size(1);
  STD_TORCH_CHECK(pixels >= 1, "pixels: expected at least 1, got ", pixels);
  check("total", total, {channels}, ScalarType::Double, weight);
  check("product", product, {channels, depth}, ScalarType::Double, weight);
  check("vectors", vectors, {kVectors, channels}, statistics_dtype(weight.scalar_type()), weight);
  if (scaled) check("scaled", *scaled, {channels, depth}, weight.scalar_type(), weight);
  check_parameter("gamma", gamma, {channels}, weight);
  check_parameter("beta", beta, {channels}, weight);
  check_parameter("residual_scale", residual_scale, {}, weight);
  STD_TORCH_CHECK(covariance || !direct, "direct: expected together with covariance");
  if (direct) check("direct", *direct, {channels}, ScalarType::Double, weight);
}

inline void check_pointwise_tail_backward_apply(const Tensor& dz, const OptionalTensor& through, const Tensor& dout,
                                                const Tensor& signs, const Tensor& z, const OptionalTensor& z_vectors,
                                                int64_t down, int64_t right, const Tensor& scaled,
                                                const OptionalTensor& mean, const OptionalTensor& quadratic,
                                                const OptionalTensor& constant, bool inner, bool joins) {
  check_pointwise_tail_backward_reduce(dout, signs, z, z_vectors, down, right, mean, scaled);
  if (joins) {
    check("dz", dz, {z.size(0), z.size(1), z.size(2), z.size(3)}, z.scalar_type(), z);
    STD_TORCH_CHECK(!inner, "inner: expected no image that the gradient joins with it");
  } else {
    check("dz", dz, {dout.size(0), z.size(3)}, z.scalar_type(), z);
  }
  if (through) check("through", *through, {dout.size(0), z.size(3)}, statistics_dtype(z.scalar_type()), z);
  STD_TORCH_CHECK(mean.has_value() == quadratic.has_value() && mean.has_value() == constant.has_value(),
                  "quadratic: expected mean, quadratic and constant together");
  if (quadratic) check("quadratic", *quadratic, {z.size(3), z.size(3)}, z.scalar_type(), z);
  if (constant) check("constant", *constant, {z.size(3)}, statistics_dtype(z.scalar_type()), z);
  STD_TORCH_CHECK(!inner || (z_vectors && down == 1 && right == 1),
                  "inner: expected z_vectors and strides of 1 with it");
}

}  // namespace fused_res
