"""`bn_finalize` against float64 statistics of all rows together."""

import pytest
import torch
from compare import every, same, within
from convolutions import assert_same_sums

from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_finalize import Vectors, bn_finalize, bn_running, bn_stats_finalize
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.bn_stats_act import bn_stats_act
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")

EPS = 1e-3


def partials_of(y, rows):
    """Exact partial statistics, rounded to float32."""
    tiles = [(tile.mean(0), tile.var(0, correction=0) * len(tile)) for tile in y.split(rows)]
    return torch.stack([torch.stack(pair) for pair in tiles]).float()


def samples(pixels, channels, device, mean=0.5):
    generator = torch.Generator().manual_seed(pixels)
    return (torch.randn(pixels, channels, generator=generator, dtype=torch.float64) * 2 + mean).to(device)


def parameter(channels, dtype, device, seed):
    """Some zero, some negative."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(channels, generator=generator)
    values[::3] = 0
    return values.to(device, dtype)


def truth(y, gamma, beta, scale):
    mean, var = y.mean(0), y.var(0, correction=0)
    invstd = 1 / (var + EPS).sqrt()
    gamma = torch.ones_like(mean) if gamma is None else gamma.double()
    beta = torch.zeros_like(mean) if beta is None else beta.double()
    a = 1.0 if scale is None else scale.double()
    return Vectors(mean, var, invstd, a * gamma * invstd, a * (beta - gamma * invstd * mean))


def check(actual, expected, error):
    """Relative errors; that of the mean in units of mean and deviation, that of shift in units of its two terms."""
    actual = Vectors(*actual.double())
    unit = expected._replace(
        mean=expected.mean.abs() + expected.var.sqrt(), shift=(expected.scale * expected.mean).abs() + expected.shift.abs()
    )
    for name, got, true, one in zip(Vectors._fields, actual, expected, unit, strict=True):
        within(got, true, error * one.abs(), name)


@pytest.mark.parametrize(
    ("tiles", "rows", "missing", "channels"),
    [(1, 1, 0, 1), (1, 7, 0, 3), (2, 5, 4, 8), (9, 3, 1, 20), (64, 2, 1, 5), (65, 2, 0, 13), (600, 3, 2, 3)],
)
def test_merges_tiles(backend, device, tiles, rows, missing, channels):
    y = samples(tiles * rows - missing, channels, device)
    gamma, beta = parameter(channels, torch.float32, device, 1), parameter(channels, torch.float32, device, 2)
    actual = bn_finalize(partials_of(y, rows), rows, len(y), gamma, beta, EPS, run=of(backend))
    assert actual.shape == (5, channels)
    assert actual.dtype == torch.float32
    check(actual, truth(y, gamma, beta, None), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.0, 0.5])
@pytest.mark.parametrize("given", ["gamma and beta", "gamma", "beta", "neither"])
def test_parameters(backend, device, dtype, scale, given):
    y = samples(40, 12, device)
    gamma = parameter(12, dtype, device, 1) if "gamma" in given else None
    beta = parameter(12, dtype, device, 2) if "beta" in given else None
    a = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)
    actual = bn_finalize(partials_of(y, 10), 10, 40, gamma, beta, EPS, a, run=of(backend))
    check(actual, truth(y, gamma, beta, a), 2e-6)


def test_mean_far_above_deviation(backend, device):
    y = samples(1000, 20, device, mean=2000.0)
    actual = bn_finalize(partials_of(y, 10), 10, 1000, None, None, EPS, run=of(backend))
    check(actual, truth(y, None, None, None), 2e-5)


def test_float64_stays_float64(device):
    y = samples(40, 12, device)
    actual = bn_finalize(torch.stack((y, y * 0), 1), 1, 40, None, None, EPS, run=of("reference"))
    assert actual.dtype == torch.float64
    check(actual, truth(y, None, None, None), 1e-14)


def test_running_statistics_pass_unchanged(backend, device):
    mean = torch.tensor([0.1, -1000.0, 3e38, 0.0], device=device)
    var = torch.tensor([0.3, 0.0, 1e-30, float("inf")], device=device)
    v = Vectors(*bn_finalize(torch.stack((mean, var)).unsqueeze(0), 1, 1, None, None, EPS, run=of(backend)))
    same(v.mean, mean)
    same(v.var, var)
    same(v.scale, v.invstd)
    torch.testing.assert_close(v.invstd, 1 / (var + EPS).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(v.shift, -mean * v.invstd, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 20, 300])
@pytest.mark.parametrize("given", ["all", "none"])
def test_running_statistics(backend, device, dtype, channels, given):
    """In the buffers' dtype, and strided; NaN stays in its channel."""
    mean, var = (torch.stack([parameter(channels, dtype, device, seed)] * 2, 1)[:, 0] for seed in (1, 2))
    var = var.abs()
    mean[-1] = float("nan")
    bias, gamma, beta = [parameter(channels, dtype, device, seed) for seed in (3, 4, 5)] if given == "all" else [None] * 3
    a = torch.tensor(0.5, device=device) if given == "all" else None
    before = [t.clone() for t in (mean, var)]
    found = bn_running(mean, var, bias, gamma, beta, EPS, a, dtype=torch.float32, run=of(backend))
    for t, b in zip((mean, var), before, strict=True):
        same(t.nan_to_num(), b.nan_to_num())
    plain = torch.stack((mean.double() - (0 if bias is None else bias.double()), var.double())).unsqueeze(0)
    expected = bn_finalize(plain, 1, 1, gamma, beta, EPS, a, run=of("reference"))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_infinite_running_mean(backend, device):
    partials = torch.tensor([[[float("inf")], [1.0]]], device=device)
    v = Vectors(*bn_finalize(partials, 1, 1, None, None, EPS, run=of(backend)))
    assert (v.mean, v.var, v.shift) == (float("inf"), 1, -float("inf"))


