// Checks of the convolutions of our own: 1x1 as products, and unstrided 3x3 ones.
#pragma once

#include "operand_checks.h"

namespace fused_res {

inline void check_pointwise_fprop(const Tensor& x, const OptionalTensor& x_vectors, int64_t down, int64_t right,
                                  const Tensor& weight, bool statistics) {
  check_activation("x", x, "x_vectors", x_vectors, down, right);
  check_weight("weight", weight, x, 1);
  STD_TORCH_CHECK(!statistics || sampled(x, down, right) >= 1, "x: expected at least one row, got none");
}

// dx has the pixels of dy.
inline void check_pointwise_dgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
                                  const OptionalTensor& coefficients, const OptionalTensor& signs, const Tensor& weight,
                                  const OptionalTensor& inner, const OptionalTensor& inner_vectors,
                                  const OptionalTensor& addend) {
  check_gradient(dy, y, vectors, coefficients, signs);
  check_weight("weight", weight, dy, 0);
  STD_TORCH_CHECK(!(inner && addend), "inner: expected either inner or addend, got both");
  STD_TORCH_CHECK(inner.has_value() == inner_vectors.has_value(), "inner_vectors: expected together with inner");
  if (!inner) return;
  const int64_t channels = weight.size(1);
  check("inner", *inner, {dy.size(0), dy.size(1), dy.size(2), channels}, dy.scalar_type(), dy);
  check("inner_vectors", *inner_vectors, {kVectors, channels}, statistics_dtype(dy.scalar_type()), dy);
}

inline void check_pointwise_wgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
                                  const OptionalTensor& coefficients, const OptionalTensor& signs, const Tensor& x,
                                  const OptionalTensor& x_vectors, int64_t down, int64_t right) {
  check_gradient(dy, y, vectors, coefficients, signs);
  check_activation("x", x, "x_vectors", x_vectors, down, right);
  check_dtype("x", x, dy.scalar_type());
  check_device("x", x, dy);
  const int64_t pixels = dy.size(0) * dy.size(1) * dy.size(2);
  STD_TORCH_CHECK(sampled(x, down, right) == pixels, "x: expected ", pixels, " pixels, got ", sampled(x, down, right));
}

// A 3x3 filter [out, 3, 3, in] for an operand of `in` channels on side 3, of `out` channels on side 0, and padding.
inline void check_filter(const Tensor& weight, const Tensor& operand, int64_t side, int64_t down, int64_t right) {
  check_memory("weight", weight);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 3 && weight.size(2) == 3,
                  "weight: expected shape (out, 3, 3, in), got ", shape_string(weight.sizes().data(), weight.dim()));
  check_dtype("weight", weight, operand.scalar_type());
  check_device("weight", weight, operand);
  STD_TORCH_CHECK(weight.size(side) == operand.size(3) && weight.size(3 - side) >= 1, "weight: expected ",
                  operand.size(3), side == 3 ? " input" : " output", " channels, got ", weight.size(side));
  STD_TORCH_CHECK(down >= 0 && down <= 2 && right >= 0 && right <= 2, "down: expected a padding of 0, 1 or 2, got ",
                  down, " and ", right);
}

// Each transform rounds what it stores: 16 bits would leave too few of them.
inline void check_winograd_dtype(const char* name, const Tensor& image) {
  const ScalarType dtype = image.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  ": expected float32 or float64, got ", torch::headeronly::toString(dtype));
}

// What is to be prepared for convolutions: a filter [out, 3, 3, in], a matrix [out, in].
inline void check_prepared_filter(const Tensor& weight) {
  check_memory("weight", weight);
  check_winograd_dtype("weight", weight);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(1) == 3 && weight.size(2) == 3 && weight.size(0) >= 1 && weight.size(3) >= 1,
      "weight: expected filters (out, 3, 3, in), got ", shape_string(weight.sizes().data(), weight.dim()));
}

inline void check_prepared_matrix(const Tensor& weight) {
  check_rows("weight", weight);
  STD_TORCH_CHECK(weight.size(0) >= 1 && weight.size(1) >= 1, "weight: expected a matrix (out, in), got ",
                  shape_string(weight.sizes().data(), weight.dim()));
}

// The rest of a convolution in evaluation, of so many pixels.
inline void check_rest(const Tensor& x, int64_t pixels, int64_t channels, const Tensor& vectors,
                       const OptionalTensor& skip) {
  STD_TORCH_CHECK(channels >= 1, "channels: expected at least 1, got ", channels);
  check("vectors", vectors, {kVectors, channels}, statistics_dtype(x.scalar_type()), x);
  if (skip) check("skip", *skip, {pixels, channels}, x.scalar_type(), x);
}

