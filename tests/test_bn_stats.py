"""`bn_stats` against float64, tile by tile."""

import pytest
import torch
from compare import same, within
from convolutions import assert_same_sums

from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

SHAPES = [(1, 1), (2, 3), (3, 64), (5, 20), (17, 8), (130, 100), (1001, 5)]


def activations(pixels, channels, dtype, device, mean=0.5, deviation=2.0):
    generator = torch.Generator().manual_seed(pixels + channels)
    y = torch.randn(pixels, channels, generator=generator, dtype=torch.float64) * deviation + mean
    return y.to(device, dtype)


def truth(y, rows):
    tiles = [(tile.double().mean(0), tile.double().var(0, correction=0) * len(tile)) for tile in y.split(rows)]
    return torch.stack([torch.stack(pair) for pair in tiles])


def check(y, backend, mean_error, squares_error):
    """Errors in units of each channel's deviation, and of each channel's sum of squares."""
    before = y.clone()
    partials, rows = bn_stats(y, run=of(backend))
    same(y, before)
    assert partials.dtype == (torch.float64 if y.dtype == torch.float64 else torch.float32)
    assert partials.shape == (-(-y.shape[0] // rows), 2, y.shape[1])
    expected = truth(y, rows)
    deviation = y.double().std(0, correction=0)
    within(partials[:, 0], expected[:, 0], mean_error * (deviation + y[0].double().abs() * 1e-3))
    within(partials[:, 1], expected[:, 1], squares_error * expected[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pixels", "channels"), SHAPES)
def test_matches_float64(backend, device, dtype, pixels, channels):
    check(activations(pixels, channels, dtype, device), backend, 1e-6, 5e-6)


def test_float64_stays_float64(device):
    check(activations(130, 20, torch.float64, device), "reference", 1e-14, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pixels", "channels"), [(1100, 20), (390, 100)])
def test_several_blocks_in_a_tile(backend, device, few_programs, dtype, pixels, channels):
    check(activations(pixels, channels, dtype, device), backend, 1e-6, 5e-6)


def test_mean_far_above_deviation(backend, device, few_programs):
    y = activations(1100, 20, torch.float32, device, mean=2000.0)
    check(y, backend, 1e-4, 5e-6)


def test_outlier_in_the_first_row(backend, device, few_programs):
    y = activations(1100, 3, torch.float32, device)
    y[0] = torch.tensor([1e4, -1e6, 0.0])
    check(y, backend, 1e-6, 5e-6)


def test_constant_channel_has_no_variance(backend, device, few_programs):
    y = torch.tensor([3.0, -1000.0, 0.0, 0.25], device=device).expand(1100, 4).contiguous()
    partials, _ = bn_stats(y, run=of(backend))
    same(partials[:, 0], y[: len(partials)])
    assert not partials[:, 1].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 129])
def test_not_finite_spoils_its_channel_only(backend, device, poison, row):
    y = activations(130, 20, torch.float32, device)
    clean, _ = bn_stats(y, run=of(backend))
    y[row, 7] = poison
    partials, _ = bn_stats(y, run=of(backend))
    assert not partials[:, 1, 7].isfinite().all()
    others = [c for c in range(20) if c != 7]
    same(partials[:, :, others], clean[:, :, others])


def test_repeats_bit_for_bit(backend, device, few_programs):
    y = activations(1001, 20, torch.bfloat16, device)
    same(bn_stats(y, run=of(backend))[0], bn_stats(y, run=of(backend))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned_memory(backend, device, dtype):
    y = activations(130, 64, dtype, device)
    view = torch.cat([y.new_zeros(1), y.flatten()])[1:].view_as(y)
    assert view.data_ptr() % 16
    assert_same_sums(bn_stats(view, run=of(backend))[0], bn_stats(y, run=of(backend))[0])


def test_bad_arguments(backend, device):
    y = torch.zeros(4, 6, device=device)
    with pytest.raises(ValueError, match=r"y: expected a matrix \[P, C\], got shape \(24,\)"):
        bn_stats(y.flatten(), run=of(backend))
    with pytest.raises(ValueError, match="y: expected at least one row"):
        bn_stats(y[:0], run=of(backend))
    with pytest.raises(ValueError, match="y: expected a contiguous tensor"):
        bn_stats(y.T, run=of(backend))
    with pytest.raises(TypeError, match="y: expected a floating-point dtype"):
        bn_stats(y.int(), run=of(backend))
    with pytest.raises(ValueError, match="backend: expected one of"):
        bn_stats(y, run=of("none such"))
