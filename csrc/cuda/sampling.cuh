// Where the pixels lie that a stride samples from images.
#pragma once

#include <cstdint>

namespace fused_res::cuda {

/// Division of a number below 2^31 by one that the host knows: a product and a shift (Granlund and Montgomery, 1994).
struct Divider {
  std::uint32_t factor;
  int shift;

  __host__ __device__ constexpr Divider(int by) : factor(0), shift(31) {
    while (shift < 62 && std::int64_t{1} << (shift - 31) < by) ++shift;
    if (by > 0) factor = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + by - 1) / by);
  }

  __device__ __forceinline__ unsigned quotient(unsigned n) const {
    return static_cast<unsigned>(std::uint64_t{n} * factor >> shift);
  }
};

/// Rows of images that are sampled: every down-th line, every right-th pixel of it.
struct Sampling {
  std::int64_t image_area;  // rows of an image
  int image_width;
  int area, width;  // of its sample
  int down, right;
  Divider by_area = area, by_width = width;
};

enum class Sample { kAll, kSome };

template <Sample kSample>
__device__ __forceinline__ std::int64_t source_row(const Sampling& s, std::int64_t row) {
  if constexpr (kSample == Sample::kAll) return row;
  const std::int64_t image = row / s.area;
  const int pixel = static_cast<int>(row - image * s.area), line = pixel / s.width;
  return image * s.image_area + std::int64_t{line} * s.down * s.image_width +
         std::int64_t{pixel - line * s.width} * s.right;
}

/// The same of fewer than 2^31 rows. Division in 64 bits is a call, around which registers would go to memory.
__device__ __forceinline__ std::int64_t sampled_row(const Sampling& s, unsigned row) {
  const unsigned image = s.by_area.quotient(row), pixel = row - image * static_cast<unsigned>(s.area);
  const unsigned line = s.by_width.quotient(pixel), right = pixel - line * static_cast<unsigned>(s.width);
  // An image has fewer than 2^31 pixels.
  const unsigned inside = line * static_cast<unsigned>(s.down * s.image_width) + right * static_cast<unsigned>(s.right);
  return std::int64_t{image} * static_cast<int>(s.image_area) + inside;
}

}  // namespace fused_res::cuda
