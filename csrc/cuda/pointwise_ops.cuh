// What the operators of 1x1 convolutions share. Their kernels are compiled one format a file: pointwise_<format>.cu.
#pragma once

#include "operands.cuh"
#include "pointwise_fprop.cuh"
#include "pointwise_tail.cuh"

namespace fused_res::cuda {

extern template void pointwise_fprop<float>(const PointwiseFprop&, Tile, const Queue&);
extern template void pointwise_fprop<Half>(const PointwiseFprop&, Tile, const Queue&);
extern template void pointwise_fprop<BFloat16>(const PointwiseFprop&, Tile, const Queue&);
extern template void pointwise_tail<float>(const PointwiseTail&, Tile, const Queue&);
extern template void pointwise_tail<Half>(const PointwiseTail&, Tile, const Queue&);
extern template void pointwise_tail<BFloat16>(const PointwiseTail&, Tile, const Queue&);

/// The columns of a matrix whose lines' offsets within a tile kernels work out in 32 bits.
inline int product_columns(const char* name, std::int64_t columns) {
  STD_TORCH_CHECK(columns < 1 << 24, name, ": expected fewer than 2^24 channels, got ", columns);
  return static_cast<int>(columns);
}

/// Images [N, H, W, K] at a stride, and the BN and ReLU that are still to be applied.
inline Activation activation(const char* name, const Tensor& image, const OptionalTensor& vectors, std::int64_t down,
                             std::int64_t right) {
  const Sampling sampling = sampling_of(name, image, down, right);
  const int channels = product_columns(name, image.size(3));
  const Activation a = activation_of(data(image), floats(vectors), image.size(0), channels, sampling);
  STD_TORCH_CHECK(!a.sampled || a.pixels <= std::numeric_limits<int>::max(), name,
                  ": expected fewer than 2^31 pixels at a stride, got ", a.pixels);
  return a;
}

/// The output channels of a weight [C, K]: few enough for offsets within a tile in 32 bits, and for the blocks of a
/// launch.
inline int product_channels(const char* name, const Tensor& weight, std::int64_t pixels) {
  const std::int64_t channels = weight.size(0), across = channels / SmallTiling::kColumns + 1;
  const std::int64_t tiles = (pixels + SmallTiling::kRows - 1) / SmallTiling::kRows;
  STD_TORCH_CHECK(tiles <= std::numeric_limits<int>::max() / across, name, ": too many channels, ", channels, ", for ",
                  pixels, " pixels");
  return product_columns(name, channels);
}

/// The instructions are those of Ampere.
inline void check_multiplies(const Tensor& tensor) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index()));
  STD_TORCH_CHECK(major >= 8, "fused_res: products need a GPU of compute capability 8.0 or later");
}

template <class Run>
void with_number(Number number, Run run) {
  if (number == Number::kFloat) run(Type<float>{});
  if (number == Number::kHalf) run(Type<Half>{});
  if (number == Number::kBFloat16) run(Type<BFloat16>{});
}

}  // namespace fused_res::cuda
