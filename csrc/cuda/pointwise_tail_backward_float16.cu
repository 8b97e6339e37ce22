// The kernels of `pointwise_tail_backward` in float16.
#include "pointwise_tail_backward_apply.cuh"
#include "pointwise_tail_backward_reduce.cuh"

namespace fused_res::cuda {

template void pointwise_tail_backward_reduce<Half>(const TailReduce&, const TailSums&, const Queue&);
template void pointwise_tail_backward_apply<Half>(const TailApply&, const Queue&);

}  // namespace fused_res::cuda
