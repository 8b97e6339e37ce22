// The kernels of `moments` in bfloat16.
#include "moments.cuh"

namespace fused_res::cuda {

template void moments<BFloat16>(const MomentTiles&, const MomentsResult&, const Queue&);

}  // namespace fused_res::cuda
