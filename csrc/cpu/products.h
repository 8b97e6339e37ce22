// What the launchers of matrix products share: operands from tensors, packed matrices, memory, tiles.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "launch.h"

namespace fused_res::cpu {

// Memory that grows and stays: fresh memory costs a page fault for each page.
class Memory {
 public:
  void* get(int64_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, static_cast<size_t>(divide_up(bytes, 64) * 64)));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// What a kernel writes on the way, for each thread; and the partial results of an operator, for the thread that calls
// it.
inline thread_local Memory kernel_memory, partial_memory;

inline int64_t arithmetic_size(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double ? 8 : 4; }

inline int64_t whole_panels(int64_t columns) { return divide_up(columns, kPanel) * kPanel; }

// At least what a block of so many rows takes of a kernel's memory.
inline int64_t block_elements(int64_t rows, int64_t channels) { return rows * (whole_panels(channels) + 16); }

template <class Arguments>
void run_products(void (*kernel)(const Arguments&, int64_t, int64_t, void*), const Arguments& arguments, int64_t tasks,
                  int64_t bytes) {
  torch::stable::parallel_for(
      0, tasks, 1, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end, kernel_memory.get(bytes)); });
}

// Rows of a block of a product, about: a block, what it is multiplied by and what becomes of it fit the cache together.
constexpr int64_t kBlockRows = 96;
// Rows of all blocks but the last are a multiple of this.
constexpr int64_t kRowStep = 6;
// Bytes of the products that a reduction's task adds up in the cache, and of those of all tiles, about.
constexpr int64_t kProductBytes = 512 * 1024;
constexpr int64_t kPartialBytes = 8 * 1024 * 1024;
// Tiles of a reduction, at most.
constexpr int64_t kTiles = 32;

// Blocks of equal size.
inline int64_t block_rows(int64_t pixels, int64_t most) {
  const int64_t blocks = std::max<int64_t>(1, divide_up(pixels, most));
  return std::max<int64_t>(1, divide_up(divide_up(pixels, blocks), kRowStep)) * kRowStep;
}

inline Tiling product_tiling(int64_t pixels, int64_t channels) {
  const int64_t rows = block_rows(pixels, kBlockRows);
  return {pixels, channels, rows, rows, std::max<int64_t>(1, divide_up(pixels, rows)), divide_up(channels, kStretch)};
}

// Tiles of whole blocks for a reduction to `bytes` of products. The tasks are those of all tiles and `stretches`.
inline Tiling reduction_tiling(int64_t pixels, int64_t channels, int64_t block, int64_t stretches, int64_t bytes) {
  const int64_t most = std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(1, bytes), 1, kTiles);
  const int64_t rows = block * std::max<int64_t>(1, divide_up(divide_up(pixels, block), most));
  return {pixels, channels, block, rows, std::max<int64_t>(1, divide_up(pixels, rows)), stretches};
}

// Every down-th line and right-th pixel of images [N, H, W, C].
inline Sampling sampling_of(const Tensor& image, int64_t down, int64_t right) {
  const int64_t height = image.size(1), width = image.size(2);
  const int64_t lines = divide_up(height, down), pixels = divide_up(width, right);
  return {pixels, lines * pixels, down, right, width, height * width};
}

// Images [N, H, W, C], or with vectors relu(scale * image + shift).
inline Operand activation(const Tensor& image, const OptionalTensor& vectors, int64_t down, int64_t right) {
  Operand operand{};
  operand.reading = vectors ? kActivation : kRows;
  operand.channels = image.size(3);
  operand.rows = data(image);
  operand.vectors = data(vectors);
  operand.sampling = sampling_of(image, down, right);
  return operand;
}

// Rows [P, C] where the signs are open.
inline Operand masked(const Tensor& rows, const Tensor& signs) {
  Operand operand{};
  operand.reading = kMasked;
  operand.channels = rows.size(1);
  operand.rows = data(rows);
  operand.signs = static_cast<const uint8_t*>(data(signs));
  operand.sampling = {1, 1, 1, 1, 1, 1};
  return operand;
}

// The gradient of a convolution's output: images [N, H, W, C], or with coefficients p * g + q * y + r.
inline Operand gradient(const Tensor& image, const OptionalTensor& y, const OptionalTensor& vectors,
                        const OptionalTensor& coefficients, const OptionalTensor& signs, bool training) {
  Operand operand{};
  operand.reading = coefficients ? kGradient : kRows;
  operand.channels = image.size(3);
  operand.rows = data(image);
  operand.sampling = {1, 1, 1, 1, 1, 1};
  if (coefficients) {
    operand.y = data(y);
    operand.vectors = data(vectors);
    operand.coefficients = data(coefficients);
    operand.signs = static_cast<const uint8_t*>(data(signs));
    operand.training = training;
  }
  return operand;
}

inline Tensor fresh_statistics(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_tensor(like, shape, statistics_dtype(like.scalar_type()));
}

// The matrix [rows, columns], or its transpose, for the right of a product.
inline Tensor packed(const Tensor& matrix, bool transposed, bool negative = false) {
  const int64_t depth = matrix.size(transposed ? 1 : 0), columns = matrix.size(transposed ? 0 : 1);
  const Tensor to = fresh_statistics(matrix, {whole_panels(columns) * depth});
  const Pack arguments{depth, columns, data(matrix), transposed, negative, output(to)};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, depth * kPanel));
  torch::stable::parallel_for(0, divide_up(columns, kPanel), grain, [&](int64_t begin, int64_t end) {
    kernels().pack[dtype_of(matrix)](arguments, begin, end);
  });
  return to;
}

Tensor pointwise_bn_act(const Tensor& x, const Tensor& panels, int64_t channels, int64_t down, int64_t right,
                        const Tensor& vectors, const OptionalTensor& skip, bool relu);

}  // namespace fused_res::cpu
