// bn_act on the CPU.
#include "launch.h"

namespace fused_res::cpu {
namespace {

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

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) { m.impl("bn_act", TORCH_BOX(&bn_act)); }

}  // namespace
}  // namespace fused_res::cpu
