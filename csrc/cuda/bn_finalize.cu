// bn_finalize on a GPU.
#include "bn_finalize.cuh"
#include "tensors.cuh"

namespace fused_res::cuda {
namespace {

Tensor bn_finalize_op(const Tensor& partials, std::int64_t rows, std::int64_t pixels, const OptionalTensor& gamma,
                      const OptionalTensor& beta, double eps, const OptionalTensor& residual_scale) {
  check_bn_finalize(partials, rows, pixels, gamma, beta, residual_scale);
  number_of("partials", partials);
  const std::int64_t tiles = partials.size(0);
  const int channels = channels_of("partials", partials);
  const OnDevice device(partials);
  const Tensor vectors = new_tensor(partials, {kVectors, channels});
  bn_finalize({floats(partials), parameter(gamma), parameter(beta), parameter(residual_scale),
               static_cast<float*>(output(vectors)), tiles, rows, pixels - rows * (tiles - 1), pixels, channels,
               static_cast<float>(eps)},
              device.queue());
  return vectors;
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("bn_finalize", TORCH_BOX(&bn_finalize_op)); }

}  // namespace
}  // namespace fused_res::cuda
