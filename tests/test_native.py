"""The compiled CPU kernels: against float64 on every instruction set of this CPU, whatever the threads and the arguments."""

import itertools
import os

import convolutions
import pointwise
import pytest
import torch
from addends import addend_case
from compare import all_same, every, same, within
from moment_steps import SHORTCUTS, backward_case, check_backward, check_moments, check_tail, tail_arguments

from blocks import projection
from fused_res import accuracy, backends, explain, use_backend
from fused_res.backends import native
from fused_res.geometry import Geometry, numbers_of
from fused_res.modules import BasicBlock, Bottleneck
from fused_res.primitives import bn_act, bn_act_backward, bn_finalize, moments, pointwise_tail_backward
from fused_res.primitives.choice import Call, Choice, choose
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_tail import Pointwise
from fused_res.primitives.run import PLAIN, of
from fused_res.spec import ConvBN

CPU = torch.device("cpu")
WHY = backends.supports("native", CPU, torch.float32)
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CHANNELS = [1, 3, 8, 20, 64, 100, 300]
PIXELS = [1, 2, 3, 17, 130, 1000]


def ops():
    native.load()
    return torch.ops.fused_res


def operands(pixels, channels, dtype, seed=0):
    """Arguments of all primitives: two BNs with their vectors and coefficients, an incoming gradient, signs."""
    generator = torch.Generator().manual_seed(seed + 1000 * pixels + channels)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, y2, skip, dout = (random(pixels, channels).to(dtype) for _ in range(4))
    vectors, vectors2 = (random(5, channels).to(wide) for _ in range(2))
    coefficients, coefficients2 = (random(7, channels).to(wide) for _ in range(2))
    signs = bn_act.pack_signs(random(pixels, channels) > 0)
    return y, y2, skip, dout, vectors, vectors2, coefficients, coefficients2, signs


