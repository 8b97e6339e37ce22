// pointwise_tail_backward on the CPU: reduce, finalize, and apply.
#include <vector>

#include "../moment_checks.h"
#include "parameters.h"
#include "reduction.h"
#include "spread.h"

namespace fused_res::cpu {
namespace {

// A vector of doubles as two: its values rounded to the dtype that the kernels compute in, and what the rounding took.
class Split {
 public:
  Split(const OptionalTensor& vector, const Tensor& like) {
    if (!vector) return;
    const int64_t n = vector->size(0);
    const double* from = static_cast<const double*>(data(*vector));
    held_ = fresh_statistics(like, {n});
    rest_.assign(from, from + n);
    void* to = output(*held_);
    for (int64_t i = 0; i < n; ++i) {
      if (held_->scalar_type() == ScalarType::Double) {
        static_cast<double*>(to)[i] = from[i];
        rest_[i] = 0;
      } else {
        static_cast<float*>(to)[i] = static_cast<float>(from[i]);
        rest_[i] -= static_cast<double>(static_cast<float>(from[i]));
      }
    }
  }

  const void* held() const { return data(held_); }
  const std::vector<double>& rest() const { return rest_; }

 private:
  OptionalTensor held_;
  std::vector<double> rest_;
};

std::tuple<Tensor, Tensor, OptionalTensor> reduce_op(const Tensor& dout, const Tensor& signs, const Tensor& z,
                                                     const OptionalTensor& z_vectors, int64_t down, int64_t right,
                                                     const OptionalTensor& mean, const OptionalTensor& scaled) {
  check_pointwise_tail_backward_reduce(dout, signs, z, z_vectors, down, right, mean, scaled);
  const int64_t pixels = dout.size(0), channels = dout.size(1), inner = z.size(3);
  const Split centre(mean, z);
  Operand operand = activation(z, z_vectors, down, right);
  operand.mean = centre.held();
  OptionalTensor matrix, through;
  if (scaled) matrix = packed(*scaled, false);
  const Partials partials = reduce(masked(dout, signs), operand, pixels, true, dout, matrix, through);
  const Tensor total = new_tensor(dout, {channels}, ScalarType::Double);
  const Tensor product = new_tensor(dout, {channels, inner}, ScalarType::Double);
  double* sums = static_cast<double*>(output(total));
  partials.all_sums(sums);
  for_products(partials, [&](int64_t c) {
    double* row = static_cast<double*>(output(product)) + c * inner;
    partials.products_row(c, inner, row);
    if (!mean) return;
    for (int64_t k = 0; k < inner; ++k) row[k] -= sums[c] * centre.rest()[k];
  });
  return {total, product, through};
}

Operand plain_rows(const Tensor& rows) {
  Operand operand{};
  operand.channels = rows.size(1);
  operand.rows = data(rows);
  operand.sampling = {1, 1, 1, 1, 1, 1};
  return operand;
}

// B = shares^T wide, in the dtype of the weight.
Tensor quadratic_form(const Tensor& shares, const Tensor& wide, const Tensor& weight) {
  const int64_t depth = weight.size(1);
  OptionalTensor none;
  const Partials partials =
      reduce(plain_rows(shares), plain_rows(wide), weight.size(0), false, shares, std::nullopt, none);
  const Tensor quadratic = new_tensor(weight, {depth, depth});
  const Result result(quadratic);
  for_products(partials, [&](int64_t j) {
    std::vector<double> row(depth);
    partials.products_row(j, depth, row.data());
    for (int64_t k = 0; k < depth; ++k) result.set(j * depth + k, row[k]);
  });
  return quadratic;
}

// The gradient of the weight; [4, C] of those of gamma and beta, the shares of the residual scale's, and the bias's; B
// and b; which channels are suspect, and how many: their D is that of `direct`, if given.
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, int64_t> finalize_op(
    const Tensor& total, const Tensor& product, int64_t pixels, const OptionalTensor& covariance, const Tensor& weight,
    const Tensor& vectors, const OptionalTensor& scaled, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& residual_scale, double ratio, const OptionalTensor& direct) {
  check_pointwise_tail_backward_finalize(total, product, pixels, covariance, weight, vectors, scaled, gamma, beta,
                                         residual_scale, direct);
  const int64_t channels = weight.size(0), depth = weight.size(1);
  SpreadRows rows(weight, covariance, ratio);
  const Tensor dweight = new_tensor(weight, {channels, depth});
  const double* totals = static_cast<const double*>(data(total));
  std::vector<double> d(channels), constants;
  TailGradients arguments{};
  arguments.spread = rows.get();
  arguments.pixels = static_cast<double>(pixels);
  arguments.totals = totals;
  arguments.products = static_cast<const double*>(data(product));
  arguments.direct = static_cast<const double*>(data(direct));
  arguments.vectors = data(vectors);
  arguments.dweight = output(dweight);
  arguments.d = d.data();
  const bool flows = covariance && scaled;
  OptionalTensor shares, wide, quadratic, constant;
  if (flows) {
    constants.resize(rows.tasks() * depth);
    shares = fresh_statistics(weight, {channels, depth});
    if (shares->scalar_type() != weight.scalar_type()) wide = fresh_statistics(weight, {channels, depth});
    arguments.scaled = data(scaled);
    arguments.constants = constants.data();
    arguments.shares = output(shares);
    arguments.wide = output(wide);
  }
  run_products(kernels().tail_gradients[dtype_of(weight)], arguments, rows.tasks(), rows.bytes(1));
  if (flows) {
    quadratic = quadratic_form(*shares, wide ? *wide : weight, weight);
    constant = fresh_statistics(weight, {depth});
    const Result result(*constant);
    for (int64_t k = 0; k < depth; ++k) {
      double sum = 0;
      for (int64_t task = 0; task < rows.tasks(); ++task) sum += constants[task * depth + k];
      result.set(k, sum);
    }
  }
  const Parameter g(gamma, 1), b(beta, 0), rows_of_bn(vectors, 1);
  const double a = Parameter(residual_scale, 1)[0];
  const Tensor coefficients = fresh_statistics(weight, {4, channels});
  const Result result(coefficients);
  for (int64_t c = 0; c < channels; ++c) {
    const double bias = covariance ? 0 : rows_of_bn[kScale * channels + c] * totals[c];
    const double column[4] = {a * d[c], a * totals[c], g[c] * d[c] + b[c] * totals[c], bias};
    for (int64_t row = 0; row < 4; ++row) result.set(row * channels + c, column[row]);
  }
  return {dweight, coefficients, quadratic, constant, rows.suspect(), rows.suspects()};
}

// dz = through - (z - m) B - b, with dout A for through where that is not given. dz may be the memory of through. With
// `joins` dz is images like z, to whose sampled pixels that is added.
OptionalTensor apply_op(const Tensor& dz, const OptionalTensor& through, const Tensor& dout, const Tensor& signs,
                        const Tensor& z, const OptionalTensor& z_vectors, int64_t down, int64_t right,
                        const Tensor& scaled, const OptionalTensor& mean, const OptionalTensor& quadratic,
                        const OptionalTensor& constant, bool inner, bool joins) {
  check_pointwise_tail_backward_apply(dz, through, dout, signs, z, z_vectors, down, right, scaled, mean, quadratic,
                                      constant, inner, joins);
  const int64_t pixels = dout.size(0), channels = z.size(3);
  Product arguments{};
  arguments.tiling = product_tiling(pixels, channels);
  arguments.start = data(through);
  arguments.out = output(dz);
  arguments.joins = joins;
  arguments.out_sampling = sampling_of(z, down, right);
  OptionalTensor first, second, shift;
  int64_t elements = block_elements(arguments.tiling.rows, kStretch) + block_elements(arguments.tiling.rows, channels);
  if (!through) {
    first = packed(scaled, false);
    arguments.first = {masked(dout, signs), data(first)};
    elements += block_elements(arguments.tiling.rows, dout.size(1));
  }
  const Split centre(mean, z);
  if (quadratic) {
    second = packed(*quadratic, false, true);
    arguments.second = {activation(z, z_vectors, down, right), data(second)};
    arguments.second.left.mean = centre.held();
    // What is left of the mean, times B, joins the constant.
    const Parameter b(constant, 0), matrix(quadratic, 0);
    shift = fresh_statistics(z, {channels});
    std::vector<double> values(channels);
    for (int64_t k = 0; k < channels; ++k) values[k] = b[k];
    for (int64_t j = 0; j < channels; ++j) {
      const double rest = centre.rest()[j];
      if (rest == 0) continue;
      for (int64_t k = 0; k < channels; ++k) values[k] -= rest * matrix[j * channels + k];
    }
    for (int64_t k = 0; k < channels; ++k) {
      if (z.scalar_type() == ScalarType::Double) {
        static_cast<double*>(output(*shift))[k] = values[k];
      } else {
        static_cast<float*>(output(*shift))[k] = static_cast<float>(values[k]);
      }
    }
    arguments.constant = data(shift);
  }
  OptionalTensor partials;
  if (inner) {
    partials = fresh_statistics(z, {arguments.tiling.tiles, 2, channels});
    arguments.sums = {arguments.tiling, data(dz), data(z), data(z_vectors),
                      nullptr,          nullptr,  nullptr, output(partials)};
  }
  run_products(kernels().product[dtype_of(z)], arguments, arguments.tiling.tiles * arguments.tiling.stretches,
               elements * arithmetic_size(z));
  return partials;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "pointwise_tail_backward_reduce", TORCH_BOX(&reduce_op));
  implement(m, "pointwise_tail_backward_finalize", TORCH_BOX(&finalize_op));
  implement(m, "pointwise_tail_backward_apply", TORCH_BOX(&apply_op));
}

}  // namespace
}  // namespace fused_res::cpu
