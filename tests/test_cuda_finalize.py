"""The CUDA kernels of the moment form's finalize steps, and of `move_statistics`, on the CPU under sanitizers, against float64."""

import shutil

import cuda_operators
import emulated_backend
import pytest
import torch
from compare import every, same, within
from cuda_emulator import CrashError
from moment_steps import EPS, backward_case, check_backward
from pointwise import Draw, exact_rows

from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.moments import SUSPECT, Moments, moments, moments_finalize, plain_finalize
from fused_res.primitives.pointwise_tail_backward import (
    plain_scaled_weight,
    pointwise_tail_backward_finalize,
    pointwise_tail_backward_reduce,
)
from fused_res.primitives.run import PLAIN, of
from fused_res.spec import ConvBN

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Images, inner and outer channels: a row of a tile, ragged, several tiles and stretches.
SHAPES = [((1, 3, 6), 1, 1), ((3, 5, 7), 33, 70), ((2, 5, 4), 130, 9)]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    operators = cuda_operators.Finalize(tmp_path_factory.mktemp("emulator"))
    yield operators
    operators.close()


@pytest.fixture
def emulated(monkeypatch, operators):
    """With float32 as it is: so do the formulas of the other steps take it."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    finalize = ("move_statistics", "moments_finalize", "pointwise_tail_backward_finalize")
    yield emulated_backend.install(monkeypatch, operators, finalize)
    conv.fp32_precision = before


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def unit_of(draw, outer, inner, dtype, parameters=torch.float32):
    weight = draw.normal(outer, inner, 1, 1, dtype=dtype)
    gamma, beta = (None if parameters is None else draw.normal(outer, dtype=parameters) for _ in range(2))
    return ConvBN(weight, gamma=gamma, beta=beta, eps=EPS)


# moments_finalize


@every_dtype
@pytest.mark.parametrize(("shape", "inner", "outer"), [*SHAPES[:2], pytest.param(*SHAPES[2], marks=pytest.mark.slow)], ids=str)
def test_moments_finalize(emulated, dtype, shape, inner, outer):
    n, h, w = shape
    for seed, parameters in enumerate((None, dtype, torch.float64)):
        draw = Draw(seed, "cpu")
        z, unit = draw.activation(n, inner, h, w, dtype), unit_of(draw, outer, inner, dtype, parameters)
        scale = None if parameters is None else torch.tensor(0.5, dtype=parameters)
        found = moments(z, run=of("reference"))
        vectors, suspect = moments_finalize(found, z, unit, scale, run=of(emulated))
        wide = unit._replace(weight=unit.weight.double())
        expected = plain_finalize(found, z, wide, scale, PLAIN)
        same(suspect, expected.suspect)
        assert vectors.dtype == torch.float32
        size = expected.vectors.abs() + expected.vectors[3].abs() * expected.vectors[:2].abs().sum(0)
        within(vectors, expected.vectors, 2.0**-23 * size)


@every_dtype
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("prologue", [True, False], ids=["activation", "plain"])
def test_channels_that_cancel_take_the_direct_pass(emulated, dtype, stride, prologue):
    """In more than one tile of pixels and stretch of channels, beside others that do not."""
    draw = Draw(1, "cpu")
    z = draw.activation(2, 5, 23, 21, dtype, prologue=prologue, stride=stride, mean=0.0 if prologue else 3.0)
    z.image[:, 1] = z.image[:, 0]
    if prologue:
        z.vectors[:, 1] = z.vectors[:, 0]
    unit = unit_of(draw, 70, 5, dtype)
    cancelling = torch.zeros(70, dtype=torch.bool)
    cancelling[[1, 62, 69]] = True
    unit.weight[cancelling] = 0
    unit.weight[cancelling, 0, 0, 0] = torch.arange(1, 4).to(dtype)
    unit.weight[cancelling, 1] = -unit.weight[cancelling, 0]
    unit.weight[cancelling, 2] = 2.0**-7
    found = moments(z, run=of("reference"))
    vectors, suspect = moments_finalize(found, z, unit, run=of(emulated))
    same(suspect, cancelling)
    y = exact_rows(z, "reference") @ unit.weight.flatten(1).double().T
    mean, var = y.mean(0), y.var(0, correction=0)
    within(vectors[0], mean, 2.0**-23 * (mean.abs() + y.abs().amax(0)))
    within(vectors[1], var, 2.0**-22 * var)


def test_not_finite_spoils_its_channel_only(emulated):
    draw = Draw(2, "cpu")
    z, unit = draw.activation(2, 20, 3, 4, torch.float32), unit_of(draw, 40, 20, torch.float32)
    found = moments(z, run=of("reference"))
    vectors, _ = moments_finalize(found, z, unit, run=of(emulated))
    unit.weight[7, 3] = float("nan")
    spoilt, suspect = moments_finalize(found, z, unit, run=of(emulated))
    assert not suspect.any()
    every(spoilt[:, 7].isnan())
    others = torch.arange(40) != 7
    same(spoilt[:, others], vectors[:, others])


# pointwise_tail_backward_finalize


@every_dtype
@pytest.mark.parametrize("training", [True, False], ids=["live", "running"])
@pytest.mark.parametrize(("shape", "inner", "outer"), [SHAPES[1], pytest.param(*SHAPES[0], marks=pytest.mark.slow)], ids=str)
def test_backward_finalize(emulated, dtype, shape, inner, outer, training):
    """Between the formulas of the other steps, against autograd."""
    check_backward(backward_case(Draw(3, "cpu"), "reference", shape, inner, outer, dtype, training=training), emulated, 8e-6)


@pytest.mark.parametrize(
    ("known", "parameters"), [(True, None), (False, torch.float64)], ids=["known, plain", "found again, affine"]
)
def test_backward_finalize_against_the_formula(emulated, known, parameters):
    """More channels than a tile has, some of which cancel; the weight's own gradient is exact on integers."""
    draw = Draw(4, "cpu")
    c = backward_case(draw, "reference", (2, 9, 8), 70, 130, torch.float32, prologue=False, mean=1.0)
    image, weight = c.branch.z.image, c.branch.weight
    image[:, 1], weight[4:100:5] = image[:, 0], 0
    weight[4:100:5, 0], weight[4:100:5, 1], weight[4:100:5, 2] = 1, -1, 2.0**-8
    found = moments(c.branch.z, run=of("reference"))
    scaled = plain_scaled_weight(c.branch)
    sums = pointwise_tail_backward_reduce(c.dout, c.signs, c.branch.z, found.mean, None, run=of("reference"))
    gamma, beta = (None if parameters is None else draw.normal(130, dtype=parameters) for _ in range(2))
    scale = None if parameters is None else torch.tensor(0.5, dtype=parameters)
    suspect = torch.zeros(130, dtype=torch.bool)
    suspect[4:100:5] = True
    arguments = sums, found, c.branch, scaled, gamma, beta, scale, c.dout, c.signs, suspect if known else None
    got, want = (pointwise_tail_backward_finalize(*arguments, run=of(b)) for b in (emulated, "reference"))
    for field in ("dgamma", "dbeta", "dscale", "dbias", "dweight", "constant", "quadratic"):
        one, other = getattr(got, field), getattr(want, field)
        assert one.dtype == other.dtype
        # B is summed in float32: 130 roundings of its largest terms at most, of which few are alike.
        error = 2.0**-20 if field == "quadratic" else 2.0**-23
        within(one.double(), other.double(), error * other.double().abs().max() + 2.0**-23 * other.double().abs())
    same(got.mean, found.mean)


