// masked_add on a GPU.
#include "masked_add.cuh"
#include "operands.cuh"

namespace fused_res::cuda {
namespace {

void masked_add_op(const Tensor& dx, const Tensor& addend, const OptionalTensor& signs, std::int64_t down,
                   std::int64_t right) {
  check_image("dx", dx);
  check_addend(dx, addend, signs, down, right);
  const Sampling sampling = sampling_of("dx", dx, down, right);
  const Number number = number_of("dx", dx);
  const OnDevice device(dx);
  const Layout layout = make_layout(addend.size(0) * sampling.area, channels_of("dx", dx), group_of(number));
  masked_add({data(addend), bytes(signs), output(dx), sampling, layout}, number, device.queue());
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("masked_add", TORCH_BOX(&masked_add_op)); }

}  // namespace
}  // namespace fused_res::cuda
