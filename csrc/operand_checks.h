// Checks of images, and of what kernels compute while they read them (fused_res/primitives/operands.py).
#pragma once

#include "checks.h"

namespace fused_res {

// Images [N, H, W, C], C >= 1.
inline void check_image(const char* name, const Tensor& image) {
  check_memory(name, image);
  STD_TORCH_CHECK(image.dim() == 4, name, ": expected images [N, H, W, C], got ", image.dim(), " dimensions");
  STD_TORCH_CHECK(is_floating_point(image.scalar_type()), name,
                  ": expected float32, float16, bfloat16 or float64, got ",
                  torch::headeronly::toString(image.scalar_type()));
  STD_TORCH_CHECK(image.size(3) >= 1, name, ": expected at least one channel, got none");
}

// Images of which every down-th line and right-th pixel is read, normalised if there are vectors.
inline void check_activation(const char* name, const Tensor& image, const char* vectors_name,
                             const OptionalTensor& vectors, int64_t down, int64_t right) {
  check_image(name, image);
  STD_TORCH_CHECK(down >= 1 && right >= 1, name, ": expected strides of at least 1, got ", down, " and ", right);
  if (vectors) check(vectors_name, *vectors, {kVectors, image.size(3)}, statistics_dtype(image.scalar_type()), image);
}

// How many pixels that is, in images of any batch.
inline int64_t sampled(const Tensor& image, int64_t down, int64_t right) {
  const auto sample = [](int64_t size, int64_t step) { return size / step + (size % step != 0); };
  return image.size(0) * sample(image.size(1), down) * sample(image.size(2), right);
}

// A matrix, [C, K] for an operand of K channels on `side` 1, of C channels on side 0.
inline void check_weight(const char* name, const Tensor& weight, const Tensor& operand, int64_t side) {
  check_memory(name, weight);
  STD_TORCH_CHECK(weight.dim() == 2, name, ": expected a matrix, got ", weight.dim(), " dimensions");
  check_dtype(name, weight, operand.scalar_type());
  check_device(name, weight, operand);
  const int64_t channels = operand.size(operand.dim() - 1);
  STD_TORCH_CHECK(weight.size(side) == channels && weight.size(1 - side) >= 1, name, ": expected ", channels,
                  side == 1 ? " columns" : " rows", ", got shape ", shape_string(weight.sizes().data(), 2));
}

// dx [N, H, W, C] is joined by an addend [N, ceil(H / down), ceil(W / right), C].
inline void check_addend(const Tensor& dx, const Tensor& addend, const OptionalTensor& signs, int64_t down,
                         int64_t right) {
  STD_TORCH_CHECK(down >= 1 && right >= 1, "addend: expected strides of at least 1, got ", down, " and ", right);
  const int64_t height = dx.size(1) / down + (dx.size(1) % down != 0);
  const int64_t width = dx.size(2) / right + (dx.size(2) % right != 0);
  check("addend", addend, {dx.size(0), height, width, dx.size(3)}, dx.scalar_type(), dx);
  if (signs) check("signs", *signs, {dx.size(0) * height * width, sign_bytes(dx.size(3))}, ScalarType::Byte, dx);
}

// The gradient of a convolution's output, images [N, H, W, K], as it is or with what it follows from.
inline void check_gradient(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& vectors,
                           const OptionalTensor& coefficients, const OptionalTensor& signs) {
  check_image("dy", dy);
  const bool computed = coefficients.has_value();
  STD_TORCH_CHECK(y.has_value() == computed && vectors.has_value() == computed && (computed || !signs),
                  "coefficients: expected y, vectors and coefficients together, and signs only with them");
  if (!computed) return;
  const ScalarType wide = statistics_dtype(dy.scalar_type());
  const int64_t channels = dy.size(3);
  check("y", *y, {dy.size(0), dy.size(1), dy.size(2), channels}, dy.scalar_type(), dy);
  check("vectors", *vectors, {kVectors, channels}, wide, dy);
  check("coefficients", *coefficients, {kCoefficients, channels}, wide, dy);
  if (signs) {
    check("signs", *signs, {dy.size(0) * dy.size(1) * dy.size(2), sign_bytes(channels)}, ScalarType::Byte, dy);
  }
}

}  // namespace fused_res
