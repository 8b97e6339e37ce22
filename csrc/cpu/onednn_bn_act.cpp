// oneDNN's convolution with a shift and a shortcut, as torch.compile calls it, and the ReLU. By the functions of C with
// which AOTInductor's programs call it: strings and scalars, which the operator takes, have no place in the stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "images.h"
#include "windows.h"

// As torch/csrc/inductor/aoti_torch/c/shim_cpu.h declares them, which cannot be included beside the stable ABI;
// tests/test_onednn_bn_act.py compares. They are missing where torch was built without oneDNN.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise(
    AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const int64_t* padding, int64_t padding_len_,
    const int64_t* stride, int64_t stride_len_, const int64_t* dilation, int64_t dilation_len_, int64_t groups,
    const char* attr, const double** scalars, int64_t scalars_len_, const char** algorithm, AtenTensorHandle* ret0);

__attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
    AtenTensorHandle X, AtenTensorHandle other, AtenTensorHandle W, AtenTensorHandle* B, const int64_t* padding,
    int64_t padding_len_, const int64_t* stride, int64_t stride_len_, const int64_t* dilation, int64_t dilation_len_,
    int64_t groups, const char* binary_attr, double* alpha, const char** unary_attr, const double** unary_scalars,
    int64_t unary_scalars_len_, const char** unary_algorithm, AtenTensorHandle* ret0);

__attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise_binary_(
    AtenTensorHandle other, AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const int64_t* padding,
    int64_t padding_len_, const int64_t* stride, int64_t stride_len_, const int64_t* dilation, int64_t dilation_len_,
    int64_t groups, const char* binary_attr, double* alpha, const char** unary_attr, const double** unary_scalars,
    int64_t unary_scalars_len_, const char** unary_algorithm, AtenTensorHandle* ret0);
}

namespace fused_res::cpu {
namespace {

int64_t size(const std::vector<int64_t>& pair) { return static_cast<int64_t>(pair.size()); }

struct Geometry {
  const std::vector<int64_t>&padding, &stride, &dilation;
  int64_t groups;
};

bool has_onednn() {
  return aoti_torch_cpu_mkldnn__convolution_pointwise != nullptr &&
         aoti_torch_cpu_mkldnn__convolution_pointwise_binary != nullptr &&
         aoti_torch_cpu_mkldnn__convolution_pointwise_binary_ != nullptr;
}

// The weight may be in an order of oneDNN's own, which nobody else can read.
void check(const Tensor& x, const Tensor& weight, const Tensor& shift, const OptionalTensor& skip, const Geometry& g) {
  STD_TORCH_CHECK(has_onednn(), "onednn_bn_act: this torch has no convolutions of oneDNN's");
  check_channels_last("x", x);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= 1 && g.groups >= 1 && weight.size(0) % g.groups == 0 &&
                      weight.size(1) * g.groups == x.size(1),
                  "weight: expected [K, ", x.size(1), " / groups, R, S], got shape ",
                  shape_string(weight.sizes().data(), weight.dim()));
  check_dtype("weight", weight, x.scalar_type());
  fused_res::check("shift", shift, {weight.size(0)}, x.scalar_type(), x);
  STD_TORCH_CHECK(size(g.padding) == 2 && size(g.stride) == 2 && size(g.dilation) == 2,
                  "padding, stride and dilation: expected pairs");
  const Steps rows{weight.size(2), g.stride[0], g.padding[0], g.dilation[0], x.size(2)};
  const Steps columns{weight.size(3), g.stride[1], g.padding[1], g.dilation[1], x.size(3)};
  check_steps(rows);
  check_steps(columns);
  if (!skip) return;
  check_channels_last("skip", *skip);
  check_dtype("skip", *skip, x.scalar_type());
  check_shape("skip", *skip, {x.size(0), weight.size(0), rows.windows(), columns.windows()});
}

void check_status(AOTITorchError status) {
  // The library prints what went wrong.
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "onednn_bn_act: oneDNN's convolution failed");
}

void apply_relu(const Tensor& image) {
  check_channels_last("out", image);
  run_rows(kernels().relu[dtype_of(image)], Relu{image.size(1), output(image)},
           image.numel() / std::max<int64_t>(image.size(1), 1));
}

Tensor alone(const Tensor& x, const Tensor& weight, const Tensor& shift, const Geometry& s) {
  AtenTensorHandle bias = shift.get(), made = nullptr;
  const char* algorithm = "";
  check_status(aoti_torch_cpu_mkldnn__convolution_pointwise(
      x.get(), weight.get(), &bias, s.padding.data(), size(s.padding), s.stride.data(), size(s.stride),
      s.dilation.data(), size(s.dilation), s.groups, "none", nullptr, 0, &algorithm, &made));
  return Tensor(made);
}

// onto: whether the shortcut is written to.
Tensor added(const Tensor& x, const Tensor& weight, const Tensor& shift, const Tensor& skip, const Geometry& s,
             bool onto) {
  AtenTensorHandle bias = shift.get(), made = nullptr;
  double alpha = 1;
  if (onto) {
    check_status(aoti_torch_cpu_mkldnn__convolution_pointwise_binary_(
        skip.get(), x.get(), weight.get(), &bias, s.padding.data(), size(s.padding), s.stride.data(), size(s.stride),
        s.dilation.data(), size(s.dilation), s.groups, "add", &alpha, nullptr, nullptr, 0, nullptr, &made));
  } else {
    check_status(aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
        x.get(), skip.get(), weight.get(), &bias, s.padding.data(), size(s.padding), s.stride.data(), size(s.stride),
        s.dilation.data(), size(s.dilation), s.groups, "add", &alpha, nullptr, nullptr, 0, nullptr, &made));
  }
  return Tensor(made);
}

Tensor onednn_bn_act(const Tensor& x, const Tensor& weight, const Tensor& shift, const OptionalTensor& skip,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& dilation, int64_t groups, bool relu) {
  const Geometry steps{padding, stride, dilation, groups};
  check(x, weight, shift, skip, steps);
  const Tensor out = skip ? added(x, weight, shift, *skip, steps, false) : alone(x, weight, shift, steps);
  if (relu) apply_relu(out);
  return out;
}

void onednn_bn_act_onto(const Tensor& skip, const Tensor& x, const Tensor& weight, const Tensor& shift,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& dilation, int64_t groups, bool relu) {
  const Geometry steps{padding, stride, dilation, groups};
  check(x, weight, shift, skip, steps);
  added(x, weight, shift, skip, steps, true);
  if (relu) apply_relu(skip);
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "onednn_bn_act", TORCH_BOX(&onednn_bn_act));
  implement(m, "onednn_bn_act_", TORCH_BOX(&onednn_bn_act_onto));
}
// The weight is in oneDNN's own order.
STABLE_TORCH_LIBRARY_IMPL(fused_res, MkldnnCPU, m) {
  m.impl("onednn_bn_act", TORCH_BOX(&onednn_bn_act));
  m.impl("onednn_bn_act_", TORCH_BOX(&onednn_bn_act_onto));
}

extern "C" __attribute__((visibility("default"))) bool fused_res_has_onednn() { return has_onednn(); }

}  // namespace
}  // namespace fused_res::cpu
