// Schemas of the primitives. The Python files of fused_res/primitives say what each one means; the implementations
// register themselves per device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fused_res, m) {
  m.def("bn_stats(Tensor y) -> (Tensor, int)");
  m.def(
      "bn_finalize(Tensor partials, int rows, int pixels, Tensor? gamma, Tensor? beta, float eps, "
      "Tensor? residual_scale) -> Tensor");
  m.def(
      "bn_act(Tensor y, Tensor vectors, Tensor? skip, Tensor? y2, Tensor? vectors2, bool keep_signs) -> "
      "(Tensor, Tensor?)");
  m.def(
      "bn_act_backward_reduce(Tensor dout, Tensor y, Tensor vectors, Tensor? signs, Tensor? y2, Tensor? vectors2) -> "
      "Tensor");
  m.def(
      "bn_act_backward_finalize(Tensor partials, int row, int pixels, Tensor vectors, Tensor? gamma, Tensor? beta, "
      "Tensor? residual_scale, bool training) -> Tensor");
  m.def(
      "bn_act_backward_apply(Tensor dout, Tensor y, Tensor vectors, Tensor coefficients, Tensor? signs, bool training, "
      "Tensor? y2, Tensor? coefficients2, bool training2, bool keep_masked) -> (Tensor, Tensor?, Tensor?)");
}
