"""The CUDA kernels of `moments` on the CPU under sanitizers, against float64."""

import shutil

import cuda_operators
import cuda_products as products
import pytest
import torch
from compare import every, same, within
from cuda_emulator import CrashError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
]

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
slow, long = pytest.mark.slow, pytest.mark.long
# One pixel; ragged; more columns than 64, 16 bytes at a time.
SHAPES = [pytest.param((1, 1, 1, 3), marks=slow), pytest.param((2, 5, 9, 20), marks=slow), pytest.param((1, 3, 15, 72), marks=long)]


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    operators = cuda_operators.Moments(tmp_path_factory.mktemp("emulator"))
    yield operators
    operators.close()


def expected(z, v=None, stride=(1, 1)):
    """Mean and covariance of the values that are multiplied, and their deviations; a value's own rounding is the least."""
    rows = products.multiplied(products.sampled(z, v, stride))
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    return rows.mean(0), covariance, covariance.diagonal().sqrt() + 2.0**-24 * rows.abs().amax(0)


def check(operators, z, v=None, stride=(1, 1)):
    mean, covariance = operators.moments(z, v, *stride)
    assert operators.emulator.conflicts == {}
    true_mean, true_covariance, unit = expected(z, v, stride)
    within(mean, true_mean, 32 * 2.0**-24 * unit)
    within(covariance, true_covariance, 32 * 2.0**-24 * torch.outer(unit, unit))
    same(covariance, covariance.T)
    return mean, covariance


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(operators, dtype, shape):
    z = products.real(*shape, dtype=dtype)
    check(operators, z)
    check(operators, z, products.vectors(shape[-1]))


@long
@every_dtype
@pytest.mark.parametrize("shape", [(2, 9, 7, 64), (1, 20, 15, 40), (1, 10, 10, 136), (1, 4, 10, 260)], ids=str)
def test_matches_float64_over_tiles_and_blocks(operators, dtype, shape):
    """More tiles of pixels than one, and blocks of columns above the diagonal."""
    z = products.real(*shape, dtype=dtype)
    check(operators, z, products.vectors(shape[-1]))
    far = (products.real(*shape, dtype=torch.float64) + 100).to(dtype)
    check(operators, far)


@slow
@every_dtype
def test_exact_on_integers(operators, dtype):
    """Also those that are counted from a start: 97 to 103, near enough to 100, beside others around 0."""
    z = products.integers(2, 9, 15, 24, dtype=dtype)
    z[..., ::3] += 100
    mean, covariance = operators.moments(z, None, 1, 1)
    true_mean, true_covariance, _ = expected(z)
    within(mean, true_mean, 2.0**-50 * true_mean.abs().max())
    within(covariance, true_covariance, 2.0**-46 * true_covariance.abs().max())


@long
@every_dtype
@pytest.mark.parametrize("stride", [(2, 3), (5, 11)], ids=str)
def test_strides(operators, dtype, stride):
    check(operators, products.real(2, 9, 10, 12, dtype=dtype), products.vectors(12), stride)


@long
@every_dtype
def test_means_far_above_deviations(operators, dtype):
    """Where float16 or bfloat16 have digits for it, deviations of a few units in the last place of a mean are exact."""
    z = products.real(1, 12, 25, 12, dtype=torch.float64) * torch.logspace(-3, 2, 12, dtype=torch.float64) + 1000
    check(operators, z.to(dtype))


@long
@every_dtype
def test_values_at_the_end_of_float16(operators, dtype):
    z = 60000 + 32 * products.integers(1, 6, 20, 12, dtype=torch.float32)
    seldom, often = products.real(1, 6, 20, 12, dtype=torch.float32) > 2, products.real(1, 6, 20, 12, seed=1) > 0
    z[..., ::2] *= torch.where(seldom, -1, 1)[..., ::2]
    z[..., 1::2] *= torch.where(often, -1, 1)[..., 1::2]
    check(operators, z.to(dtype))


@long
def test_outliers_and_drift(operators):
    """Rows that come sorted, and starts that are no outliers."""
    z = products.real(1, 24, 25, 8, dtype=torch.float32)
    z[0, :, :, :4] += torch.linspace(-1e4, 1e4, 24)[:, None, None]
    z[0, 0, 0] = torch.tensor([1e4, -1e6, 0.0, 1e-6] * 2)
    z[0, 23, 24] = torch.tensor([-1e5, 1e6, 1e3, 1e6] * 2)
    check(operators, z)


@slow
def test_constant_and_equal_channels(operators):
    z = products.real(2, 7, 9, 8, dtype=torch.float32)
    z[..., 2], z[..., 3], z[..., 5] = 0, 1000.1, z[..., 4]
    _, covariance = check(operators, z)
    assert not covariance[2:4].any()
    same(covariance[4], covariance[5])


@long
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite_spoils_its_channel_only(operators, poison):
    z = products.real(2, 7, 9, 20, dtype=torch.bfloat16)
    clean = operators.moments(z, None, 1, 1)
    z[1, 3, 3, 7] = poison
    mean, covariance = operators.moments(z, None, 1, 1)
    others = [c for c in range(20) if c != 7]
    every(~mean[7].isfinite())
    every(~covariance[7].isfinite())
    same(mean[others], clean[0][others])
    same(covariance[others][:, others], clean[1][others][:, others])


@long
@every_dtype
def test_thread_order_and_alignment_change_no_bit(operators, dtype):
    """Nor does the tiling, which is another one off 16 bytes."""
    z, v = products.real(1, 6, 12, 72, dtype=dtype), products.vectors(72)
    z[..., 5] += 50
    first = operators.moments(z, v, 1, 1)
    for one, other in zip(first, operators.moments(z, v, 1, 1, shift=1), strict=True):
        same(one, other)


FAULTS = [*({"skipped_barrier": i} for i in range(5)), {"skipped_wait": 0}, {"swapped": True}, {"unswizzled": 1}]


@long
@pytest.mark.parametrize(("faults", "far"), [*((fault, True) for fault in FAULTS), *((fault, False) for fault in FAULTS[3:])])
def test_planted_faults_show(operators, faults, far):
    """Barriers of the starts, of the stages and of the sums; a wait; fragments; a reader that knows of no swizzle: in the loop for
    columns far from 0 and, but for the starts', in the one for those near it.
    """
    z, v = products.real(1, 8, 20, 64, dtype=torch.bfloat16), products.vectors(64)
    if far:
        z[..., ::5] += 20
    right = operators.moments(z, v, 1, 1)
    seen = [operators.moments(z, v, 1, 1, **faults) for _ in range(2)]
    assert not all(torch.equal(a, b) for wrong in seen for a, b in zip(wrong, right, strict=True))


@slow
def test_overruns_and_early_ends_show(operators):
    z = products.real(1, 5, 7, 24, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="has not waited for all its copies"):
        operators.moments(z, None, 1, 1, early=True)
    with pytest.raises(CrashError, match="heap-buffer-overflow"):
        operators.moments(z, None, 1, 1, short=1)
