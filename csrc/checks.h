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

#include "vectors.h"

namespace fused_res {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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
                         const OptionalTensor& vectors2, bool keep_signs, bool relu) {
  check_normalised("y", y, "vectors", vectors);
  STD_TORCH_CHECK(relu || !keep_signs, "keep_signs: expected False without a ReLU");
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

}  // namespace fused_res
