// Tensors for results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>

namespace fused_res {

// Like torch::stable::new_empty, which looks for the operator by its name at each call: that takes as long as a small
// kernel.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like,
                                        torch::headeronly::IntHeaderOnlyArrayRef shape,
                                        std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::int32_t code = 0, layout = 0, device = 0, index = 0;
  if (dtype) {
    code = to<std::int32_t>(from(*dtype));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<std::int64_t>(shape.size()),
                                                   &code, &layout, &device, index, nullptr, &made));
  return torch::stable::Tensor(made);
}

}  // namespace fused_res
