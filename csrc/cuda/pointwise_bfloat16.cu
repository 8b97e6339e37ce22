// The kernels of 1x1 convolutions in bfloat16.
#include "pointwise_fprop.cuh"
#include "pointwise_tail.cuh"

namespace fused_res::cuda {

template void pointwise_fprop<BFloat16>(const PointwiseFprop&, Tile, const Queue&);
template void pointwise_tail<BFloat16>(const PointwiseTail&, Tile, const Queue&);

}  // namespace fused_res::cuda
