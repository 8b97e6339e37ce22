"""`moments` against float64, and the BN that follows from them against the statistics of the convolution's output."""

import pytest
import torch
from compare import all_same, every, same
from convolutions import assert_same_sums, every_dtype, misaligned
from moment_steps import check_moments as check
from pointwise import Draw, exact_rows, run_with_threads
from torch.utils._python_dispatch import TorchDispatchMode

from fused_res.primitives.bn_finalize import Vectors
from fused_res.primitives.moments import SUSPECT, moments, moments_finalize
from fused_res.primitives.operands import Activation
from fused_res.primitives.run import of
from fused_res.spec import ConvBN

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# Images and channels; the last two have several tiles, one of them none but full ones, the other more than one panel of columns
# in every backend.
SHAPES = [((1, 1, 1), 3), ((2, 1, 1), 5), ((1, 3, 1), 64), ((1, 1, 5), 20), ((2, 9, 7), 33), ((2, 16, 16), 64), ((1, 20, 21), 100)]
EPS = 1e-5


@every_dtype
@pytest.mark.parametrize("prologue", [True, False], ids=["activation", "plain"])
@pytest.mark.parametrize(("shape", "channels"), SHAPES, ids=str)
def test_matches_float64(backend, device, dtype, shape, channels, prologue):
    n, h, w = shape
    check(Draw(0, device).activation(n, channels, h, w, dtype, prologue=prologue), backend)


class Lopsided(TorchDispatchMode):
    """A library whose matrix products round differently above the diagonal than below."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default:
            upper = torch.ones_like(result, dtype=torch.bool).triu(1)
            result = torch.where(upper, result.nextafter(torch.full_like(result, torch.inf)), result)
        return result


def test_symmetric_whatever_the_library_rounds_to(backend, device):
    with Lopsided():
        for height in (3, 30):
            check(Draw(13, device).activation(1, 20, height, 1, torch.float32), backend)


def test_float64_stays_float64(cpu_backend):
    check(Draw(1, "cpu").activation(2, 20, 9, 7, torch.float64), cpu_backend, 1e-14)


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (5, 9)], ids=str)
def test_every_stride(backend, device, stride):
    check(Draw(2, device).activation(2, 20, 9, 8, torch.float32, stride=stride), backend)


@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_mean_far_above_deviation(backend, device, mean):
    check(Draw(3, device).activation(2, 20, 21, 20, torch.float32, prologue=False, mean=mean), backend)


def test_outliers(backend, device):
    z = Draw(4, device).activation(2, 8, 21, 20, torch.float32, prologue=False)
    z.image[0, :4, 0, 0] = torch.tensor([1e4, -1e6, 0.0, 1e-6], device=device)
    z.image[1, :4, 20, 19] = torch.tensor([-1e5, 1e6, 1e3, 1e6], device=device)
    check(z, backend)


@every_dtype
@pytest.mark.parametrize("channels", [20, 100])
def test_values_at_the_end_of_float16(backend, device, dtype, channels):
    """They differ by more than float16 holds, both near a far pivot and around 0, where they are counted from."""
    draw = Draw(12, device)
    values = 60000 + 32 * draw.integers(3, channels, 20, 21, dtype=torch.float32)
    often = draw.normal(3, channels, 20, 21, dtype=torch.float32) > 0
    seldom = draw.normal(3, channels, 20, 21, dtype=torch.float32) > 2
    values[:, ::2] *= torch.where(seldom, -1, 1)[:, ::2]
    values[:, 1::2] *= torch.where(often, -1, 1)[:, 1::2]
    check(Activation(values.to(dtype)), backend)


def test_drift(backend, device):
    """Rows that come sorted: the blocks' means are further apart than their deviations."""
    z = Draw(5, device).activation(1, 8, 40, 20, torch.float32, prologue=False)
    z.image += torch.linspace(-1e4, 1e4, 40, device=device)[:, None]
    check(z, backend)


def test_constant_and_equal_channels(backend, device):
    z = Draw(6, device).activation(2, 8, 9, 7, torch.float32, prologue=False)
    z.image[:, 2], z.image[:, 3] = 0, 1000.1
    z.image[:, 5] = z.image[:, 4]
    check(z, backend)
    _, covariance = moments(z, run=of(backend))
    assert not covariance[2].any()
    same(covariance[4], covariance[5])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_spoils_its_channel_only(backend, device, poison):
    z = Draw(7, device).activation(2, 20, 9, 7, torch.float32, prologue=False)
    clean = moments(z, run=of(backend))
    z.image[1, 7, 3, 3] = poison
    mean, covariance = moments(z, run=of(backend))
    others = [c for c in range(20) if c != 7]
    assert not mean[7].isfinite()
    assert not covariance[7].isfinite().any()
    same(mean[others], clean.mean[others])
    same(covariance[others][:, others], clean.covariance[others][:, others])


def test_nan_passes_the_relu(backend, device):
    z = Draw(8, device).activation(1, 8, 3, 3, torch.float32)
    z.image[0, 2, 1, 1] = float("nan")
    assert moments(z, run=of(backend)).mean[2].isnan()


@every_dtype
def test_misaligned_and_repeated(backend, device, dtype):
    z = Draw(9, device).activation(2, 64, 9, 7, dtype)
    first, again = (moments(z, run=of(backend)) for _ in range(2))
    moved = moments(Activation(misaligned(z.image), z.vectors), run=of(backend))
    for a, b, c in zip(first, again, moved, strict=True):
        same(a, b)
        assert_same_sums(c, a)


def test_same_bits_whatever_the_threads(cpu_backend):
    if cpu_backend == "reference":
        pytest.skip("the library's own products")
    z = Draw(10, "cpu").activation(2, 70, 60, 50, torch.float32)
    first, *others = run_with_threads(lambda: moments(z, run=of(cpu_backend)))
    for other in others:
        all_same(first, other)


