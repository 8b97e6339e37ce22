// masked_add on a GPU.
#include "masked_add.cuh"
#include "operand_checks.h"
#include "tensors.cuh"

namespace fused_res::cuda {
namespace {

int fitting(const char* name, std::int64_t size) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int>::max(), name, ": expected images of fewer than 2^31 pixels, got ",
                  size);
  return static_cast<int>(size);
}

void masked_add_op(const Tensor& dx, const Tensor& addend, const OptionalTensor& signs, std::int64_t down,
                   std::int64_t right) {
  check_image("dx", dx);
  check_addend(dx, addend, signs, down, right);
  const std::int64_t image_area = dx.size(1) * dx.size(2);
  fitting("dx", image_area);
  // A stride beyond the image is as good as one of its size: both sample the first line or pixel only.
  const auto steps = [](std::int64_t step, std::int64_t size) { return static_cast<int>(step < size ? step : size); };
  const Sampling sampling{image_area,
                          static_cast<int>(dx.size(2)),
                          static_cast<int>(addend.size(1) * addend.size(2)),
                          static_cast<int>(addend.size(2)),
                          steps(down, dx.size(1)),
                          steps(right, dx.size(2))};
  const Number number = number_of("dx", dx);
  const OnDevice device(dx);
  const Layout layout = make_layout(addend.size(0) * sampling.area, channels_of("dx", dx), group_of(number));
  masked_add({data(addend), bytes(signs), output(dx), sampling, layout}, number, device.queue());
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("masked_add", TORCH_BOX(&masked_add_op)); }

}  // namespace
}  // namespace fused_res::cuda