inline void check_winograd_bn_act(const Tensor& x, int64_t channels, int64_t down, int64_t right, const Tensor& vectors,
                                  const OptionalTensor& skip) {
  check_image("x", x);
  check_winograd_dtype("x", x);
  STD_TORCH_CHECK(down >= 0 && down <= 2 && right >= 0 && right <= 2, "down: expected a padding of 0, 1 or 2, got ",
                  down, " and ", right);
  const int64_t height = x.size(1) + 2 * down - 2, width = x.size(2) + 2 * right - 2;
  STD_TORCH_CHECK(x.size(0) >= 1, "x: expected at least one image, got none");
  STD_TORCH_CHECK(height >= 1 && width >= 1, "x: expected at least 3 lines and pixels, padding included");
  check_rest(x, x.size(0) * height * width, channels, vectors, skip);
}

inline void check_pointwise_bn_act(const Tensor& x, int64_t channels, int64_t down, int64_t right,
                                   const Tensor& vectors, const OptionalTensor& skip) {
  check_activation("x", x, "", {}, down, right);
  check_rest(x, sampled(x, down, right), channels, vectors, skip);
}

inline void check_winograd_fprop(const Tensor& x, const OptionalTensor& x_vectors, const Tensor& weight, int64_t down,
                                 int64_t right, bool statistics, const OptionalTensor& vectors,
                                 const OptionalTensor& skip, const OptionalTensor& y2, const OptionalTensor& vectors2) {
  check_activation("x", x, "x_vectors", x_vectors, 1, 1);
  check_winograd_dtype("x", x);
  check_filter(weight, x, 3, down, right);
  const int64_t height = x.size(1) + 2 * down - 2, width = x.size(2) + 2 * right - 2, channels = weight.size(0);
  STD_TORCH_CHECK(height >= 1 && width >= 1, "x: expected at least 3 lines and pixels, padding included");
  STD_TORCH_CHECK(x.size(0) >= 1, "x: expected at least one image, got none");
  STD_TORCH_CHECK(!(statistics && vectors), "vectors: expected none together with statistics");
  STD_TORCH_CHECK(vectors || !(skip || y2), "vectors: expected together with skip or y2");
  STD_TORCH_CHECK(!(skip && y2), "skip: expected at most one of skip and y2");
  STD_TORCH_CHECK(vectors2.has_value() == y2.has_value(), "vectors2: expected together with y2");
  const ScalarType wide = statistics_dtype(x.scalar_type());
  const int64_t pixels = x.size(0) * height * width;
  if (vectors) check("vectors", *vectors, {kVectors, channels}, wide, x);
  if (skip) check("skip", *skip, {pixels, channels}, x.scalar_type(), x);
  if (y2) check("y2", *y2, {pixels, channels}, x.scalar_type(), x);
  if (vectors2) check("vectors2", *vectors2, {kVectors, channels}, wide, x);
}

inline void check_winograd_dgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
                                 const OptionalTensor& coefficients, const OptionalTensor& signs, const Tensor& weight,
                                 int64_t down, int64_t right, const OptionalTensor& inner,
                                 const OptionalTensor& inner_vectors, const OptionalTensor& addend) {
  check_gradient(dy, y, vectors, coefficients, signs);
  check_winograd_dtype("dy", dy);
  check_filter(weight, dy, 0, down, right);
  const int64_t height = dy.size(1) + 2 - 2 * down, width = dy.size(2) + 2 - 2 * right, channels = weight.size(3);
  STD_TORCH_CHECK(height >= 1 && width >= 1, "dy: expected the gradient of at least one line and pixel");
  STD_TORCH_CHECK(!(inner && addend), "inner: expected either inner or addend, got both");
  STD_TORCH_CHECK(inner.has_value() == inner_vectors.has_value(), "inner_vectors: expected together with inner");
  if (!inner) return;
  check("inner", *inner, {dy.size(0), height, width, channels}, dy.scalar_type(), dy);
  check("inner_vectors", *inner_vectors, {kVectors, channels}, statistics_dtype(dy.scalar_type()), dy);
}

inline void check_winograd_wgrad(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
                                 const OptionalTensor& coefficients, const OptionalTensor& signs, const Tensor& x,
                                 const OptionalTensor& x_vectors, int64_t down, int64_t right) {
  check_gradient(dy, y, vectors, coefficients, signs);
  check_winograd_dtype("dy", dy);
  check_activation("x", x, "x_vectors", x_vectors, 1, 1);
  check_dtype("x", x, dy.scalar_type());
  check_device("x", x, dy);
  STD_TORCH_CHECK(down >= 0 && down <= 2 && right >= 0 && right <= 2, "down: expected a padding of 0, 1 or 2, got ",
                  down, " and ", right);
  STD_TORCH_CHECK(
      x.size(0) == dy.size(0) && x.size(1) + 2 * down - 2 == dy.size(1) && x.size(2) + 2 * right - 2 == dy.size(2),
      "x: expected the images whose 3x3 convolution has the size of dy, got ", x.size(0), " of ", x.size(1), " x ",
      x.size(2));
}

}  // namespace fused_res
