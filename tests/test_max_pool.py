"""`max_pool` against torch's, element for element, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from compare import same

from fused_res.backends import native
from fused_res.primitives.max_pool import Pool, max_pool
from fused_res.primitives.run import of as run_of

POOLS = [
    Pool((3, 3), (2, 2), (1, 1)),
    Pool((3, 3), (2, 2), (1, 1), ceil_mode=True),
    Pool((2, 2), (2, 2)),
    Pool((2, 3), (3, 1), (1, 0), (2, 1), ceil_mode=True),
    Pool((3, 2), (1, 2), (1, 1), (2, 3)),
    Pool((1, 1), (3, 2), ceil_mode=True),
    Pool((5, 4), (1, 1), (2, 2)),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(*shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 64, 83])
def test_maxima_are_torchs(backend, device, dtype, pool, channels):
    x = drawn(2, channels, 9, 12, dtype=dtype).to(device)
    out = max_pool(x, pool, run=run_of(backend))
    same(out, F.max_pool2d(x, *pool))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities_are_torchs(backend, device, dtype):
    x = drawn(2, 35, 12, 12, dtype=dtype)
    places = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    x[places < 0.05] = torch.nan
    x[(places > 0.9)] = -torch.inf
    x[(places > 0.97)] = torch.inf
    x[1, 3] = -torch.inf
    x[1, 4] = torch.nan
    x = x.to(device)
    same(max_pool(x, POOLS[0], run=run_of(backend)), F.max_pool2d(x, *POOLS[0]), nan=True)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((3, 3, 2, 2, 2, 1, 1, 1), "padding: expected at most half of the window, got 2"),
        ((9, 3, 1, 1, 0, 0, 1, 1), "kernel: expected no more than the padded image"),
        ((3, 3, 0, 1, 0, 0, 1, 1), "kernel, stride and dilation: expected at least 1"),
        ((2**62, 3, 1, 1, 0, 0, 1, 1), "expected at most"),
    ],
)
def test_the_operator_refuses_what_it_cannot_read(geometry, words):
    reason = native.missing()
    if reason is not None:
        pytest.skip(reason)
    native.load()
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fused_res.max_pool(torch.randn(1, 6, 6, 4), *geometry, False)


def test_the_operator_refuses_images_that_are_not_contiguous():
    reason = native.missing()
    if reason is not None:
        pytest.skip(reason)
    native.load()
    with pytest.raises(RuntimeError, match="x: expected a contiguous tensor"):
        torch.ops.fused_res.max_pool(torch.randn(1, 6, 6, 8)[..., ::2], 3, 3, 2, 2, 1, 1, 1, 1, False)
