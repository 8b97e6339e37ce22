// bn_act_backward on the CPU: reduce, finalize (in double), apply, and the three in one call.
#include "parameters.h"

namespace fused_res::cpu {
namespace {

Tensor reduce_op(const Tensor& dout, const Tensor& y, const Tensor& vectors, const OptionalTensor& signs,
                 const OptionalTensor& y2, const OptionalTensor& vectors2) {
  check_bn_act_backward_reduce(dout, y, vectors, signs, y2, vectors2);
  const Tiling cut = tiling(y);
  const Tensor partials = new_tensor(vectors, {cut.tiles, y2 ? 3 : 2, cut.channels});
  run_tasks(kernels().bn_act_backward_reduce[dtype_of(y)],
            BnActBackwardReduce{cut, data(dout), data(y), data(vectors), static_cast<const uint8_t*>(data(signs)),
                                data(y2), data(vectors2), output(partials)});
  return partials;
}

struct Sums {
  int64_t tiles, sums, row, channels;
  double pixels;
  bool training;
};

template <class A>
void finalize(const Sums& s, const A* partials, const A* vectors, const Parameter& gamma, const Parameter& beta,
              double a, A* coefficients, int64_t from, int64_t to) {
  double sum_g[kChannels] = {}, sum_gy[kChannels] = {};
  for (int64_t t = 0; t < s.tiles; ++t) {
    const A* tile = partials + t * s.sums * s.channels;
    for (int64_t c = from; c < to; ++c) {
      sum_g[c - from] += tile[c];
      sum_gy[c - from] += tile[s.row * s.channels + c];
    }
  }
  for (int64_t c = from; c < to; ++c) {
    const double mean = vectors[c], invstd = vectors[kInvstd * s.channels + c], p = vectors[kScale * s.channels + c];
    const double total = sum_g[c - from], d = invstd * sum_gy[c - from];
    const double q = s.training ? -p * invstd * d / s.pixels : 0;
    const double r = s.training ? -p * total / s.pixels - q * mean : 0;
    const double rows[kCoefficients] = {
        p, q, r, a * d, a * total, gamma[c] * d + beta[c] * total, s.training ? 0 : p * total};
    for (int64_t row = 0; row < kCoefficients; ++row) coefficients[row * s.channels + c] = static_cast<A>(rows[row]);
  }
}

Tensor finalize_op(const Tensor& partials, int64_t row, int64_t pixels, const Tensor& vectors,
                   const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual_scale,
                   bool training) {
  check_bn_act_backward_finalize(partials, row, pixels, vectors, gamma, beta, residual_scale);
  const Sums sums{partials.size(0), partials.size(1), row, partials.size(2), static_cast<double>(pixels), training};
  const Tensor coefficients = new_tensor(vectors, {kCoefficients, sums.channels});
  const Parameter g(gamma, 1), b(beta, 0);
  const double a = Parameter(residual_scale, 1)[0];
  for_stretches(sums.channels, sums.tiles, [&](int64_t from, int64_t to) {
    const auto run = [&](auto zero) {
      using A = decltype(zero);
      finalize(sums, static_cast<const A*>(data(partials)), static_cast<const A*>(data(vectors)), g, b, a,
               static_cast<A*>(output(coefficients)), from, to);
    };
    if (vectors.scalar_type() == ScalarType::Double) {
      run(double{});
    } else {
      run(float{});
    }
  });
  return coefficients;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> apply_op(const Tensor& dout, const Tensor& y, const Tensor& vectors,
                                                            const Tensor& coefficients, const OptionalTensor& signs,
                                                            bool training, const OptionalTensor& y2,
                                                            const OptionalTensor& coefficients2, bool training2,
                                                            bool keep_masked) {
  check_bn_act_backward_apply(dout, y, vectors, coefficients, signs, y2, coefficients2);
  const int64_t pixels = y.size(0), channels = y.size(1);
  const auto fresh = [&] { return new_tensor(y, {pixels, channels}); };
  const Tensor dy = fresh();
  OptionalTensor dy2, masked;
  if (y2) dy2 = fresh();
  if (keep_masked) masked = fresh();
  const BnActBackwardApply arguments{channels,
                                     data(dout),
                                     data(y),
                                     data(vectors),
                                     data(coefficients),
                                     static_cast<const uint8_t*>(data(signs)),
                                     training,
                                     data(y2),
                                     data(coefficients2),
                                     training2,
                                     output(dy),
                                     output(dy2),
                                     output(masked),
                                     streams(y, {output(dy), output(dy2), output(masked)})};
  run_rows(kernels().bn_act_backward_apply[dtype_of(y)], arguments, pixels);
  return {dy, dy2, masked};
}

std::tuple<Tensor, Tensor> backward_op(const Tensor& dout, const Tensor& y, const Tensor& vectors,
                                       const OptionalTensor& gamma, const OptionalTensor& beta,
                                       const OptionalTensor& residual_scale, const OptionalTensor& signs,
                                       bool training) {
  const Tensor partials = reduce_op(dout, y, vectors, signs, std::nullopt, std::nullopt);
  const Tensor coefficients = finalize_op(partials, 1, y.size(0), vectors, gamma, beta, residual_scale, training);
  const auto found =
      apply_op(dout, y, vectors, coefficients, signs, training, std::nullopt, std::nullopt, false, false);
  return {coefficients, std::get<0>(found)};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "bn_act_backward_reduce", TORCH_BOX(&reduce_op));
  implement(m, "bn_act_backward_finalize", TORCH_BOX(&finalize_op));
  implement(m, "bn_act_backward_apply", TORCH_BOX(&apply_op));
  implement(m, "bn_act_backward", TORCH_BOX(&backward_op));
}

}  // namespace
}  // namespace fused_res::cpu
