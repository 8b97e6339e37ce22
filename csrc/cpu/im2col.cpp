// im2col and col2im on the CPU: images as the windows that a convolution reads, and the sum of windows back.
#include <cstring>

#include "../operand_checks.h"
#include "launch.h"

namespace fused_res::cpu {
namespace {

// One direction of a convolution's geometry.
struct Steps {
  int64_t taps, stride, padding, dilation, size;

  int64_t windows() const { return (size + 2 * padding - dilation * (taps - 1) - 1) / stride + 1; }
};

// Where a window's tap lies in the image; outside for padding.
int64_t place(const Steps& steps, int64_t window, int64_t tap) {
  return window * steps.stride - steps.padding + tap * steps.dilation;
}

// How many elements that is, in all.
int64_t elements(std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(total, size, &total) && total < int64_t{1} << 60,
                    "kernel and sizes: expected fewer elements");
  }
  return total;
}

void check_steps(const Steps& steps) {
  constexpr int64_t most = int64_t{1} << 24;
  STD_TORCH_CHECK(steps.taps >= 1 && steps.stride >= 1 && steps.dilation >= 1 && steps.padding >= 0 && steps.size >= 1,
                  "kernel, stride and dilation: expected at least 1, and a padding of at least 0");
  STD_TORCH_CHECK(std::max({steps.taps, steps.stride, steps.dilation, steps.padding, steps.size}) <= most,
                  "kernel, stride, padding, dilation and sizes: expected at most ", most);
  STD_TORCH_CHECK(steps.size + 2 * steps.padding >= steps.dilation * (steps.taps - 1) + 1,
                  "kernel: expected no more than the padded image");
}

Tensor im2col(const Tensor& x, int64_t height, int64_t width, int64_t down, int64_t right, int64_t pad_down,
              int64_t pad_right, int64_t dilation_down, int64_t dilation_right) {
  check_image("x", x);
  const Steps rows{height, down, pad_down, dilation_down, x.size(1)};
  const Steps columns{width, right, pad_right, dilation_right, x.size(2)};
  check_steps(rows);
  check_steps(columns);
  const int64_t across = columns.windows(), pixels = elements({x.size(0), rows.windows(), across});
  const size_t bytes = static_cast<size_t>(x.size(3)) * x.element_size();
  elements({pixels, height, width, x.size(3)});
  const Tensor windows = new_tensor(x, {pixels, height * width * x.size(3)});
  const char* from = static_cast<const char*>(data(x));
  char* to = static_cast<char*>(output(windows));
  const int64_t grain = std::max<int64_t>(1, kGrain / (height * width * x.size(3)));
  torch::stable::parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = p / (rows.windows() * across), at = p / across % rows.windows();
      char* tap = to + p * height * width * bytes;
      for (int64_t r = 0; r < height; ++r) {
        const int64_t line = place(rows, at, r);
        for (int64_t s = 0; s < width; ++s, tap += bytes) {
          const int64_t pixel = place(columns, p % across, s);
          if (line < 0 || line >= rows.size || pixel < 0 || pixel >= columns.size) {
            std::memset(tap, 0, bytes);
          } else {
            std::memcpy(tap, from + ((n * rows.size + line) * columns.size + pixel) * bytes, bytes);
          }
        }
      }
    }
  });
  return windows;
}

// One pixel of the image: the sum of what the windows that read it have at the tap with which they do.
template <class T>
void sum_pixel(const Steps& rows, const Steps& columns, const T* windows, int64_t channels, int64_t n, int64_t line,
               int64_t pixel, T* out) {
  const int64_t width = columns.windows();
  std::fill(out, out + channels, T{0});
  for (int64_t r = 0; r < rows.taps; ++r) {
    const int64_t down = line + rows.padding - r * rows.dilation;
    if (down < 0 || down % rows.stride != 0 || down / rows.stride >= rows.windows()) continue;
    for (int64_t s = 0; s < columns.taps; ++s) {
      const int64_t right = pixel + columns.padding - s * columns.dilation;
      if (right < 0 || right % columns.stride != 0 || right / columns.stride >= width) continue;
      const int64_t window = (n * rows.windows() + down / rows.stride) * width + right / columns.stride;
      const T* add = windows + ((window * rows.taps + r) * columns.taps + s) * channels;
      for (int64_t c = 0; c < channels; ++c) out[c] += add[c];
    }
  }
}

Tensor col2im(const Tensor& windows, int64_t image_height, int64_t image_width, int64_t height, int64_t width,
              int64_t down, int64_t right, int64_t pad_down, int64_t pad_right, int64_t dilation_down,
              int64_t dilation_right) {
  check_rows("windows", windows);
  const bool wide = windows.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || windows.scalar_type() == ScalarType::Float, "windows: expected float32 or float64, got ",
                  torch::headeronly::toString(windows.scalar_type()));
  const Steps rows{height, down, pad_down, dilation_down, image_height};
  const Steps columns{width, right, pad_right, dilation_right, image_width};
  check_steps(rows);
  check_steps(columns);
  const int64_t taps = height * width, each = rows.windows() * columns.windows();
  STD_TORCH_CHECK(windows.size(0) % each == 0, "windows: expected ", each, " rows for each image, got ",
                  windows.size(0));
  STD_TORCH_CHECK(windows.size(1) >= 1 && windows.size(1) % taps == 0, "windows: expected channels for each of ", taps,
                  " taps, got ", windows.size(1), " columns");
  const int64_t channels = windows.size(1) / taps, images = windows.size(0) / each;
  elements({images, image_height, image_width, channels});
  const Tensor image = new_tensor(windows, {images, image_height, image_width, channels});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(data(windows));
    T* to = static_cast<T*>(output(image));
    const int64_t grain = std::max<int64_t>(1, kGrain / (taps * channels));
    torch::stable::parallel_for(0, images * image_height * image_width, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t line = p / image_width;
        sum_pixel(rows, columns, from, channels, line / image_height, line % image_height, p % image_width,
                  to + p * channels);
      }
    });
  };
  if (wide) {
    run(double{});
  } else {
    run(float{});
  }
  return image;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) {
  m.impl("im2col", TORCH_BOX(&im2col));
  m.impl("col2im", TORCH_BOX(&col2im));
}

}  // namespace
}  // namespace fused_res::cpu
