// im2col and col2im on the CPU: images as the windows that a convolution reads, and the sum of windows back.
#include "../operand_checks.h"
#include "windows.h"

namespace fused_res::cpu {
namespace {

Tensor im2col(const Tensor& x, int64_t height, int64_t width, int64_t down, int64_t right, int64_t pad_down,
              int64_t pad_right, int64_t dilation_down, int64_t dilation_right) {
  check_image("x", x);
  const Windows w{{height, down, pad_down, dilation_down, x.size(1)},
                  {width, right, pad_right, dilation_right, x.size(2)},
                  x.size(0),
                  x.size(3)};
  check_windows(w);
  const Tensor windows = new_tensor(x, {w.images * w.each(), w.taps() * w.channels});
  unfold(w, data(x), x.element_size(), output(windows));
  return windows;
}

Tensor col2im(const Tensor& windows, int64_t image_height, int64_t image_width, int64_t height, int64_t width,
              int64_t down, int64_t right, int64_t pad_down, int64_t pad_right, int64_t dilation_down,
              int64_t dilation_right) {
  check_rows("windows", windows);
  const bool wide = windows.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || windows.scalar_type() == ScalarType::Float, "windows: expected float32 or float64, got ",
                  torch::headeronly::toString(windows.scalar_type()));
  Windows w{{height, down, pad_down, dilation_down, image_height},
            {width, right, pad_right, dilation_right, image_width},
            0,
            1};
  check_windows(w);
  STD_TORCH_CHECK(windows.size(0) % w.each() == 0, "windows: expected ", w.each(), " rows for each image, got ",
                  windows.size(0));
  STD_TORCH_CHECK(windows.size(1) >= 1 && windows.size(1) % w.taps() == 0, "windows: expected channels for each of ",
                  w.taps(), " taps, got ", windows.size(1), " columns");
  w.images = windows.size(0) / w.each();
  w.channels = windows.size(1) / w.taps();
  check_windows(w);
  const Tensor image = new_tensor(windows, {w.images, image_height, image_width, w.channels});
  if (wide) {
    fold(w, static_cast<const double*>(data(windows)), static_cast<double*>(output(image)));
  } else {
    fold(w, static_cast<const float*>(data(windows)), static_cast<float*>(output(image)));
  }
  return image;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "im2col", TORCH_BOX(&im2col));
  implement(m, "col2im", TORCH_BOX(&col2im));
}

}  // namespace
}  // namespace fused_res::cpu
