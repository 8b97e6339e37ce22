// bn_act on a GPU.
#include "bn_act.cuh"
#include "tensors.cuh"

namespace fused_res::cuda {
namespace {

std::tuple<Tensor, OptionalTensor> bn_act_op(const Tensor& y, const Tensor& vectors, const OptionalTensor& skip,
                                             const OptionalTensor& y2, const OptionalTensor& vectors2, bool keep_signs,
                                             bool relu) {
  check_bn_act(y, vectors, skip, y2, vectors2, keep_signs, relu);
  const Layout layout = layout_of("y", y);
  const OnDevice device(y);
  const Tensor out = new_tensor(y, y.sizes());
  OptionalTensor signs;
  if (keep_signs) signs = new_tensor(y, {layout.rows, sign_bytes(layout.channels)}, ScalarType::Byte);
  const Shortcut shortcut = skip ? Shortcut::kIdentity : y2 ? Shortcut::kProjection : Shortcut::kNone;
  bn_act({data(y), floats(vectors), skip ? data(skip) : data(y2), floats(vectors2), output(out),
          static_cast<std::uint8_t*>(output(signs)), layout, relu},
         number_of("y", y), shortcut, device.queue());
  return {out, signs};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("bn_act", TORCH_BOX(&bn_act_op)); }

}  // namespace
}  // namespace fused_res::cuda
