// Where the pixels lie that a stride samples from images.
#pragma once

#include <cstdint>

namespace fused_res::cuda {

/// Rows of images that are sampled: every down-th line, every right-th pixel of it.
struct Sampling {
  std::int64_t image_area;  // rows of an image
  int image_width;
  int area, width;  // of its sample
  int down, right;
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
  const unsigned image = row / static_cast<unsigned>(s.area), pixel = row - image * static_cast<unsigned>(s.area);
  const unsigned line = pixel / static_cast<unsigned>(s.width);
  return image * s.image_area + std::int64_t{line} * s.down * s.image_width +
         std::int64_t{pixel - line * static_cast<unsigned>(s.width)} * s.right;
}

}  // namespace fused_res::cuda
