// bn_act_backward on a GPU: reduce, finalize, apply.
#include "bn_act_backward.cuh"
#include "tensors.cuh"

namespace fused_res::cuda {
namespace {

Relu relu_of(const OptionalTensor& signs, const OptionalTensor& y2) {
  return y2 ? Relu::kOuterTwo : signs ? Relu::kOuter : Relu::kInner;
}

Tensor reduce_op(const Tensor& dout, const Tensor& y, const Tensor& vectors, const OptionalTensor& signs,
                 const OptionalTensor& y2, const OptionalTensor& vectors2) {
  check_bn_act_backward_reduce(dout, y, vectors, signs, y2, vectors2);
  const Layout layout = layout_of("y", y);
  const Tiles tiles = row_tiles(layout.rows, layout.channels);
  const OnDevice device(y);
  const Tensor partials = new_tensor(vectors, {tiles.count, y2 ? 3 : 2, layout.channels});
  bn_act_backward_reduce({data(dout), data(y), floats(vectors), bytes(signs), data(y2), floats(vectors2),
                          static_cast<float*>(output(partials)), tiles.rows, layout},
                         number_of("y", y), relu_of(signs, y2), tiles.count, device.queue());
  return partials;
}

Tensor finalize_op(const Tensor& partials, std::int64_t row, std::int64_t pixels, const Tensor& vectors,
                   const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual_scale,
                   bool training) {
  check_bn_act_backward_finalize(partials, row, pixels, vectors, gamma, beta, residual_scale);
  number_of("partials", partials);
  const int channels = channels_of("partials", partials);
  const OnDevice device(partials);
  const Tensor coefficients = new_tensor(vectors, {kCoefficients, channels});
  bn_act_backward_finalize({floats(partials), floats(vectors), parameter(gamma), parameter(beta),
                            parameter(residual_scale), static_cast<float*>(output(coefficients)), partials.size(0),
                            pixels, static_cast<int>(partials.size(1)), static_cast<int>(row), channels, training},
                           device.queue());
  return coefficients;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> apply_op(const Tensor& dout, const Tensor& y, const Tensor& vectors,
                                                            const Tensor& coefficients, const OptionalTensor& signs,
                                                            bool training, const OptionalTensor& y2,
                                                            const OptionalTensor& coefficients2, bool training2,
                                                            bool keep_masked) {
  check_bn_act_backward_apply(dout, y, vectors, coefficients, signs, y2, coefficients2);
  const Layout layout = layout_of("y", y);
  const OnDevice device(y);
  const Tensor dy = new_tensor(y, y.sizes());
  OptionalTensor dy2, masked;
  if (y2) dy2 = new_tensor(y, y.sizes());
  if (keep_masked) masked = new_tensor(y, y.sizes());
  bn_act_backward_apply({data(dout),
                         floats(vectors),
                         bytes(signs),
                         {data(y), floats(coefficients), output(dy), training},
                         {data(y2), floats(coefficients2), output(dy2), training2},
                         output(masked),
                         layout},
                        number_of("y", y), relu_of(signs, y2), device.queue());
  return {dy, dy2, masked};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) {
  m.impl("bn_act_backward_reduce", TORCH_BOX(&reduce_op));
  m.impl("bn_act_backward_finalize", TORCH_BOX(&finalize_op));
  m.impl("bn_act_backward_apply", TORCH_BOX(&apply_op));
}

}  // namespace
}  // namespace fused_res::cuda
