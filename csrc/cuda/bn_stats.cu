// bn_stats on a GPU.
#include "bn_stats.cuh"
#include "tensors.cuh"

namespace fused_res::cuda {
namespace {

std::tuple<Tensor, std::int64_t> bn_stats_op(const Tensor& y) {
  check_bn_stats(y);
  const Layout layout = layout_of("y", y);
  const Tiles tiles = row_tiles(layout.rows, layout.channels);
  const OnDevice device(y);
  const Tensor partials = new_tensor(y, {tiles.count, 2, layout.channels}, ScalarType::Float);
  bn_stats({data(y), static_cast<float*>(output(partials)), tiles.rows, layout}, number_of("y", y), tiles.count,
           device.queue());
  return {partials, tiles.rows};
}

STABLE_TORCH_LIBRARY_IMPL(fused_res, CUDA, m) { m.impl("bn_stats", TORCH_BOX(&bn_stats_op)); }

}  // namespace
}  // namespace fused_res::cuda
