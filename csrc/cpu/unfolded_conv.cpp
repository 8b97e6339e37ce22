// Convolutions of few pixels on the CPU, as products with the windows that they read; the products are the library's.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../operand_checks.h"
#include "images.h"
#include "products.h"
#include "windows.h"

namespace fused_res::cpu {
namespace {

struct Geometry {
  int64_t down, right, pad_down, pad_right, dilation_down, dilation_right;
};

Windows windows_of(int64_t images, int64_t channels, int64_t image_height, int64_t image_width, int64_t height,
                   int64_t width, const Geometry& g) {
  const Windows w{{height, g.down, g.pad_down, g.dilation_down, image_height},
                  {width, g.right, g.pad_right, g.dilation_right, image_width},
                  images,
                  channels};
  check_windows(w);
  return w;
}

// A matrix in memory of a tensor that outlives it.
Tensor matrix(const Tensor& of, const void* first, int64_t rows, int64_t columns, int64_t row_step,
              int64_t column_step) {
  return torch::stable::from_blob(const_cast<void*>(first), {rows, columns}, {row_step, column_step}, of.device(),
                                  of.scalar_type());
}

Tensor by_tap(const Tensor& weight, bool transposed) {
  const int64_t out = weight.size(0), depth = weight.numel() / out;
  return transposed ? matrix(weight, data(weight), depth, out, 1, depth)
                    : matrix(weight, data(weight), out, depth, depth, 1);
}

// out = a b, or the sum of that and what is there.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool onto = false) {
  if (onto) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// Memory for windows: that of the thread where they are few.
class Unfolded {
 public:
  Unfolded(const Tensor& like, int64_t rows, int64_t columns) : rows_(rows), columns_(columns), like_(like) {
    constexpr int64_t few = 1024 * 1024;
    const int64_t bytes = std::max<int64_t>(rows * columns, 1) * static_cast<int64_t>(like.element_size());
    memory_ = (bytes <= few ? partial_memory : own_).get(bytes);
  }

  void* get() const { return memory_; }
  // The first rows of them.
  Tensor tensor(int64_t rows) const { return matrix(like_, memory_, rows, columns_, columns_, 1); }
  Tensor tensor() const { return tensor(rows_); }

 private:
  int64_t rows_, columns_;
  const Tensor& like_;
  Memory own_;
  void* memory_;
};

void check_pair(const Tensor& image, const char* name, const Tensor& other) {
  check_channels_last(name, other);
  check_dtype(name, other, image.scalar_type());
  check_device(name, other, image);
}

// [P, K].
Tensor fprop(const Tensor& x, const Tensor& weight, int64_t down, int64_t right, int64_t pad_down, int64_t pad_right,
             int64_t dilation_down, int64_t dilation_right) {
  check_channels_last("x", x);
  check_pair(x, "weight", weight);
  STD_TORCH_CHECK(weight.size(1) == x.size(1) && weight.size(0) >= 1, "weight: expected ", x.size(1),
                  " channels and at least one output, got shape ", shape_string(weight.sizes().data(), 4));
  const Windows w = windows_of(x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2), weight.size(3),
                               {down, right, pad_down, pad_right, dilation_down, dilation_right});
  const int64_t pixels = w.images * w.each();
  const Tensor y = new_tensor(x, {pixels, weight.size(0)});
  const Unfolded windows(x, pixels, w.taps() * w.channels);
  unfold(w, data(x), x.element_size(), windows.get());
  multiply(y, windows.tensor(), by_tap(weight, true));
  return y;
}

// [N, H, W, C].
Tensor dgrad(const Tensor& dy, const Tensor& weight, int64_t height, int64_t width, int64_t down, int64_t right,
             int64_t pad_down, int64_t pad_right, int64_t dilation_down, int64_t dilation_right) {
  check_channels_last("dy", dy);
  // Sums of 16-bit numbers would be rounded at each step.
  const bool wide = dy.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || dy.scalar_type() == ScalarType::Float, "dy: expected float32 or float64, got ",
                  torch::headeronly::toString(dy.scalar_type()));
  check_pair(dy, "weight", weight);
  const Windows w = windows_of(dy.size(0), weight.size(1), height, width, weight.size(2), weight.size(3),
                               {down, right, pad_down, pad_right, dilation_down, dilation_right});
  STD_TORCH_CHECK(dy.size(1) == weight.size(0) && dy.size(2) == w.rows.windows() && dy.size(3) == w.columns.windows(),
                  "dy: expected [N, ", weight.size(0), ", ", w.rows.windows(), ", ", w.columns.windows(),
                  "], got shape ", shape_string(dy.sizes().data(), 4));
  const int64_t pixels = w.images * w.each(), out = weight.size(0);
  const Tensor dx = new_tensor(dy, {w.images, height, width, w.channels});
  const Unfolded windows(dy, pixels, w.taps() * w.channels);
  multiply(windows.tensor(), matrix(dy, data(dy), pixels, out, out, 1), by_tap(weight, false));
  if (wide) {
    fold(w, static_cast<const double*>(windows.get()), static_cast<double*>(output(dx)));
  } else {
    fold(w, static_cast<const float*>(windows.get()), static_cast<float*>(output(dx)));
  }
  return dx;
}

