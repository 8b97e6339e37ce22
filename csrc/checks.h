// Argument checks of the operators, the same for every device.
//
// Python's primitives check the same things with better words; these hold for whoever calls torch.ops.fused_res.*
// directly: whatever passes here is safe to read and write.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace fused_res {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Activations are [pixels, channels]; vectors and coefficients have this many rows.
constexpr int64_t kVectors = 5;
constexpr int64_t kCoefficients = 7;

inline int64_t sign_bytes(int64_t channels) { return channels / 8 + (channels % 8 != 0); }

inline ScalarType statistics_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_floating_point(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

inline std::string shape_string(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < dim; ++d) text << (d > 0 ? ", " : "") << sizes[d];
  text << ']';
  return text.str();
}

// A contiguous tensor whose storage really holds its elements.
inline void check_memory(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.defined(), name, ": expected a tensor, got an undefined one");
  std::int32_t layout = 0;  // by the C interface: torch 2.10's stable::Tensor has no layout()
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), name, ": expected a strided tensor");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  if (tensor.numel() == 0) return;
  int64_t stored = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &stored));
  const int64_t item = static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(tensor.data_ptr() != nullptr && (tensor.storage_offset() + tensor.numel()) * item <= stored, name,
                  ": its storage is too small for its shape");
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  const auto device = tensor.device(), expected = like.device();
  STD_TORCH_CHECK(device.type() == expected.type() && device.index() == expected.index(), name,
                  ": expected the device of the other tensors");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == shape.size();
  for (size_t d = 0; equal && d < shape.size(); ++d) equal = sizes[d] == shape.begin()[d];
  STD_TORCH_CHECK(equal, name, ": expected shape ", shape_string(shape.begin(), shape.size()), ", got ",
                  shape_string(sizes.data(), sizes.size()));
}

inline void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType dtype,
                  const Tensor& like) {
  check_memory(name, tensor);
  check_shape(name, tensor, shape);
  check_dtype(name, tensor, dtype);
  check_device(name, tensor, like);
}

