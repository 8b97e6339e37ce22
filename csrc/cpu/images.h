// Images as torch's convolutions take them.
#pragma once

#include "launch.h"

namespace fused_res::cpu {

// Images [N, C, H, W] that lie in memory as [N, H, W, C].
inline void check_channels_last(const char* name, const Tensor& image) {
  STD_TORCH_CHECK(image.dim() == 4, name, ": expected images [N, C, H, W], got ", image.dim(), " dimensions");
  STD_TORCH_CHECK(is_floating_point(image.scalar_type()), name,
                  ": expected float32, float16, bfloat16 or float64, got ",
                  torch::headeronly::toString(image.scalar_type()));
  STD_TORCH_CHECK(image.size(1) >= 1, name, ": expected at least one channel, got none");
  int64_t step = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(image.size(d) <= 1 || image.numel() == 0 || image.stride(d) == step, name,
                    ": expected channels_last");
    step *= image.size(d);
  }
  int64_t stored = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(image.get(), &stored));
  STD_TORCH_CHECK((image.storage_offset() + image.numel()) * static_cast<int64_t>(image.element_size()) <= stored, name,
                  ": its storage is too small for its shape");
}

}  // namespace fused_res::cpu