// [K, R, S, C], from as many images at a time as there are bytes for their windows.
Tensor wgrad(const Tensor& dy, const Tensor& x, int64_t height, int64_t width, int64_t down, int64_t right,
             int64_t pad_down, int64_t pad_right, int64_t dilation_down, int64_t dilation_right, int64_t bytes) {
  check_channels_last("dy", dy);
  check_pair(dy, "x", x);
  Windows w = windows_of(x.size(0), x.size(1), x.size(2), x.size(3), height, width,
                         {down, right, pad_down, pad_right, dilation_down, dilation_right});
  STD_TORCH_CHECK(dy.size(0) == w.images && dy.size(2) == w.rows.windows() && dy.size(3) == w.columns.windows(),
                  "dy: expected [", w.images, ", K, ", w.rows.windows(), ", ", w.columns.windows(), "], got shape ",
                  shape_string(dy.sizes().data(), 4));
  const int64_t images = w.images, out = dy.size(1), depth = w.taps() * w.channels;
  const int64_t size = static_cast<int64_t>(x.element_size());
  const int64_t some = std::clamp<int64_t>(bytes / (w.each() * depth * size), 1, std::max<int64_t>(images, 1));
  const Tensor dweight = new_tensor(x, {out, height, width, w.channels});
  const Unfolded windows(x, some * w.each(), depth);
  const Tensor sum = matrix(dweight, data(dweight), out, depth, depth, 1);
  for (int64_t first = 0; first < std::max<int64_t>(images, 1); first += some) {
    w.images = std::min(some, images - first);
    const int64_t pixels = w.images * w.each();
    unfold(w, static_cast<const char*>(data(x)) + first * (x.numel() / std::max<int64_t>(images, 1)) * size,
           x.element_size(), windows.get());
    const char* rows = static_cast<const char*>(data(dy)) + first * w.each() * out * size;
    multiply(sum, matrix(dy, rows, out, pixels, 1, out), windows.tensor(pixels), first > 0);
  }
  return dweight;
}

// relu(scale * y + shift [+ skip]), or that without the ReLU, [P, K], on panels of the weight as [K, R*S*C].
Tensor bn_act(const Tensor& x, const Tensor& panels, int64_t channels, int64_t height, int64_t width, int64_t down,
              int64_t right, int64_t pad_down, int64_t pad_right, int64_t dilation_down, int64_t dilation_right,
              const Tensor& vectors, const OptionalTensor& skip, bool relu) {
  check_channels_last("x", x);
  const Windows w = windows_of(x.size(0), x.size(1), x.size(2), x.size(3), height, width,
                               {down, right, pad_down, pad_right, dilation_down, dilation_right});
  const int64_t pixels = w.images * w.each(), depth = w.taps() * w.channels;
  const Unfolded windows(x, pixels, depth);
  unfold(w, data(x), x.element_size(), windows.get());
  const Tensor rows = torch::stable::from_blob(windows.get(), {1, 1, pixels, depth},
                                               {pixels * depth, pixels * depth, depth, 1}, x.device(), x.scalar_type());
  return pointwise_bn_act(rows, panels, channels, 1, 1, vectors, skip, relu);
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  implement(m, "unfolded_fprop", TORCH_BOX(&fprop));
  implement(m, "folded_dgrad", TORCH_BOX(&dgrad));
  implement(m, "unfolded_wgrad", TORCH_BOX(&wgrad));
  implement(m, "unfolded_bn_act", TORCH_BOX(&bn_act));
}

}  // namespace
}  // namespace fused_res::cpu
