// The windows that a convolution reads of an image, and the sum of windows back.
#pragma once

#include <cstring>

#include "launch.h"

namespace fused_res::cpu {

// One direction of a convolution's geometry.
struct Steps {
  int64_t taps, stride, padding, dilation, size;

  int64_t windows() const { return (size + 2 * padding - dilation * (taps - 1) - 1) / stride + 1; }
};

// Where a window's tap lies in the image; outside for padding.
inline int64_t place(const Steps& steps, int64_t window, int64_t tap) {
  return window * steps.stride - steps.padding + tap * steps.dilation;
}

// How many elements that is, in all.
inline int64_t elements(std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(total, size, &total) && total < int64_t{1} << 60,
                    "kernel and sizes: expected fewer elements");
  }
  return total;
}

inline void check_numbers(const Steps& steps) {
  constexpr int64_t most = int64_t{1} << 24;
  STD_TORCH_CHECK(steps.taps >= 1 && steps.stride >= 1 && steps.dilation >= 1 && steps.padding >= 0 && steps.size >= 1,
                  "kernel, stride and dilation: expected at least 1, and a padding of at least 0");
  STD_TORCH_CHECK(std::max({steps.taps, steps.stride, steps.dilation, steps.padding, steps.size}) <= most,
                  "kernel, stride, padding, dilation and sizes: expected at most ", most);
}

inline void check_steps(const Steps& steps) {
  check_numbers(steps);
  STD_TORCH_CHECK(steps.size + 2 * steps.padding >= steps.dilation * (steps.taps - 1) + 1,
                  "kernel: expected no more than the padded image");
}

// How a convolution reads images [N, H, W, C].
struct Windows {
  Steps rows, columns;
  int64_t images, channels;

  int64_t each() const { return rows.windows() * columns.windows(); }
  int64_t taps() const { return rows.taps * columns.taps; }
};

inline void check_windows(const Windows& w) {
  check_steps(w.rows);
  check_steps(w.columns);
  elements({w.images, w.each(), w.taps(), w.channels});
  elements({w.images, w.rows.size, w.columns.size, w.channels});
}

// Of the windows along a line, from which on and up to which a tap lies inside of the image.
struct Inside {
  int64_t begin, end;
};

inline Inside inside(const Steps& steps, int64_t tap) {
  const int64_t first = place(steps, 0, tap), count = steps.windows();
  const int64_t begin = first < 0 ? (-first + steps.stride - 1) / steps.stride : 0;
  const int64_t end = first < steps.size ? (steps.size - first - 1) / steps.stride + 1 : 0;
  return {std::min(begin, count), std::clamp<int64_t>(end, std::min(begin, count), count)};
}

// All windows, [N*H'*W', R*S*C]: padding as zeros. `size`: of an element.
inline void unfold(const Windows& w, const void* image, size_t size, void* windows) {
  const int64_t down = w.rows.windows(), across = w.columns.windows(), taps = w.taps();
  const int64_t bytes = w.channels * static_cast<int64_t>(size), line_bytes = w.columns.size * bytes;
  const int64_t grain = std::max<int64_t>(1, kGrain / (across * taps * w.channels));
  torch::stable::parallel_for(0, w.images * down, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* from = static_cast<const char*>(image) + i / down * w.rows.size * line_bytes;
      char* to = static_cast<char*>(windows) + i * across * taps * bytes;
      for (int64_t r = 0; r < w.rows.taps; ++r) {
        const int64_t line = place(w.rows, i % down, r);
        const bool empty = line < 0 || line >= w.rows.size;
        for (int64_t s = 0; s < w.columns.taps; ++s) {
          const Inside range = empty ? Inside{across, across} : inside(w.columns, s);
          char* tap = to + (r * w.columns.taps + s) * bytes;
          const char* pixel = from + line * line_bytes + place(w.columns, 0, s) * bytes;
          for (int64_t p = 0; p < range.begin; ++p) std::memset(tap + p * taps * bytes, 0, bytes);
          for (int64_t p = range.begin; p < range.end; ++p) {
            std::memcpy(tap + p * taps * bytes, pixel + p * w.columns.stride * bytes, bytes);
          }
          for (int64_t p = range.end; p < across; ++p) std::memset(tap + p * taps * bytes, 0, bytes);
        }
      }
    }
  });
}

// The images that all windows add up to: a pixel's summands in the order of their taps.
template <class T>
void fold(const Windows& w, const T* windows, T* images) {
  const int64_t down = w.rows.windows(), across = w.columns.windows(), taps = w.taps(), channels = w.channels;
  const int64_t grain = std::max<int64_t>(1, kGrain / (w.columns.size * taps * channels));
  torch::stable::parallel_for(0, w.images * w.rows.size, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* out = images + i * w.columns.size * channels;
      std::fill(out, out + w.columns.size * channels, T{0});
      for (int64_t r = 0; r < w.rows.taps; ++r) {
        // The window that reads this line with its tap r starts `above` lines below the first one.
        const int64_t above = i % w.rows.size - place(w.rows, 0, r);
        if (above < 0 || above % w.rows.stride != 0 || above / w.rows.stride >= down) continue;
        const T* row = windows + (i / w.rows.size * down + above / w.rows.stride) * across * taps * channels;
        for (int64_t s = 0; s < w.columns.taps; ++s) {
          const Inside range = inside(w.columns, s);
          const T* tap = row + (r * w.columns.taps + s) * channels;
          T* pixel = out + place(w.columns, 0, s) * channels;
          for (int64_t p = range.begin; p < range.end; ++p) {
            const T* add = tap + p * taps * channels;
            T* sum = pixel + p * w.columns.stride * channels;
            for (int64_t c = 0; c < channels; ++c) sum[c] += add[c];
          }
        }
      }
    }
  });
}

}  // namespace fused_res::cpu
