// bn_act on the CPU, and that of a BN whose statistics are those of y.
#include "bn_stats.h"

namespace fused_res::cpu {

std::tuple<Tensor, OptionalTensor> bn_act(const Tensor& y, const Tensor& vectors, const OptionalTensor& skip,
                                          const OptionalTensor& y2, const OptionalTensor& vectors2, bool keep_signs,
                                          bool relu) {
  check_bn_act(y, vectors, skip, y2, vectors2, keep_signs, relu);
  const int64_t pixels = y.size(0), channels = y.size(1);
  const Tensor out = new_tensor(y, {pixels, channels});
  OptionalTensor signs;
  if (keep_signs) signs = new_tensor(y, {pixels, sign_bytes(channels)}, ScalarType::Byte);
  const BnAct arguments{channels,
                        data(y),
                        data(vectors),
                        data(skip),
                        data(y2),
                        data(vectors2),
                        output(out),
                        static_cast<uint8_t*>(output(signs)),
                        streams(y, {output(out)}),
                        relu};
  run_rows(kernels().bn_act[dtype_of(y)], arguments, pixels);
  return {out, signs};
}

namespace {

std::tuple<Tensor, Tensor, OptionalTensor> bn_stats_act(const Tensor& y, const OptionalTensor& gamma,
                                                        const OptionalTensor& beta, double eps,
                                                        const OptionalTensor& residual_scale,
                                                        const OptionalTensor& skip, const OptionalTensor& y2,
                                                        const OptionalTensor& vectors2, bool keep_signs, bool relu) {
  const Tensor vectors = bn_stats_finalize(y, gamma, beta, eps, residual_scale);
  const auto [out, signs] = bn_act(y, vectors, skip, y2, vectors2, keep_signs, relu);
  return {vectors, out, signs};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "bn_act", TORCH_BOX(&bn_act));
  implement(m, "bn_stats_act", TORCH_BOX(&bn_stats_act));
}

}  // namespace
}  // namespace fused_res::cpu