def test_backward_finalize_reads_only_what_is_open(emulated):
    draw = Draw(5, "cpu")
    c = backward_case(draw, "reference", (2, 9, 8), 3, 20, torch.bfloat16, prologue=False, mean=1.0)
    c.branch.z.image[:, 1], c.branch.weight[:] = c.branch.z.image[:, 0], 0
    c.branch.weight[:, 0], c.branch.weight[:, 1], c.branch.weight[:, 2] = 1, -1, 2.0**-8
    found = moments(c.branch.z, run=of("reference"))
    sums = pointwise_tail_backward_reduce(c.dout, c.signs, c.branch.z, found.mean, None, run=of("reference"))
    arguments = Moments(*found), c.branch, None, None, None, None
    clean = pointwise_tail_backward_finalize(sums, *arguments, c.dout, c.signs, run=of(emulated))
    opened = unpack_signs(c.signs, 20).view(2, 9, 8, 20).permute(0, 3, 1, 2)
    poisoned = torch.where(opened, c.dout, float("nan"))
    again = pointwise_tail_backward_finalize(sums, *arguments, poisoned, c.signs, run=of(emulated))
    every(clean.dgamma.isfinite())
    same(clean.dgamma, again.dgamma)
    assert clean.quadratic is None
    assert clean.mean is None


# scaled_weight


