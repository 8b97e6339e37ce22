// The CPU kernels for one instruction set: the build compiles this file once for each, with FUSED_RES_VARIANT as its
// name.
#include "bn_act_backward_kernel.h"
#include "bn_act_kernel.h"
#include "bn_stats_kernel.h"
#include "kernels.h"
#include "masked_add_kernel.h"
#include "matrix_kernel.h"
#include "max_pool_kernel.h"
#include "moments_kernel.h"
#include "pointwise_tail_kernel.h"
#include "product_kernel.h"
#include "reduction_kernel.h"
#include "relu_kernel.h"
#include "spread_kernel.h"
#include "tail_gradients_kernel.h"
#include "winograd_kernel.h"

#define FUSED_RES_TEXT(name) #name
#define FUSED_RES_NAME(name) FUSED_RES_TEXT(name)

namespace fused_res::cpu::FUSED_RES_VARIANT {

extern const Kernels table;
const Kernels table = {
    FUSED_RES_NAME(FUSED_RES_VARIANT),
    {bn_stats<float>, bn_stats<half>, bn_stats<bfloat16>, bn_stats<double>},
    {bn_act<float>, bn_act<half>, bn_act<bfloat16>, bn_act<double>},
    {relu<float>, relu<half>, relu<bfloat16>, relu<double>},
    {max_pool<float>, max_pool<half>, max_pool<bfloat16>, max_pool<double>},
    {bn_act_backward_reduce<float>, bn_act_backward_reduce<half>, bn_act_backward_reduce<bfloat16>,
     bn_act_backward_reduce<double>},
    {bn_act_backward_apply<float>, bn_act_backward_apply<half>, bn_act_backward_apply<bfloat16>,
     bn_act_backward_apply<double>},
    {masked_add<float>, masked_add<half>, masked_add<bfloat16>, masked_add<double>},
    {pack<float>, pack<half>, pack<bfloat16>, pack<double>},
    {product<float>, product<half>, product<bfloat16>, product<double>},
    {pointwise_tail<float>, pointwise_tail<half>, pointwise_tail<bfloat16>, pointwise_tail<double>},
    {reduction<float>, reduction<half>, reduction<bfloat16>, reduction<double>},
    {moments<float>, moments<half>, moments<bfloat16>, moments<double>},
    {spread<float>, spread<half>, spread<bfloat16>, spread<double>},
    {tail_gradients<float>, tail_gradients<half>, tail_gradients<bfloat16>, tail_gradients<double>},
    {winograd_filter<float>, nullptr, nullptr, winograd_filter<double>},
    {winograd<float>, nullptr, nullptr, winograd<double>},
    {winograd_wgrad<float>, nullptr, nullptr, winograd_wgrad<double>},
    {winograd_dweight<float>, nullptr, nullptr, winograd_dweight<double>},
};

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
