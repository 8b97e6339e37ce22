"""The way back through a projection's pooling, in place."""

import pytest
import torch
import torch.nn.functional as F
from compare import within

from fused_res.block.pool import join_through_pool
from fused_res.spec import AvgPool

POOLS = [
    AvgPool((2, 2), (2, 2), ceil_mode=True, count_include_pad=False),
    AvgPool((2, 2), (2, 2)),
    AvgPool((2, 3), (4, 3), (1, 0), ceil_mode=True),
    AvgPool((3, 2), (3, 3), (1, 1), ceil_mode=True, count_include_pad=False),
    AvgPool((3, 3), (2, 2), (1, 1)),
    AvgPool((1, 1), (2, 1)),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (5, 5), (2, 3)], ids=str)
def test_joins_what_autograd_finds(pool, dtype, size):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    out = F.avg_pool2d(x, *pool)
    assert tuple(out.shape[2:]) == pool.output_size(*size)
    dout = torch.randn(out.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    out.backward(dout.double())
    dx = torch.randn(x.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    wanted = dx.double() + x.grad
    join_through_pool(dx, dout, pool)
    # In place: the quotient is rounded in the arithmetic's precision, the sum to the dtype. Otherwise the library's own roundings.
    half, fine = (torch.finfo(t).eps / 2 for t in (dtype, torch.promote_types(dtype, torch.float32)))
    terms = torch.autograd.grad(F.avg_pool2d(x, *pool), x, dout.double().abs())[0]
    rounding = 8 * half if pool.kernel_size[0] > pool.stride[0] else 2 * fine
    within(dx.double(), wanted, half * wanted.abs() + rounding * (terms + wanted.abs()) + 2.0**-25 * (half > fine))