def test_no_rows(backend, device):
    with pytest.raises(ValueError, match="z: expected at least one row"):
        moments(Activation(torch.empty(0, 4, 3, 3, device=device)), run=of(backend))


def batch_norm(z, unit, backend):
    """Mean and variance of y = W z, in float64 from the rounded operands."""
    y = exact_rows(z, backend) @ unit.weight.flatten(1).double().T
    return y.mean(0), y.var(0, correction=0)


@every_dtype
@pytest.mark.parametrize("residual_scale", [None, 0.5])
def test_finalize_gives_the_statistics_of_the_output(backend, device, dtype, residual_scale):
    draw = Draw(11, device)
    z, weight = draw.activation(3, 20, 9, 7, dtype), draw.normal(33, 20, 1, 1, dtype=dtype)
    gamma, beta = draw.normal(33, dtype=torch.float32), draw.normal(33, dtype=torch.float32)
    unit = ConvBN(weight, gamma=gamma, beta=beta, eps=EPS)
    scale = None if residual_scale is None else torch.tensor(residual_scale, device=device)
    found, suspect = moments_finalize(moments(z, run=of(backend)), z, unit, scale, run=of(backend))
    v, (mean, var) = Vectors(*found), batch_norm(z, unit, backend)
    a = 1.0 if residual_scale is None else residual_scale
    invstd = 1 / (var + EPS).sqrt()
    expected = mean, var, invstd, a * gamma * invstd, a * (beta - gamma * invstd * mean)
    assert not suspect.any()
    for got, want in zip(v, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distance", [0.0, 1e-2])
def test_row_orthogonal_to_the_data(backend, device, dtype, distance):
    """Where the quadratic form cancels, the direct pass gives the variance, to 0 or to a millionth."""
    draw = Draw(12, device)
    z, weight = draw.activation(3, 20, 9, 7, dtype, prologue=False, mean=1.0), draw.normal(9, 20, 1, 1, dtype=dtype)
    z.image[:, 1] = (z.image[:, 0].double() + distance * draw.normal(3, 9, 7)).to(dtype)
    weight[4] = 0
    weight[4, 0], weight[4, 1] = 1, -1
    unit = ConvBN(weight, eps=EPS)
    mean, var = batch_norm(z, unit, backend)
    vectors, suspect = moments_finalize(moments(z, run=of(backend)), z, unit, run=of(backend))
    assert suspect.nonzero().flatten().tolist() == [4]
    torch.testing.assert_close(vectors[0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vectors[1].double(), var, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(("channels", "inner"), [(1, 1), (5, 130), (37, 257), (9, 2048)], ids=str)
def test_finalize_of_every_width(backend, device, channels, inner):
    """Rows longer than what a program holds at once, and channels that fill no block; NaN stays where it is, bits repeat."""
    draw = Draw(13, device)
    z, weight = (
        draw.activation(2, inner, 3, 4, torch.float32, prologue=False),
        draw.normal(channels, inner, 1, 1, dtype=torch.float32),
    )
    weight[:, 0] += 200  # of a sum of thousands of equals so much cancels that its variance is not trusted
    found = moments(z, run=of("reference"))
    unit = ConvBN(weight, gamma=draw.normal(channels, dtype=torch.float32), eps=EPS)
    vectors, suspect = moments_finalize(found, z, unit, run=of(backend))
    mean, var = batch_norm(z, unit, backend)
    assert not suspect.any()
    torch.testing.assert_close(vectors[0].double(), mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(vectors[1].double(), var, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(vectors[3].double(), unit.gamma.double() / (var + EPS).sqrt(), rtol=1e-6, atol=1e-9)
    same(moments_finalize(found, z, unit, run=of(backend))[0], vectors)
    weight[0, 0] = float("nan")
    spoilt, suspect = moments_finalize(found, z, unit, run=of(backend))
    every(spoilt[:, 0].isnan())
    assert not suspect.any()
    same(spoilt[:, 1:], vectors[:, 1:])


def test_every_row_orthogonal_to_the_data(backend, device):
    """The direct pass for all channels, more than one of its blocks and tiles."""
    draw = Draw(14, device)
    z = draw.activation(2, 4, 10, 14, torch.float32, prologue=False, mean=3.0)
    z.image[:, 1] = z.image[:, 0] + 1e-3 * draw.normal(2, 10, 14, dtype=torch.float32)
    weight = torch.zeros(70, 4, 1, 1, device=device)
    weight[:, 0, 0, 0] = torch.arange(1, 71, device=device)
    weight[:, 1, 0, 0] = -weight[:, 0, 0, 0]
    unit = ConvBN(weight, eps=EPS)
    mean, var = batch_norm(z, unit, backend)
    vectors, suspect = moments_finalize(moments(z, run=of(backend)), z, unit, run=of(backend))
    every(suspect)
    torch.testing.assert_close(vectors[0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vectors[1].double(), var, rtol=2e-6, atol=1e-30)


def test_the_kernel_suspects_what_the_formula_suspects():
    pytest.importorskip("triton")
    from fused_res.kernels import moments_finalize as kernels

    assert kernels.SUSPECT == SUSPECT


def test_a_strided_operand_has_rows_that_32_bits_count():
    pytest.importorskip("triton")
    from fused_res.kernels.operands import operand

    image = torch.empty((2**19, 8, 64, 64), device="meta").contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"z: expected fewer than 2\^31 pixels at stride \(2, 2\), got 2147483648"):
        operand("z", Activation(image, stride=(2, 2)), image)
    assert operand("z", Activation(image[1:], stride=(2, 2)), image).pixels == 32 * 32
    assert len(operand("z", Activation(image), image).data) == 2**31