// A matrix [pixels, channels] of activations.
inline void check_rows(const char* name, const Tensor& tensor) {
  check_memory(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected a matrix [P, C], got ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(is_floating_point(tensor.scalar_type()), name,
                  ": expected float32, float16, bfloat16 or float64, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// Per-channel statistics, partial or merged: float32 or float64, `dim` dimensions.
inline void check_statistics(const char* name, const Tensor& tensor, int64_t dim) {
  check_memory(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == statistics_dtype(tensor.scalar_type()), name,
                  ": expected float32 or float64, got ", torch::headeronly::toString(tensor.scalar_type()));
}

// A parameter of the BN: any floating-point dtype.
inline void check_parameter(const char* name, const OptionalTensor& tensor, std::initializer_list<int64_t> shape,
                            const Tensor& like) {
  if (!tensor) return;
  check_memory(name, *tensor);
  STD_TORCH_CHECK(is_floating_point(tensor->scalar_type()), name, ": expected a floating-point dtype, got ",
                  torch::headeronly::toString(tensor->scalar_type()));
  check_shape(name, *tensor, shape);
  check_device(name, *tensor, like);
}

inline void check_bn_stats(const Tensor& y) {
  check_rows("y", y);
  STD_TORCH_CHECK(y.size(0) >= 1, "y: expected at least one row, got none");
}

inline void check_bn_finalize(const Tensor& partials, int64_t rows, int64_t pixels, const OptionalTensor& gamma,
                              const OptionalTensor& beta, const OptionalTensor& residual_scale) {
  check_statistics("partials", partials, 3);
  const int64_t tiles = partials.size(0), channels = partials.size(2);
  STD_TORCH_CHECK(partials.size(1) == 2, "partials: expected shape [T, 2, C], got ",
                  shape_string(partials.sizes().data(), 3));
  STD_TORCH_CHECK(tiles >= 1 && rows >= 1 && pixels >= 1 && (pixels - 1) / rows == tiles - 1, "pixels: ", tiles,
                  " tiles of ", rows, " rows cannot hold ", pixels, " rows");
  check_parameter("gamma", gamma, {channels}, partials);
  check_parameter("beta", beta, {channels}, partials);
  check_parameter("residual_scale", residual_scale, {}, partials);
}

// For every unit its running mean and variance, which are written to, its [5, C] vectors, pixels and momentum; and
// counters.
inline void check_move_statistics(const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                                  const std::vector<Tensor>& counts, const std::vector<Tensor>& vectors,
                                  const std::vector<int64_t>& pixels, const std::vector<double>& momenta) {
  const size_t units = vectors.size();
  STD_TORCH_CHECK(
      means.size() == units && variances.size() == units && pixels.size() == units && momenta.size() == units,
      "vectors: expected as many as means, variances, pixels and momenta, got ", units);
  for (const Tensor& count : counts) {
    check_memory("counts", count);
    check_shape("counts", count, {});
    check_dtype("counts", count, ScalarType::Long);
  }
  for (size_t u = 0; u < units; ++u) {
    check_statistics("vectors", vectors[u], 2);
    const int64_t channels = vectors[u].size(1);
    check_shape("vectors", vectors[u], {kVectors, channels});
    check_parameter("means", means[u], {channels}, vectors[u]);
    check_parameter("variances", variances[u], {channels}, vectors[u]);
    STD_TORCH_CHECK(pixels[u] >= 2, "pixels: expected at least 2, got ", pixels[u]);
  }
}

// y with its vectors, and a second BN where there is one.
inline void check_normalised(const char* name, const Tensor& y, const char* vectors_name, const Tensor& vectors) {
  check_rows(name, y);
  check(vectors_name, vectors, {kVectors, y.size(1)}, statistics_dtype(y.scalar_type()), y);
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& y) {
  check(name, tensor, {y.size(0), y.size(1)}, y.scalar_type(), y);
}

inline void check_signs(const OptionalTensor& signs, const Tensor& y) {
  if (signs) check("signs", *signs, {y.size(0), sign_bytes(y.size(1))}, ScalarType::Byte, y);
}

inline void check_bn_act(const Tensor& y, const Tensor& vectors, const OptionalTensor& skip, const OptionalTensor& y2,
                         const OptionalTensor& vectors2) {
  check_normalised("y", y, "vectors", vectors);
  STD_TORCH_CHECK(!(skip && y2), "skip: expected either skip or y2, got both");
  STD_TORCH_CHECK(y2.has_value() == vectors2.has_value(), "vectors2: expected together with y2");
  if (skip) check_like("skip", *skip, y);
  if (y2) {
    check_like("y2", *y2, y);
    check("vectors2", *vectors2, {kVectors, y.size(1)}, vectors.scalar_type(), y);
  }
}

inline void check_bn_act_backward_reduce(const Tensor& dout, const Tensor& y, const Tensor& vectors,
                                         const OptionalTensor& signs, const OptionalTensor& y2,
                                         const OptionalTensor& vectors2) {
  check_normalised("y", y, "vectors", vectors);
  check_like("dout", dout, y);
  check_signs(signs, y);
  STD_TORCH_CHECK(y2.has_value() == vectors2.has_value(), "vectors2: expected together with y2");
  if (y2) {
    STD_TORCH_CHECK(signs.has_value(), "signs: expected with y2, got none");
    check_like("y2", *y2, y);
    check("vectors2", *vectors2, {kVectors, y.size(1)}, vectors.scalar_type(), y);
  }
}

inline void check_bn_act_backward_finalize(const Tensor& partials, int64_t row, int64_t pixels, const Tensor& vectors,
                                           const OptionalTensor& gamma, const OptionalTensor& beta,
                                           const OptionalTensor& residual_scale) {
  check_statistics("partials", partials, 3);
  const int64_t sums = partials.size(1), channels = partials.size(2);
  STD_TORCH_CHECK(partials.size(0) >= 1 && (sums == 2 || sums == 3), "partials: expected shape [T, 2 or 3, C], got ",
                  shape_string(partials.sizes().data(), 3));
  STD_TORCH_CHECK(row >= 1 && row < sums, "row: expected 1 to ", sums - 1, ", got ", row);
  STD_TORCH_CHECK(pixels >= 1, "pixels: expected at least 1, got ", pixels);
  check("vectors", vectors, {kVectors, channels}, partials.scalar_type(), partials);
  check_parameter("gamma", gamma, {channels}, partials);
  check_parameter("beta", beta, {channels}, partials);
  check_parameter("residual_scale", residual_scale, {}, partials);
}

inline void check_bn_act_backward_apply(const Tensor& dout, const Tensor& y, const Tensor& vectors,
                                        const Tensor& coefficients, const OptionalTensor& signs,
                                        const OptionalTensor& y2, const OptionalTensor& coefficients2) {
  check_normalised("y", y, "vectors", vectors);
  check_like("dout", dout, y);
  check("coefficients", coefficients, {kCoefficients, y.size(1)}, vectors.scalar_type(), y);
  check_signs(signs, y);
  STD_TORCH_CHECK(y2.has_value() == coefficients2.has_value(), "coefficients2: expected together with y2");
  if (y2) {
    STD_TORCH_CHECK(signs.has_value(), "signs: expected with y2, got none");
    check_like("y2", *y2, y);
    check("coefficients2", *coefficients2, {kCoefficients, y.size(1)}, vectors.scalar_type(), y);
  }
}

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

inline void check_winograd_fprop(const Tensor& x, const OptionalTensor& x_vectors, const Tensor& weight, int64_t down,
                                 int64_t right, bool statistics, const OptionalTensor& vectors,
                                 const OptionalTensor& skip, const OptionalTensor& y2, const OptionalTensor& vectors2) {
  check_activation("x", x, "x_vectors", x_vectors, 1, 1);
  check_filter(weight, x, 3, down, right);
  const int64_t height = x.size(1) + 2 * down - 2, width = x.size(2) + 2 * right - 2, channels = weight.size(0);
  STD_TORCH_CHECK(height >= 1 && width >= 1, "x: expected at least 3 lines and pixels, padding included");
  STD_TORCH_CHECK(!statistics || x.size(0) >= 1, "x: expected at least one image, got none");
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
  check_activation("x", x, "x_vectors", x_vectors, 1, 1);
  check_dtype("x", x, dy.scalar_type());
  check_device("x", x, dy);
  STD_TORCH_CHECK(down >= 0 && down <= 2 && right >= 0 && right <= 2, "down: expected a padding of 0, 1 or 2, got ",
                  down, " and ", right);
  STD_TORCH_CHECK(
      x.size(0) == dy.size(0) && x.size(1) + 2 * down - 2 == dy.size(1) && x.size(2) + 2 * right - 2 == dy.size(2),
      "x: expected the images that a 3x3 convolution makes those of dy of, got ", x.size(0), " of ", x.size(1), " x ",
      x.size(2));
}

}  // namespace fused_res
