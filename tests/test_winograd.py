"""The compiled 3x3 convolutions, F(2x2, 3x3): exact on integers, by the accuracy rule in blocks, for any threads and any batch."""

import convolutions
import pointwise
import pytest
import torch
from compare import same

from fused_res import accuracy, backends, explain
from fused_res.backends import native
from fused_res.modules import BasicBlock
from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.run import of

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))

DTYPES = [torch.float32, torch.float64]


def ops():
    native.load()
    return torch.ops.fused_res


# Images, channels in and out, and padding: whole blocks and odd ends, of tiles, images, panels, stretches and parts.
CASES = {
    "one tile": ((3, 1, 1), 5, 70, (1, 1)),
    "odd": ((3, 7, 5), 20, 33, (1, 1)),
    "even": ((2, 12, 8), 64, 24, (1, 1)),
    "no padding": ((2, 9, 6), 17, 40, (0, 0)),
    "all of it": ((2, 5, 8), 8, 9, (2, 2)),
    "uneven": ((1, 6, 7), 70, 65, (0, 2)),
    "stretches": ((2, 4, 6), 140, 300, (1, 1)),
    "large and odd": ((2, 75, 60), 64, 8, (1, 1)),
    "large and even": ((2, 70, 61), 40, 64, (1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_part_on_every_instruction_set(capability, poisoned_memory, name, dtype):
    """Exact on integers, since the halves and quarters of F(2x2, 3x3) are."""
    (n, height, width), c, k, padding = CASES[name]
    draw = convolutions.Draw(c, "cpu")
    x, weight = draw.integers(n, c, height, width, dtype=dtype), draw.integers(k, c, 3, 3, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    want = torch.nn.functional.conv2d(wide_x, wide_weight, padding=padding)
    dy = draw.integers(*want.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    want.backward(dy.double())
    images, filters, gradient = (t.permute(0, 2, 3, 1).contiguous() for t in (x, weight, dy))
    y, partials, rows = ops().winograd_fprop(images, None, filters, *padding, True, *[None] * 4)
    same(y.permute(0, 3, 1, 2).double(), want.detach().to(dtype).double())
    merged = bn_finalize(partials, rows, y[..., 0].numel(), None, None, 1e-5, run=of("native"))
    var, mean = torch.var_mean(y.double().flatten(0, 2), 0, correction=0)
    torch.testing.assert_close(merged[:2].double(), torch.stack((mean, var)), rtol=1e-5, atol=1e-4)
    dx, _ = ops().winograd_dgrad(gradient, *[None] * 4, True, filters, *padding, *[None] * 4, 1, 1)
    same(dx.permute(0, 3, 1, 2).double(), wide_x.grad.to(dtype).double())
    vectors = draw.vectors(c).to(partials.dtype)
    again, sums = ops().winograd_dgrad(gradient, *[None] * 4, True, filters, *padding, images, vectors, *[None] * 2, 1, 1)
    same(again, dx)
    want_sums = ops().bn_act_backward_reduce(dx.flatten(0, 2), images.flatten(0, 2), vectors, None, None, None).double().sum(0)
    torch.testing.assert_close(sums.double().sum(0), want_sums, rtol=1e-5, atol=1e-4 * want_sums.abs().max().item())
    dweight = ops().winograd_wgrad(gradient, *[None] * 4, True, images, None, *padding)
    same(dweight.permute(0, 3, 1, 2).double(), wide_weight.grad.to(dtype).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_refused_by_name(dtype):
    image, weight = torch.randn(1, 4, 4, 8, dtype=dtype), torch.randn(8, 3, 3, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match="x: expected float32 or float64"):
        ops().winograd_fprop(image, None, weight, 1, 1, False, *[None] * 4)
    with pytest.raises(RuntimeError, match="dy: expected float32 or float64"):
        ops().winograd_dgrad(image, *[None] * 4, True, weight, 1, 1, *[None] * 4, 1, 1)
    with pytest.raises(RuntimeError, match="dy: expected float32 or float64"):
        ops().winograd_wgrad(image, *[None] * 4, True, image, None, 1, 1)


@pytest.mark.parametrize(("n", "channels", "size"), [(8, 64, 15), (5, 200, 7), (2, 300, 12)])
def test_same_bits_whatever_the_threads(n, channels, size):
    draw = convolutions.Draw(0, "cpu")
    x, dy = (draw.normal(n, channels, size, size).permute(0, 2, 3, 1).contiguous() for _ in range(2))
    weight, vectors = draw.normal(channels, 9, channels).view(channels, 3, 3, channels), draw.vectors(channels)

    def run():
        y, partials, _ = ops().winograd_fprop(x, vectors, weight, 1, 1, True, *[None] * 4)
        dx, sums = ops().winograd_dgrad(dy, *[None] * 4, True, weight, 1, 1, x, vectors, None, None, 1, 1)
        return y, partials, dx, sums, ops().winograd_wgrad(dy, *[None] * 4, True, x, vectors, 1, 1)

    results = pointwise.run_with_threads(run)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_an_image_is_convolved_alike_in_any_batch():
    draw = convolutions.Draw(1, "cpu")
    x, weight = draw.normal(5, 63, 64).view(5, 9, 7, 64), draw.normal(64, 9, 64).view(64, 3, 3, 64)
    together = ops().winograd_fprop(x, None, weight, 1, 1, False, *[None] * 4)[0]
    for i in range(5):
        same(ops().winograd_fprop(x[i : i + 1], None, weight, 1, 1, False, *[None] * 4)[0], together[i : i + 1])


@pytest.mark.parametrize(("channels", "size", "mean"), [(64, (9, 7), 1e3), (128, (14, 14), 0), (48, (3, 3), 0)])
def test_blocks_are_as_accurate_as_eager(channels, size, mean):
    """F(2x2, 3x3) adds and subtracts neighbours before it multiplies; also where their mean is a thousand deviations."""

    def case(seed):
        generator = torch.Generator().manual_seed(seed)
        block = accuracy.random_block(BasicBlock(channels, channels), seed)
        x, dout = (torch.randn(2, channels, *size, generator=generator, dtype=torch.float64) for _ in range(2))
        return block, x + mean, dout

    assert all(row.own for row in explain(BasicBlock(channels, channels), torch.randn(2, channels, *size)).rows[0].convolutions)
    verdicts = accuracy.judge(case, torch.float32, "native", "prologue", seeds=range(8))
    failed = [v for v in verdicts if not v.passed]
    assert not failed, failed
