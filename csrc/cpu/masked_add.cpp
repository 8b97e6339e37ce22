// masked_add on the CPU.
#include "../operand_checks.h"
#include "products.h"

namespace fused_res::cpu {
namespace {

void masked_add(const Tensor& dx, const Tensor& addend, const OptionalTensor& signs, int64_t down, int64_t right) {
  check_image("dx", dx);
  check_addend(dx, addend, signs, down, right);
  const int64_t channels = dx.size(3), pixels = sampled(dx, down, right);
  const MaskedAdd arguments{channels, data(addend), static_cast<const uint8_t*>(data(signs)),
                            sampling_of(dx, down, right), output(dx)};
  run_rows(kernels().masked_add[dtype_of(dx)], arguments, pixels);
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) { implement(m, "masked_add", TORCH_BOX(&masked_add)); }

}  // namespace
}  // namespace fused_res::cpu
