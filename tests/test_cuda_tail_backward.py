"""The CUDA kernels of `pointwise_tail_backward`'s passes on the CPU under sanitizers, against float64 and autograd."""

import shutil

import cuda_operators
import cuda_products as products
import emulated_backend
import pytest
import torch
from compare import same, within
from cuda_emulator import CrashError
from moment_steps import backward_case, check_backward
from pointwise import Draw

from fused_res.layout import to_image, to_rows
from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_tail_backward import TailGradients, pointwise_tail_backward_apply
from fused_res.primitives.run import of

PASSES = ("pointwise_tail_backward_reduce", "pointwise_tail_backward_apply")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
slow, long = pytest.mark.slow, pytest.mark.long
every_dtype = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    operators = cuda_operators.TailBackward(tmp_path_factory.mktemp("emulator"))
    yield operators
    operators.close()


@pytest.fixture
def emulated(monkeypatch, operators):
    """With float32 as TF32."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "tf32"
    yield emulated_backend.install(monkeypatch, operators, PASSES)
    conv.fp32_precision = before


# Each pass by itself


def drawn(draw, shape, inner, outer, dtype):
    """z [n, h, w, inner], dout [P, outer], its signs, and which are open."""
    z, dout = draw(*shape, inner, dtype=dtype), draw(shape[0] * shape[1] * shape[2], outer, dtype=dtype, seed=1)
    opened = products.real(*dout.shape, seed=2) > -0.3
    return z, dout, pack_signs(opened), opened


SHAPES = [
    pytest.param((1, 3, 6), 3, 5, marks=slow),
    pytest.param((2, 5, 7), 24, 40, marks=slow),
    pytest.param((1, 30, 10), 20, 33, marks=long),
    pytest.param((1, 9, 6), 72, 136, marks=long),
]


@every_dtype
@pytest.mark.parametrize(("shape", "inner", "outer"), SHAPES, ids=str)
def test_reduce_is_exact_on_integers(operators, dtype, shape, inner, outer):
    """Also from a start of 100, with a mean and without; and so is g A."""
    z, dout, signs, opened = drawn(products.integers, shape, inner, outer, dtype)
    z[..., ::3] += 100
    scaled = products.integers(outer, inner, dtype=dtype, seed=3)
    g, rows = torch.where(opened, dout, 0).double(), z.view(-1, inner).double()
    for mean in (products.integers(inner, dtype=torch.float64), None):
        total, product, through = operators.pointwise_tail_backward_reduce(dout, signs, z, None, 1, 1, mean, scaled)
        assert operators.emulator.conflicts == {}
        same(total, g.sum(0))
        same(product, g.T @ (rows if mean is None else rows - mean))
        assert (through is None) == (max(inner, outer) > 64)
        if through is not None:
            same(through, (g @ scaled.double()).to(dtype))


@every_dtype
@pytest.mark.parametrize(("shape", "inner", "outer"), SHAPES, ids=str)
def test_apply_is_exact_on_integers(operators, dtype, shape, inner, outer):
    z, dout, signs, opened = drawn(products.integers, shape, inner, outer, dtype)
    rows, g = z.view(-1, inner).double(), torch.where(opened, dout, 0).double()
    scaled, quadratic = (products.integers(n, inner, low=-1, high=2, dtype=dtype, seed=3) for n in (outer, inner))
    mean, constant = products.integers(inner, dtype=torch.float64, seed=4), products.integers(inner, dtype=F32, seed=5)
    through = products.integers(len(dout), inner, dtype=dtype, seed=6)
    for start in (None, through):
        first = g @ scaled.double() if start is None else start.double()
        for live in (True, False):
            terms = (mean, quadratic, constant) if live else (None, None, None)
            want = first - ((rows - mean) @ quadratic.double() + constant.double() if live else 0)
            dz = torch.empty(len(dout), inner, dtype=dtype)
            operators.pointwise_tail_backward_apply(dz, start, dout, signs, z, None, 1, 1, scaled, *terms, False, False)
            assert operators.emulator.conflicts == {}
            same(dz, want.to(dtype))


@long
@every_dtype
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)], ids=str)
def test_joins_an_image_with_one_rounding(emulated, dtype, stride):
    draw, (n, h, w) = Draw(11, "cpu"), (2, 5, 6)
    size = (h - 1) * stride[0] + 1, w * stride[1]
    z, into = Activation(draw.integers(n, 24, *size, dtype=dtype), stride=stride), draw.integers(n, 24, *size, dtype=dtype)
    dout, opened = draw.integers(n, 40, h, w, dtype=dtype), draw.opened(n * h * w, 40)
    scaled, quadratic = draw.integers(40, 24, dtype=dtype), draw.integers(24, 24, dtype=dtype)
    mean, constant = draw.integers(24).double(), draw.integers(24, dtype=F32)
    rows = torch.where(opened, to_rows(dout), 0).double() @ scaled.double()
    rows -= (z.rows(of("reference")).double() - mean) @ quadratic.double() + constant
    wanted = into.double()
    wanted[:, :, :: stride[0], :: stride[1]] += to_image(rows, n, h, w)
    gradients = TailGradients(*[torch.zeros(0)] * 5, mean, quadratic, constant)
    pointwise_tail_backward_apply(dout, pack_signs(opened), z, scaled, None, gradients, into=into, run=of(emulated))
    same(into, wanted.to(dtype))


# Both passes, between the formulas of the other steps, against autograd

STEPS = pytest.mark.parametrize(
    ("training", "reread", "inner"),
    [(True, False, True), pytest.param(True, True, False, marks=long), pytest.param(False, True, True, marks=long)],
    ids=["live", "live, reread", "running"],
)


@STEPS
@every_dtype
@pytest.mark.parametrize(("shape", "inner_channels", "outer"), SHAPES[:1] + SHAPES[2:], ids=str)
def test_matches_autograd(emulated, operators, dtype, shape, inner_channels, outer, training, reread, inner):
    """TF32 keeps 11 bits of every factor."""
    case = backward_case(Draw(0, "cpu"), "reference", shape, inner_channels, outer, dtype, training=training)
    check_backward(case, emulated, 2.0**-10 if dtype == F32 else 8e-6, inner=inner, reread=reread)
    assert operators.emulator.conflicts == {}


@long
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_mean_far_above_the_deviation(emulated, dtype):
    """Sums count from a start: what cancels in M has been taken off before it is rounded."""
    check_backward(backward_case(Draw(4, "cpu"), "reference", (3, 9, 7), 20, 33, dtype, prologue=False, mean=64.0), emulated, 2e-5)


# What holds for all


def results(operators, dtype, channels=(72, 136), **options):
    z, dout, signs, _ = drawn(products.real, (1, 5, 20), *channels, dtype)
    inner, outer = channels
    v, mean = products.vectors(inner), products.real(inner, dtype=torch.float64, seed=7)
    scaled, quadratic = (products.real(n, inner, dtype=dtype, seed=3) for n in (outer, inner))
    reduced = operators.pointwise_tail_backward_reduce(dout, signs, z, v, 1, 1, mean, scaled, **options)
    dz, terms = torch.empty(len(dout), inner, dtype=dtype), (mean, quadratic, v[0].clone())
    partials = operators.pointwise_tail_backward_apply(dz, None, dout, signs, z, v, 1, 1, scaled, *terms, True, False, **options)
    return [t for t in (*reduced, dz, partials) if t is not None]


@pytest.mark.parametrize("channels", [pytest.param((24, 40), marks=slow), pytest.param((72, 136), marks=long)], ids=str)
@every_dtype
def test_thread_order_and_alignment_change_no_bit(operators, dtype, channels):
    """Nor does the tiling, which is another one off 16 bytes."""
    for one, other in zip(results(operators, dtype, channels), results(operators, dtype, channels, shift=1), strict=True):
        same(one, other)


@long
@pytest.mark.parametrize(
    "faults", [*({"skipped_barrier": i} for i in range(6)), {"skipped_wait": 0}, {"swapped": True}, {"unswizzled": 1}], ids=str
)
def test_planted_faults_show(operators, faults):
    right = results(operators, BF16, (64, 64))
    seen = [results(operators, BF16, (64, 64), **faults) for _ in range(2)]
    assert not all(torch.equal(a, b) for wrong in seen for a, b in zip(wrong, right, strict=True))


@slow
def test_overruns_show(operators):
    z, dout, signs, _ = drawn(products.real, (1, 5, 7), 24, 40, BF16)
    with pytest.raises(CrashError, match="heap-buffer-overflow"):
        operators.pointwise_tail_backward_reduce(dout, signs, z, None, 1, 1, None, None, short=1)


@slow
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_shut_out_does_not_matter(operators, poison):
    z, dout, signs, opened = drawn(products.real, (1, 5, 7), 24, 40, BF16)
    scaled = products.real(40, 24)
    clean = operators.pointwise_tail_backward_reduce(dout, signs, z, None, 1, 1, None, scaled)
    poisoned = torch.where(opened, dout, poison)
    for one, other in zip(
        clean, operators.pointwise_tail_backward_reduce(poisoned, signs, z, None, 1, 1, None, scaled), strict=True
    ):
        same(one, other)
    dz, again = (torch.empty(35, 24, dtype=BF16) for _ in range(2))
    for to, given in ((dz, dout), (again, poisoned)):
        operators.pointwise_tail_backward_apply(to, None, given, signs, z, None, 1, 1, scaled, None, None, None, False, False)
    same(dz, again)
    within(dz.double(), torch.where(opened, dout, 0).double() @ scaled.double(), 2.0**-6 * dz.double().abs() + 2.0**-6)
