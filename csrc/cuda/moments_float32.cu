// The kernels of `moments` in float32, as TF32.
#include "moments.cuh"

namespace fused_res::cuda {

template void moments<float>(const MomentTiles&, const MomentsResult&, const Queue&);

}  // namespace fused_res::cuda