def in_double(*arguments):
    """The arguments in float64, where they are tensors of numbers."""
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def close(got, want, dtype):
    """One rounding of the stored dtype, and a few of the arithmetic where terms cancel."""
    wide = 2.0**-50 if dtype == torch.float64 else 2.0**-21
    limit = torch.finfo(dtype).eps / 2 * want.abs() + wide * 8 + torch.finfo(dtype).smallest_normal
    assert got.dtype == dtype
    within(got.double(), want, limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_primitives_match_float64(capability, poisoned_memory, dtype, channels):
    for pixels in PIXELS:
        y, y2, skip, dout, v, v2, c, c2, signs = operands(pixels, channels, dtype)
        wide = v.dtype

        partials, rows = ops().bn_stats(y)
        tiles = [torch.stack((t.double().mean(0), t.double().var(0, correction=0) * len(t))) for t in y.split(rows)]
        torch.testing.assert_close(partials, torch.stack(tiles).to(wide), rtol=1e-5, atol=1e-5)

        for shortcut in ((None, None, None), (skip, None, None), (None, y2, v2)):
            out, got = ops().bn_act(y, v, *shortcut, True)
            # An element within rounding of 0 may fall on either side of the ReLU: both are then within rounding of 0.
            close(out, bn_act.plain(*in_double(y, v, *shortcut), False)[0], dtype)
            same(got, bn_act.pack_signs(~(out <= 0)))

        for arguments in ((dout, y, v, signs, None, None), (dout, y, v, signs, y2, v2)):
            sums = ops().bn_act_backward_reduce(*arguments)
            want = bn_act_backward.plain_reduce(*in_double(*arguments))
            torch.testing.assert_close(sums.double().sum(0), want[0], rtol=1e-4, atol=1e-5 * pixels**0.5)

        for training, second, training2, masked in itertools.product((False, True), repeat=4):
            pair = (y2, c2, training2) if second else (None, None, False)
            got = ops().bn_act_backward_apply(dout, y, v, c, signs, training, *pair, masked)
            want = bn_act_backward.plain_apply(*in_double(dout, y, v, c, signs, training, *pair, masked))
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    close(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 20, 64])
def test_backward_takes_the_signs_of_the_forward(capability, dtype, channels):
    """The inner ReLU's signs are not saved: both directions compute scale * y + shift, and must agree on every element."""
    y, _, _, dout, v, _, c, *_ = operands(1000, channels, dtype)
    v[4] = -v[3] * y[7].to(v.dtype)  # row 7 is within rounding of 0
    _, signs = ops().bn_act(y, v, None, None, None, True)
    if dtype != torch.float16:  # whose outputs may underflow to 0
        same(
            ops().bn_act_backward_reduce(dout, y, v, None, None, None), ops().bn_act_backward_reduce(dout, y, v, signs, None, None)
        )
        inner, outer = (ops().bn_act_backward_apply(dout, y, v, c, s, True, None, None, False, True) for s in (None, signs))
        all_same(inner[::2], outer[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finalize_matches_float64(dtype):
    for channels in CHANNELS:
        generator = torch.Generator().manual_seed(channels)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        partials = torch.rand(5, 2, channels, generator=generator, dtype=torch.float64).to(wide)
        gamma, beta = (torch.randn(channels, generator=generator).to(dtype) for _ in range(2))
        scale = torch.tensor(0.7).to(dtype)
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        for parameters in ((gamma, beta, 1e-5, scale), (gamma, None, 1e-3, None), (None, None, 1e-5, None)):
            got = ops().bn_finalize(partials, 10, 47, *parameters)
            torch.testing.assert_close(got.double(), bn_finalize.plain(*in_double(partials, 10, 47, *parameters)), **tolerance)
        v = torch.rand(5, channels, generator=generator, dtype=torch.float64).to(wide)
        for row, training, parameters in itertools.product((1, 2), (False, True), ((gamma, beta, scale), (None, None, None))):
            sums = torch.rand(5, 3, channels, generator=generator, dtype=torch.float64).to(wide)
            got = ops().bn_act_backward_finalize(sums, row, 47, v, *parameters, training)
            want = bn_act_backward.plain_finalize(*in_double(sums, row, 47, v, *parameters, training))
            torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(capability, dtype):
    poison = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, torch.finfo(dtype).max], dtype=torch.float64)
    y, _, _, dout, v, _, c, _, signs = operands(20, 20, dtype)
    v[3], v[4] = 1, 0
    y[:5, 3], y[5:10, 17] = poison.to(dtype), poison.to(dtype)
    out, got = ops().bn_act(y, v, None, None, None, True)
    same(out.nan_to_num(7), torch.relu(y).nan_to_num(7))
    same(out.isnan(), y.isnan())
    same(bn_act.unpack_signs(got, 20), ~(out <= 0))
    for backward_signs in (None, signs):
        dy, _, g = ops().bn_act_backward_apply(dout, y, v, c, backward_signs, False, None, None, False, True)
        every(dy.isfinite())
        every(g.isfinite())
    dout[3, 5] = float("nan")
    open_ = bn_act.unpack_signs(signs, 20)
    _, _, g = ops().bn_act_backward_apply(dout, y, v, c, signs, False, None, None, False, True)
    same(g.isnan(), dout.isnan() & open_)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_is_rounded_as_by_torch(capability, dtype):
    """Ties, subnormal numbers, overflow, infinities and NaN: g * p, rounded, for every g of the dtype."""
    numbers = torch.arange(2**16).to(torch.int16).view(dtype)
    factors = torch.tensor([1, -1, 1 + 2**-8, 1 + 2**-9, 1 + 2**-11, 1 - 2**-9, 0.3, 2**-14, 2**-126, 1e-30, 1e-40, 1e5, 1e38])
    factors = torch.cat((factors, torch.linspace(1, 2, 20)))
    dout = numbers[:, None].repeat(1, len(factors))
    vectors, coefficients = torch.ones(5, len(factors)), torch.zeros(7, len(factors))
    coefficients[0] = factors
    got, *_ = ops().bn_act_backward_apply(dout, torch.ones_like(dout), vectors, coefficients, None, False, None, None, False, False)
    want = (dout.float() * factors).to(dtype)
    same(got.isnan(), want.isnan())
    known = ~want.isnan()
    same(got[known].view(torch.int16), want[known].view(torch.int16))
    if dtype == torch.bfloat16:
        every(got[~known].view(torch.int16).eq(0x7FC0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pixels", "channels"), [(5000, 64), (3001, 100), (40000, 64), (300, 600)])
def test_same_bits_whatever_the_threads(dtype, pixels, channels):
    y, y2, _, dout, v, v2, c, c2, signs = operands(pixels, channels, dtype)

    def everything():
        partials, rows = ops().bn_stats(y)
        sums = ops().bn_act_backward_reduce(dout, y, v, signs, y2, v2)
        return [
            partials,
            ops().bn_finalize(partials, rows, pixels, None, None, 1e-5, None),
            sums,
            ops().bn_act_backward_finalize(sums, 2, pixels, v, None, None, None, True),
            *ops().bn_act(y, v, None, y2, v2, True),
            *ops().bn_act_backward_apply(dout, y, v, c, signs, True, y2, c2, True, True),
        ]

    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(everything())
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        all_same(runs[0], run)


def test_results_that_go_past_the_caches(capability):
    """Large results are written with other instructions: the same bits as piece by piece, and all of them."""
    pixels, channels = 9000, 128
    y, y2, _, dout, v, v2, c, c2, signs = operands(pixels, channels, torch.float32)
    whole = ops().bn_act(y, v, None, y2, v2, True), ops().bn_act_backward_apply(dout, y, v, c, signs, True, y2, c2, True, True)
    parts = []
    for at in (slice(0, 1000), slice(1000, pixels)):
        forward = ops().bn_act(y[at], v, None, y2[at], v2, True)
        parts.append((*forward, *ops().bn_act_backward_apply(dout[at], y[at], v, c, signs[at], True, y2[at], c2, True, True)))
    for got, first, second in zip((*whole[0], *whole[1]), *parts, strict=True):
        same(got, torch.cat((first, second)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_memory(capability, dtype):
    def shifted(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)

    y, y2, _, dout, v, v2, c, c2, signs = operands(130, 64, dtype)
    arguments = (dout, y, v, c, signs, True, y2, c2, True, True)
    moved = [shifted(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    for a, b in zip(ops().bn_act_backward_apply(*arguments), ops().bn_act_backward_apply(*moved), strict=True):
        same(a, b)
    same(ops().bn_stats(y)[0], ops().bn_stats(shifted(y))[0])
    same(ops().bn_act(y, v, None, y2, v2, True)[0], ops().bn_act(*map(shifted, (y, v)), None, shifted(y2), shifted(v2), True)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda: BasicBlock(16, 16), lambda: Bottleneck(32, 8)], ids=["BasicBlock", "Bottleneck"])
def test_blocks_are_as_accurate_as_eager(make, dtype):
    def case(seed):
        generator = torch.Generator().manual_seed(seed)
        block = accuracy.random_block(make(), seed)
        x, dout = (torch.randn(2, block.conv1.in_channels, 9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
        return block, x, dout

    tolerance = 64 * torch.finfo(dtype).eps
    verdicts = accuracy.judge(case, dtype, "native", "bn_act", seeds=range(16), sign_tolerance=tolerance)
    failed = [v for v in verdicts if not v.passed]
    assert not failed, failed


def test_gradcheck_through_the_compiled_kernels():
    block = BasicBlock(3, 3).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    with use_backend("native"):
        assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()))


@pytest.mark.skipif("FUSED_RES_NATIVE" in os.environ, reason="the environment decides")
def test_automatic_choice_on_a_cpu():
    rows = explain(BasicBlock(4, 4), torch.randn(2, 4, 5, 5)).rows
    assert rows[0].backend == "native"


@pytest.mark.parametrize(
    ("make", "images", "level", "unknown"),
    [
        (lambda: Bottleneck(256, 64), (8, 56, 56), "moment", "prologue"),
        (lambda: Bottleneck(256, 64), (1, 56, 56), "prologue", "prologue"),
        (lambda: Bottleneck(512, 128), (8, 28, 28), "prologue", "prologue"),
        (lambda: Bottleneck(512, 128), (2, 28, 28), "prologue", "prologue"),
        (lambda: Bottleneck(512, 128), (1, 3, 5), "bn_act", "prologue"),
        (lambda: Bottleneck(512, 256, stride=2, downsample=projection(512, 1024, 2)), (32, 28, 28), "prologue", "bn_act"),
        (lambda: Bottleneck(512, 256, stride=2, downsample=projection(512, 1024, 2)), (8, 28, 28), "bn_act", "bn_act"),
        (lambda: Bottleneck(256, 128, stride=2, downsample=projection(256, 512, 2)), (32, 56, 56), "moment", "bn_act"),
        (lambda: Bottleneck(2048, 512), (64, 7, 7), "prologue", "bn_act"),
        (lambda: Bottleneck(2048, 512), (4, 7, 7), "bn_act", "bn_act"),
        (lambda: BasicBlock(64, 64), (8, 56, 56), "prologue", "prologue"),
        (lambda: BasicBlock(256, 512, stride=2, downsample=projection(256, 512, 2)), (8, 14, 14), "prologue", "bn_act"),
        (lambda: BasicBlock(16, 16), (128, 32, 32), "bn_act", "bn_act"),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple | str) else "",
)
def test_the_level_follows_from_the_sizes(make, images, level, unknown):
    with torch.device("meta"):
        block = make()
    n, height, width = images
    numbers = numbers_of(torch.empty((n, block.conv1.in_channels, height, width), device="meta"), block.parts())
    geometry = Geometry.from_numbers(numbers)._replace(images=images)
    assert native.level(CPU, torch.float32, geometry) == level
    assert native.level(CPU, torch.float32, geometry._replace(images=None)) == unknown
    assert native.level(CPU, torch.bfloat16, geometry) == native.level(torch.device("cuda"), torch.float32, geometry) == "bn_act"


@pytest.mark.parametrize(
    ("weight", "pixels", "own"),
    [
        ((64, 256, 1, 1), 49, True),
        ((1024, 256, 1, 1), 100000, False),
        ((64, 64, 3, 3), 64, True),
        ((512, 512, 3, 3), 392, True),
        ((512, 512, 3, 3), 196, False),
    ],
)
def test_a_convolution_is_our_own_where_that_pays(weight, pixels, own):
    weight = torch.randn(weight)
    kernel = weight.shape[-1]
    draw = convolutions.Draw(0, "cpu")
    image, vectors = draw.normal(1, weight.shape[1], pixels, 1), draw.vectors(weight.shape[1])
    unit = ConvBN(weight, padding=(kernel // 2, kernel // 2))
    fused = Call("conv_fprop", "native", unit, (Activation(image, vectors), True, None))
    assert choose(fused) == Choice(own, why="" if own else "faster at this size")
    assert not choose(Call("conv_fprop", "native", unit, (Activation(image), False, None))).own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix_products_on_every_instruction_set(capability, poisoned_memory, dtype):
    error = 1e-11 if dtype == torch.float64 else 8e-6
    for shape, inner, outer in (((2, 1, 9), 3, 5), ((3, 7, 9), 70, 20), ((2, 9, 12), 33, 300)):
        draw = pointwise.Draw(inner, "cpu")
        for prologue in (True, False):
            check_moments(draw.activation(shape[0], inner, *shape[1:], dtype, prologue=prologue), "native")
        for shortcut in SHORTCUTS:
            arguments = tail_arguments(draw, shape, inner, outer, dtype, shortcut)
            check_tail(*arguments, "native")
        for reread in (False, True):
            case = backward_case(draw, "native", shape, inner, outer, dtype)
            check_backward(case, "native", error, inner=True, reread=reread)
        for stride in ((1, 1), (2, 2)):
            dx, addend, expected = addend_case((shape[0], outer, *shape[1:]), stride, dtype, "cpu")
            ops().masked_add(dx.permute(0, 2, 3, 1), addend.image.permute(0, 2, 3, 1), addend.signs, *stride)
            same(dx, expected)


def moment_form(dtype, inner, outer, given=True, pixels=(3, 9, 7)):
    """Arguments of both finalize steps of the moment form; channel 4 has a weight that is orthogonal to the data."""
    draw, (n, h, w) = pointwise.Draw(inner, "cpu"), pixels
    wide = pointwise.statistics(dtype)
    z = draw.activation(n, inner, h, w, dtype, prologue=False, mean=1.0)
    weight = (draw.normal(outer, inner, 1, 1) / inner**0.5).to(dtype)
    z.image[:, 1], weight[4] = z.image[:, 0], 0
    weight[4, 0], weight[4, 1] = 1, -1
    gamma, beta, scale = (draw.normal(outer, dtype=dtype), draw.normal(outer), torch.tensor(-0.5)) if given else (None,) * 3
    unit = ConvBN(weight, gamma=gamma, beta=beta, eps=1e-3)
    found = moments.moments(z, run=of("native"))
    branch = Pointwise(z, weight, draw.normal(5, outer, dtype=wide))
    sums = pointwise_tail_backward.Sums(draw.normal(outer).double(), draw.normal(outer, inner).double(), None)
    dout, signs = draw.normal(n, outer, h, w, dtype=dtype), bn_act.pack_signs(draw.opened(n * h * w, outer))
    scaled = pointwise_tail_backward.scaled_weight(branch, run=of("native"))
    return (found, z, unit, scale), (sums, found, branch, scaled, gamma, beta, scale, dout, signs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["parameters", "none"])
def test_finalize_of_the_moment_form_is_the_plain_formula(capability, poisoned_memory, dtype, given):
    wide, half = pointwise.statistics(dtype), torch.finfo(dtype).eps / 2
    unit = 4 * torch.finfo(wide).eps
    for inner, outer in ((3, 5), (33, 70), (64, 300), (130, 20)):
        forward, backward = moment_form(dtype, inner, outer, given)
        got, suspect = moments.moments_finalize(*forward, run=of("native"))
        want, plainly = moments.plain_finalize(*forward, PLAIN)
        assert got.dtype == wide
        same(suspect, plainly)
        assert suspect.nonzero().flatten().tolist() == [4]
        mean, _, _, scale, shift = want.abs()
        terms = torch.stack((*want.abs()[:4], shift + scale * mean))
        terms[0] += 1
        within(got, want, (2 * unit + 2.0**-40) * terms)

        for changes in ({}, {3: None}, {1: None}):
            arguments = [changes.get(i, argument) for i, argument in enumerate(backward)]
            got = pointwise_tail_backward.pointwise_tail_backward_finalize(*arguments, run=of("native"))
            want = pointwise_tail_backward.plain_finalize(*arguments, None, PLAIN)
            for name, a, b in zip(got._fields, got, want, strict=True):
                assert (a is None) == (b is None), name
                if a is None:
                    continue
                assert (a.dtype, a.shape) == (b.dtype, b.shape), name
                most, rounding = b.double().abs().max(), half if name in ("dweight", "quadratic") else unit
                error = 2 * unit if name == "quadratic" else 2.0**-40
                within(a.double(), b.double(), error * most + 2 * rounding * b.double().abs(), name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_in_the_moment_form(capability, poison):
    forward, backward = moment_form(torch.float32, 33, 70)
    forward[2].weight[2, 5] = poison
    backward[0].product[7, 32] = poison
    got, want = moments.moments_finalize(*forward, run=of("native")), moments.plain_finalize(*forward, PLAIN)
    assert not got.vectors[1:3, 2].isfinite().all()
    for a, b in zip(got, want, strict=True):
        same(a.isnan(), b.isnan())
    got = pointwise_tail_backward.pointwise_tail_backward_finalize(*backward, run=of("native"))
    want = pointwise_tail_backward.plain_finalize(*backward, None, PLAIN)
    assert not got.dgamma[7].isfinite()
    for a, b in zip(got[:5], want[:5], strict=True):
        same(a.isnan(), b.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_moment_form_has_the_same_bits_whatever_the_threads(dtype):
    forward, backward = moment_form(dtype, 130, 300)

    def run():
        tail = moments.moments_finalize(*forward, run=of("native"))
        return *tail, *pointwise_tail_backward.pointwise_tail_backward_finalize(*backward, run=of("native"))

    first, *others = pointwise.run_with_threads(run)
    for other in others:
        all_same(first, other)
