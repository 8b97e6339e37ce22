// bn_stats on the CPU.
#include "bn_stats.h"

namespace fused_res::cpu {

std::tuple<Tensor, int64_t> bn_stats(const Tensor& y) {
  check_bn_stats(y);
  const Tiling cut = tiling(y);
  const Tensor partials = new_tensor(y, {cut.tiles, 2, cut.channels}, statistics_dtype(y.scalar_type()));
  run_tasks(kernels().bn_stats[dtype_of(y)], BnStats{cut, data(y), output(partials)});
  return {partials, cut.rows};
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(fused_res, CPU, m) { implement(m, "bn_stats", TORCH_BOX(&bn_stats)); }

}  // namespace
}  // namespace fused_res::cpu