@every_dtype
@pytest.mark.parametrize("tf32", [False, True], ids=["as it is", "tf32"])
def test_scaled_weight(operators, dtype, tf32):
    draw = Draw(6, "cpu")
    weight, vectors = draw.normal(70, 33, dtype=dtype), draw.normal(5, 70, dtype=torch.float32)
    weight[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    for given in (vectors, None):
        wanted = (weight if given is None else vectors[3, :, None] * weight).to(dtype)
        if tf32 and dtype == torch.float32:
            bits = wanted.view(torch.int32)
            bits = ((bits + 0x1000) >> 13) << 13  # halves go away from 0
            wanted = torch.where(wanted.isnan(), wanted, bits.view(torch.float32))
        same(operators.scaled_weight(weight, given, tf32).nan_to_num(7), wanted.nan_to_num(7))


# What holds for all


def results(operators, **options):
    """Everything that these kernels give for one problem, in which some channels cancel."""
    draw = Draw(7, "cpu")
    pixels, inner, outer = 300, 70, 40
    z, weight = (
        draw.normal(pixels, inner, dtype=torch.bfloat16).view(3, 10, 10, inner),
        draw.normal(outer, inner, dtype=torch.bfloat16),
    )
    z[..., 1], weight[::7] = z[..., 0], 0
    weight[::7, 0], weight[::7, 1], weight[::7, 2] = 1, -1, 2.0**-8
    rows = z.double().reshape(pixels, inner)
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / pixels
    covariance = (covariance + covariance.T) / 2
    gamma, beta = draw.normal(outer, dtype=torch.float32), draw.normal(outer, dtype=torch.float32)
    affine = gamma, beta, EPS, None, SUSPECT
    vectors, suspect = operators.moments_finalize_direct(mean, covariance, z, None, 1, 1, False, weight, *affine, **options)
    scaled = operators.scaled_weight(weight, vectors, False, **options)
    dout, opened = draw.normal(pixels, outer, dtype=torch.bfloat16), draw.opened(pixels, outer)
    signs = (opened.view(pixels, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    total, product = draw.normal(outer).double(), draw.normal(outer, inner).double()
    operands = total, product, dout, signs, z, None, 1, 1, False, mean, covariance, None, weight, vectors, scaled
    finalize = operators.pointwise_tail_backward_finalize_direct
    return vectors, suspect, scaled, *finalize(*operands, gamma, beta, None, SUSPECT, **options)


@pytest.mark.slow
def test_thread_order_and_alignment_change_no_bit(operators):
    first = results(operators)
    assert first[1].any()
    for shift in (0, 1):
        for one, other in zip(first, results(operators, shift=shift), strict=True):
            same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", range(6))
def test_every_missing_barrier_shows(operators, barrier):
    """Of the direct pass, the products and the merges: a result changes, or memory that nobody has written to is read."""
    right = results(operators)
    try:
        wrong = results(operators, skipped_barrier=barrier)
    except CrashError:  # at a flag that is neither true nor false
        return
    assert not all(torch.equal(a, b) for a, b in zip(wrong, right, strict=True))


# move_statistics


def test_move_statistics(operators):
    """More units than a launch takes, of every dtype; those that share a BN move it one after the other."""
    draw, kinds = Draw(8, "cpu"), (*DTYPES, torch.float64)
    units = []
    for i in range(70):
        channels = (1, 300, 64)[i % 3]
        vectors = draw.normal(5, channels, dtype=torch.float32)
        mean, var = (draw.normal(channels, dtype=kinds[(i + k) % 4]) for k in range(2))
        units.append([mean, var, torch.tensor(i), vectors, i + 2, 0.1 * (i % 11)])
    units[40][:3], units[67][:3] = units[1][:3], units[1][:3]
    wanted = [[t.clone() for t in unit[:3]] for unit in units]
    wanted[40], wanted[67] = wanted[1], wanted[1]
    for (mean, var, count), (*_, vectors, pixels, momentum) in zip(wanted, units, strict=True):
        for running, batch, correction in ((mean, vectors[0], 1.0), (var, vectors[1], pixels / (pixels - 1))):
            value = (1 - momentum) * running.double() + momentum * (correction * batch.double())
            running.copy_(value if running.dtype == torch.float64 else value.float())
        count += 1
    columns = list(zip(*units, strict=True))
    operators.move_statistics.default(columns[0], columns[1], columns[2], *columns[3:])
    for unit, expected in zip(units, wanted, strict=True):
        for got, want in zip(unit[:3], expected, strict=True):
            same(got, want)
