// Schemas of the primitives. The Python files of fused_res/primitives say what each one means; the implementations
// register themselves per device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fused_res, m) {
  m.def("bn_stats(Tensor y) -> (Tensor, int)");
  m.def(
      "bn_finalize(Tensor partials, int rows, int pixels, Tensor? gamma, Tensor? beta, float eps, "
      "Tensor? residual_scale) -> Tensor");
  m.def(
      "move_statistics(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counts, Tensor[] vectors, int[] "
      "pixels, "
      "float[] momenta) -> ()");
  m.def(
      "bn_act(Tensor y, Tensor vectors, Tensor? skip, Tensor? y2, Tensor? vectors2, bool keep_signs, bool relu=True) "
      "-> "
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
  m.def("bn_stats_finalize(Tensor y, Tensor? gamma, Tensor? beta, float eps, Tensor? residual_scale) -> Tensor");
  m.def(
      "bn_stats_act(Tensor y, Tensor? gamma, Tensor? beta, float eps, Tensor? residual_scale, Tensor? skip, Tensor? "
      "y2, "
      "Tensor? vectors2, bool keep_signs, bool relu) -> (Tensor, Tensor, Tensor?)");
  m.def(
      "bn_act_backward(Tensor dout, Tensor y, Tensor vectors, Tensor? gamma, Tensor? beta, Tensor? residual_scale, "
      "Tensor? signs, bool training) -> (Tensor, Tensor)");
  m.def(
      "im2col(Tensor x, int height, int width, int down, int right, int pad_down, int pad_right, int dilation_down, "
      "int dilation_right) -> Tensor");
  m.def(
      "col2im(Tensor windows, int image_height, int image_width, int height, int width, int down, int right, "
      "int pad_down, int pad_right, int dilation_down, int dilation_right) -> Tensor");
  m.def(
      "unfolded_fprop(Tensor x, Tensor weight, int down, int right, int pad_down, int pad_right, int dilation_down, "
      "int dilation_right) -> Tensor");
  m.def(
      "folded_dgrad(Tensor dy, Tensor weight, int image_height, int image_width, int down, int right, int pad_down, "
      "int pad_right, int dilation_down, int dilation_right) -> Tensor");
  m.def(
      "unfolded_wgrad(Tensor dy, Tensor x, int height, int width, int down, int right, int pad_down, int pad_right, "
      "int dilation_down, int dilation_right, int bytes) -> Tensor");
  m.def(
      "unfolded_bn_act(Tensor x, Tensor panels, int channels, int height, int width, int down, int right, int "
      "pad_down, "
      "int pad_right, int dilation_down, int dilation_right, Tensor vectors, Tensor? skip, bool relu) -> Tensor");
  m.def(
      "onednn_bn_act(Tensor x, Tensor weight, Tensor shift, Tensor? skip, int[] padding, int[] stride, int[] dilation, "
      "int groups, bool relu) -> Tensor");
  m.def(
      "onednn_bn_act_(Tensor(a!) skip, Tensor x, Tensor weight, Tensor shift, int[] padding, int[] stride, int[] "
      "dilation, int groups, bool relu) -> ()");
  m.def(
      "max_pool(Tensor x, int height, int width, int down, int right, int pad_down, int pad_right, int dilation_down, "
      "int dilation_right, bool ceil_mode) -> Tensor");
  m.def("masked_add(Tensor(a!) dx, Tensor addend, Tensor? signs, int down, int right) -> ()");
  m.def("moments(Tensor z, Tensor? z_vectors, int down, int right) -> (Tensor, Tensor)");
  m.def(
      "moments_finalize(Tensor mean, Tensor covariance, Tensor weight, Tensor? gamma, Tensor? beta, float eps, "
      "Tensor? residual_scale, float ratio, Tensor? direct) -> (Tensor, Tensor, int)");
  m.def(
      "moments_finalize_direct(Tensor mean, Tensor covariance, Tensor z, Tensor? z_vectors, int down, int right, bool "
      "tf32, Tensor weight, Tensor? gamma, Tensor? beta, float eps, Tensor? residual_scale, float ratio) -> (Tensor, "
      "Tensor)");
  m.def("scaled_weight(Tensor weight, Tensor? vectors, bool tf32) -> Tensor");
  m.def(
      "pointwise_tail(Tensor z, Tensor? z_vectors, int down, int right, Tensor weight, Tensor vectors, Tensor? skip, "
      "Tensor? y2, Tensor? x, Tensor? x_vectors, int x_down, int x_right, Tensor? weight2, Tensor? vectors2, "
      "bool keep_signs) -> (Tensor, Tensor?)");
  m.def(
      "pointwise_tail_backward_reduce(Tensor dout, Tensor signs, Tensor z, Tensor? z_vectors, int down, int right, "
      "Tensor? mean, Tensor? scaled) -> (Tensor, Tensor, Tensor?)");
  m.def(
      "pointwise_tail_backward_finalize(Tensor total, Tensor product, int pixels, Tensor? covariance, Tensor weight, "
      "Tensor vectors, Tensor? scaled, Tensor? gamma, Tensor? beta, Tensor? residual_scale, float ratio, "
      "Tensor? direct) -> (Tensor, Tensor, Tensor?, Tensor?, Tensor?, int)");
  m.def(
      "pointwise_tail_backward_finalize_direct(Tensor total, Tensor product, Tensor dout, Tensor signs, Tensor z, "
      "Tensor? z_vectors, int down, int right, bool tf32, Tensor? mean, Tensor? covariance, Tensor? suspect, Tensor "
      "weight, Tensor vectors, Tensor? scaled, Tensor? gamma, Tensor? beta, Tensor? residual_scale, float ratio) -> "
      "(Tensor, Tensor, Tensor?, Tensor?)");
  m.def(
      "pointwise_tail_backward_apply(Tensor(a!) dz, Tensor? through, Tensor dout, Tensor signs, Tensor z, Tensor? "
      "z_vectors, "
      "int down, int right, Tensor scaled, Tensor? mean, Tensor? quadratic, Tensor? constant, bool inner, "
      "bool joins) -> Tensor?");
  m.def(
      "pointwise_fprop(Tensor x, Tensor? x_vectors, int down, int right, Tensor weight, bool statistics) -> "
      "(Tensor, Tensor?, int)");
  m.def(
      "pointwise_dgrad(Tensor dy, Tensor? y, Tensor? vectors, Tensor? coefficients, Tensor? signs, bool training, "
      "Tensor weight, Tensor? inner, Tensor? inner_vectors, Tensor? addend, Tensor? addend_signs, int down, int right) "
      "-> "
      "(Tensor, Tensor?)");
  m.def(
      "pointwise_wgrad(Tensor dy, Tensor? y, Tensor? vectors, Tensor? coefficients, Tensor? signs, bool training, "
      "Tensor x, Tensor? x_vectors, int down, int right) -> Tensor");
  m.def(
      "winograd_fprop(Tensor x, Tensor? x_vectors, Tensor weight, int down, int right, bool statistics, "
      "Tensor? vectors, Tensor? skip, Tensor? y2, Tensor? vectors2) -> (Tensor, Tensor?, int)");
  m.def(
      "winograd_dgrad(Tensor dy, Tensor? y, Tensor? vectors, Tensor? coefficients, Tensor? signs, bool training, "
      "Tensor weight, int down, int right, Tensor? inner, Tensor? inner_vectors, Tensor? addend, "
      "Tensor? addend_signs, int addend_down, int addend_right) -> (Tensor, Tensor?)");
  m.def(
      "winograd_wgrad(Tensor dy, Tensor? y, Tensor? vectors, Tensor? coefficients, Tensor? signs, bool training, "
      "Tensor x, Tensor? x_vectors, int down, int right) -> Tensor");
  m.def("winograd_prepare(Tensor weight) -> Tensor");
  m.def(
      "winograd_bn_act(Tensor x, Tensor points, int channels, int down, int right, Tensor vectors, Tensor? skip) -> "
      "Tensor");
  m.def("pointwise_prepare(Tensor weight) -> Tensor");
  m.def(
      "pointwise_bn_act(Tensor x, Tensor panels, int channels, int down, int right, Tensor vectors, Tensor? skip, bool "
      "relu=True) -> Tensor");
  m.def("make_program(str names, int[] code, float[] numbers) -> int");
  m.def("run_program(int program, Tensor[] inputs, int stream=0) -> Tensor[]");
  // One after the other: each gets what the one before has returned, x the first, and so many of the tensors.
  m.def("run_programs(int[] programs, int[] counts, Tensor x, Tensor[] tensors) -> Tensor");
}
