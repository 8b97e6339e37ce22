// The kernels of 1x1 convolutions in TF32.
#include "pointwise_fprop.cuh"
#include "pointwise_tail.cuh"

namespace fused_res::cuda {

template void pointwise_fprop<float>(const PointwiseFprop&, Tile, const Queue&);
template void pointwise_tail<float>(const PointwiseTail&, Tile, const Queue&);

}  // namespace fused_res::cuda
