// The kernels of `moments` in float16.
#include "moments.cuh"

namespace fused_res::cuda {

template void moments<Half>(const MomentTiles&, const MomentsResult&, const Queue&);

}  // namespace fused_res::cuda