def test_equal_tiles_have_no_variance(backend, device):
    partials = torch.tensor([[0.1, 1e6, -3.0], [0, 0, 0]], device=device).expand(70, 2, 3).contiguous()
    v = Vectors(*bn_finalize(partials, 4, 278, None, None, 1.0, run=of(backend)))
    torch.testing.assert_close(v.mean, partials[0, 0], rtol=2e-7, atol=0)
    every(v.var <= 1e-13 * v.mean**2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tile", [0, 69])
@pytest.mark.parametrize("row", [0, 1])
def test_not_finite_spoils_its_channel_only(backend, device, poison, tile, row):
    partials = partials_of(samples(140, 12, device), 2)
    clean = bn_finalize(partials, 2, 140, None, None, EPS, run=of(backend))
    partials[tile, row, 7] = poison
    actual = bn_finalize(partials, 2, 140, None, None, EPS, run=of(backend))
    assert not actual[1, 7].isfinite()
    others = [c for c in range(12) if c != 7]
    same(actual[:, others], clean[:, others])


def test_repeats_bit_for_bit_and_misaligned(backend, device):
    partials = partials_of(samples(140, 20, device), 2)
    first = bn_finalize(partials, 2, 140, None, None, EPS, run=of(backend))
    same(bn_finalize(partials, 2, 140, None, None, EPS, run=of(backend)), first)
    view = torch.cat([partials.new_zeros(1), partials.flatten()])[1:].view_as(partials)
    assert_same_sums(bn_finalize(view, 2, 140, None, None, EPS, run=of(backend)), first)


def test_bad_arguments(backend, device):
    partials = torch.zeros(3, 2, 4, device=device)

    def call(partials=partials, rows=2, pixels=6, gamma=None, scale=None):
        return bn_finalize(partials, rows, pixels, gamma, None, EPS, scale, run=of(backend))

    for pixels in (4, 7):
        with pytest.raises(ValueError, match=f"pixels: 3 tiles of 2 rows cannot hold {pixels} rows"):
            call(pixels=pixels)
    with pytest.raises(ValueError, match=r"partials: expected shape \(3, 2, 4\)"):
        call(torch.zeros(3, 3, 4, device=device))
    with pytest.raises(ValueError, match=r"gamma: expected shape \(4,\), got \(5,\)"):
        call(gamma=torch.zeros(5, device=device))
    with pytest.raises(ValueError, match=r"residual_scale: expected shape \(\), got \(1,\)"):
        call(scale=torch.zeros(1, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_both_steps_in_one_call_give_the_same_bits(backend, device, dtype, full):
    y = samples(333, 21, device).to(dtype)
    gamma, beta = (parameter(42, torch.float32, device, seed)[::2] if full else None for seed in (1, 2))
    scale = torch.tensor(0.3, device=device) if full else None
    partials, rows = bn_stats(y, run=of(backend))
    expected = bn_finalize(partials, rows, 333, gamma, beta, EPS, scale, run=of(backend))
    same(bn_stats_finalize(y, gamma, beta, EPS, scale, run=of(backend)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shortcut", ["none", "skip", "y2"])
def test_all_steps_in_one_call_give_the_same_bits(backend, device, dtype, shortcut):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels take no float64")
    y, other = samples(333, 21, device).to(dtype), samples(333, 21, device).flip(0).to(dtype)
    gamma, beta = (parameter(21, torch.float32, device, seed) for seed in (1, 2))
    scale, run = torch.tensor(0.3, device=device), of(backend)
    vectors2 = None if shortcut != "y2" else bn_stats_finalize(other, gamma, None, EPS, run=run)
    ends = {"skip": other} if shortcut == "skip" else {"y2": other, "vectors2": vectors2} if shortcut == "y2" else {}
    for end in ({"relu": False}, {"keep_signs": True}):
        expected = bn_stats_finalize(y, gamma, beta, EPS, scale, run=run)
        results = bn_act(y, expected, **ends, **end, run=run)
        vectors, out, signs = bn_stats_act(y, gamma, beta, EPS, scale, **ends, **end, run=run)
        same(vectors, expected)
        same(out, results[0])
        assert (signs is None) == (results[1] is None)
        if signs is not None:
            same(signs, results[1])


def test_what_does_not_fit_is_named(backend, device):
    y = samples(6, 4, device)
    for ends, message in (
        ({"skip": y, "y2": y, "vectors2": y[:5]}, "skip: expected either skip or y2"),
        ({"y2": y}, "vectors2: expected together with y2"),
        ({"skip": y[1:]}, "skip: expected shape"),
        ({"keep_signs": True, "relu": False}, "keep_signs: expected False without a ReLU"),
    ):
        with pytest.raises(ValueError, match=message):
            bn_stats_act(y, None, None, EPS, **ends, run=of(backend))
