// max_pool on the CPU, without the places of the maxima.
#include "../operand_checks.h"
#include "windows.h"

namespace fused_res::cpu {
namespace {

// As torch's: with `ceil` a window may reach beyond the padding, but does not start there.
PoolSteps steps_of(int64_t size, int64_t taps, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  check_numbers({taps, stride, padding, dilation, size});
  STD_TORCH_CHECK(padding <= (dilation * (taps - 1) + 1) / 2, "padding: expected at most half of the window, got ",
                  padding);
  // Where the last window may start, from the first on; below 0 where the window is larger than the padded image.
  const int64_t room = size + 2 * padding - dilation * (taps - 1) - 1 + (ceil ? stride - 1 : 0);
  int64_t windows = room < 0 ? 0 : room / stride + 1;
  if (ceil && (windows - 1) * stride >= size + padding) --windows;
  STD_TORCH_CHECK(windows >= 1, "kernel: expected no more than the padded image");
  return {taps, stride, padding, dilation, size, windows};
}

Tensor max_pool(const Tensor& x, int64_t height, int64_t width, int64_t down, int64_t right, int64_t pad_down,
                int64_t pad_right, int64_t dilation_down, int64_t dilation_right, bool ceil) {
  check_image("x", x);
  const PoolSteps rows = steps_of(x.size(1), height, down, pad_down, dilation_down, ceil);
  const PoolSteps columns = steps_of(x.size(2), width, right, pad_right, dilation_right, ceil);
  elements({x.size(0), rows.windows, columns.windows, x.size(3)});
  const Tensor out = new_tensor(x, {x.size(0), rows.windows, columns.windows, x.size(3)});
  run_rows(kernels().max_pool[dtype_of(x)], MaxPool{x.size(3), rows, columns, data(x), output(out)},
           x.size(0) * rows.windows * columns.windows);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) { implement(m, "max_pool", TORCH_BOX(&max_pool)); }

}  // namespace
}  // namespace fused_res::cpu
