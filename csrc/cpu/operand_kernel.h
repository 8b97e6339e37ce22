// Reads the operands of matrix products into memory, in the dtype of the arithmetic.
#pragma once

#include "bn_act_backward_kernel.h"
#include "matrix_kernel.h"

namespace fused_res::cpu::FUSED_RES_VARIANT {

// Which row of the image is row p of the sample.
inline int64_t source_row(const Sampling& s, int64_t p) {
  if (s.down == 1 && s.right == 1) return p;
  const int64_t n = p / s.area, i = p % s.area / s.width, j = p % s.width;
  return n * s.image_area + i * s.down * s.image_width + j * s.right;
}

// Which row of the sample is row p of the image, or -1 where p was left out.
inline int64_t sampled_row(const Sampling& s, int64_t p) {
  if (s.down == 1 && s.right == 1) return p;
  const int64_t n = p / s.image_area, i = p % s.image_area / s.image_width, j = p % s.image_width;
  return i % s.down != 0 || j % s.right != 0 ? -1 : n * s.area + i / s.down * s.width + j / s.right;
}

// The value as a tensor of T would hold it.
template <class T, class V>
inline V rounded(V v) {
  T lanes[V::width];
  return v.store(lanes);
}

template <class T, Reading reading, class A>
void read_rows(const Operand& o, int64_t first, int64_t n, int64_t from, int64_t count, A* to, int64_t to_row) {
  using V = typename Arithmetic<T>::Vec;
  const int64_t channels = o.channels, bytes = (channels + 7) / 8;
  const A* mean = o.mean == nullptr ? nullptr : static_cast<const A*>(o.mean) + from;
  const A *scale = nullptr, *shift = nullptr, *coefficients = nullptr;
  if (o.vectors != nullptr) {
    scale = static_cast<const A*>(o.vectors) + kScale * channels + from;
    shift = scale + channels;
  }
  if (reading == kGradient) coefficients = static_cast<const A*>(o.coefficients) + from;
  for (int64_t p = 0; p < n; ++p, to += to_row) {
    const int64_t row = source_row(o.sampling, first + p);
    const T* values = static_cast<const T*>(o.rows) + row * channels + from;
    const T* y = reading == kGradient ? static_cast<const T*>(o.y) + row * channels + from : nullptr;
    const uint8_t* signs = o.signs == nullptr ? nullptr : o.signs + row * bytes + from / 8;
    for_channels<V::width>(count, [&](int64_t c, auto lanes) {
      V v = load<V>(values + c, lanes);
      if (reading == kActivation) v = rounded<T>(affine<T>(v, scale, shift, c, lanes).relu());
      if (reading == kMasked) v = v.keep(load_bits<V::width>(signs + c / 8, lanes));
      if (reading == kGradient) {
        v = masked<T>(v, load<V>(y + c, lanes), signs, scale, shift, c, lanes);
        v = rounded<T>(gradient<T>(v, y, coefficients, channels, o.training, c, lanes));
      }
      if (mean != nullptr) v = v - load<V>(mean + c, lanes);
      store(to + c, v, lanes);
    });
  }
}

// Rows first to first + n, channels from to from + count, `from` a multiple of 8.
template <class T, class A>
inline void read_rows(const Operand& o, int64_t first, int64_t n, int64_t from, int64_t count, A* to, int64_t to_row) {
  const auto read = o.reading == kRows         ? read_rows<T, kRows, A>
                    : o.reading == kActivation ? read_rows<T, kActivation, A>
                    : o.reading == kMasked     ? read_rows<T, kMasked, A>
                                               : read_rows<T, kGradient, A>;
  read(o, first, n, from, count, to, to_row);
}

// The distance of rows of so many channels in memory of our own: a whole number of panels, whose elements past the last
// channel are read but do not matter, and a cache line more, so that rows do not fall on each other in the cache.
template <class A>
constexpr int64_t scratch_row(int64_t channels) {
  return (channels + kPanel - 1) / kPanel * kPanel + static_cast<int64_t>(64 / sizeof(A));
}

// Consecutive parts of the memory that a kernel is given.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <class A>
  A* take(int64_t rows, int64_t channels) {
    A* taken = reinterpret_cast<A*>(next_);
    next_ += rows * scratch_row<A>(channels) * static_cast<int64_t>(sizeof(A));
    return taken;
  }

 private:
  char* next_;
};

// Some rows of an operand for a product: read into memory, or where they are, if they are there as they should be.
template <class A>
struct Block {
  const A* rows;
  int64_t row;
};

template <class T, class A>
inline Block<A> read_block(const Operand& o, int64_t first, int64_t n, A* memory) {
  const bool plain = o.reading == kRows && o.mean == nullptr && o.sampling.down == 1 && o.sampling.right == 1;
  if (sizeof(T) == sizeof(A) && plain) return {static_cast<const A*>(o.rows) + first * o.channels, o.channels};
  read_rows<T>(o, first, n, 0, o.channels, memory, scratch_row<A>(o.channels));
  return {memory, scratch_row<A>(o.channels)};
}

// Has n rows of an operand fetched ahead, unless they are sampled.
template <class T>
inline void want_rows(Ahead& ahead, const Operand& o, int64_t first, int64_t n) {
  if (o.sampling.down != 1 || o.sampling.right != 1) return;
  const int64_t bytes = n * o.channels * static_cast<int64_t>(sizeof(T));
  ahead.want(static_cast<const T*>(o.rows) + first * o.channels, bytes);
  if (o.y != nullptr) ahead.want(static_cast<const T*>(o.y) + first * o.channels, bytes);
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
