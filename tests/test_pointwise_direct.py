"""`pointwise_direct`: the statistics and sums of single channels of y = W z, against float64, on integers to the last bit."""

import pytest
import torch
from compare import every, same
from convolutions import assert_same_sums, every_dtype, misaligned
from pointwise import Draw, exact_rows, statistics

from fused_res.layout import to_rows
from fused_res.primitives.bn_act import pack_signs, unpack_signs
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_direct import pointwise_direct_stats, pointwise_direct_sums
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# Images, inner and outer channels; the last has several tiles, the last of them ragged, and a block of channels without suspects.
SHAPES = [((1, 1, 1), 3, 5), ((3, 5, 7), 33, 70), ((1, 9, 33), 20, 130)]


def unchanged(tensors, before):
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


class Case:
    """Operands of both functions, all integers: whatever order their products are summed in, the sums are exact."""

    def __init__(self, seed, device, shape, inner, outer, dtype, *, prologue=True, stride=(1, 1)):
        draw, (n, h, w) = Draw(seed, device), shape
        size = (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1
        vectors = draw.vectors(inner).to(statistics(dtype)) if prologue else None
        self.z = Activation(draw.integers(n, inner, *size, dtype=dtype), vectors, stride)
        self.weight = draw.integers(outer, inner, 1, 1, dtype=dtype)
        self.dout = draw.integers(n, outer, h, w, dtype=dtype)
        self.signs = pack_signs(draw.opened(n * h * w, outer))
        self.mean = draw.integers(outer, dtype=statistics(dtype))
        self.suspect = torch.zeros(outer, dtype=torch.bool, device=device)
        self.suspect[[0, 3, -1]] = True

    def stats(self, backend):
        before = self.z.image.clone(), self.weight.clone()
        found = pointwise_direct_stats(self.z, self.weight, self.suspect, run=of(backend))
        assert found.dtype == torch.float64
        assert found.shape == (2, len(self.suspect))
        unchanged((self.z.image, self.weight), before)
        return found

    def sums(self, backend):
        before = self.dout.clone(), self.signs.clone()
        arguments = self.dout, self.signs, self.z, self.weight, self.mean, self.suspect
        found = pointwise_direct_sums(*arguments, run=of(backend))
        assert found.dtype == torch.float64
        assert found.shape == (len(self.suspect),)
        unchanged((self.dout, self.signs), before)
        return found

    def y(self, backend):
        return exact_rows(self.z, backend) @ self.weight.flatten(1).double().T

    def check(self, backend):
        stats, sums, y = self.stats(backend), self.sums(backend), self.y(backend)
        every(stats.isfinite())
        every(sums.isfinite())
        # A division by a number is, on a GPU, a product with its rounded reciprocal; the CPU divides.
        mean = (y.sum(0).cpu() / len(y)).to(y.device)
        if y.is_cuda and backend != "triton":  # the formula's own division is such a product
            torch.testing.assert_close(stats[0, self.suspect], mean[self.suspect], rtol=2.0**-51, atol=0)
        else:
            same(stats[0, self.suspect], mean[self.suspect])
        variance = (y - mean).square().mean(0)
        torch.testing.assert_close(stats[1, self.suspect], variance[self.suspect], rtol=1e-13, atol=1e-13)
        g = torch.where(unpack_signs(self.signs, len(self.suspect)), to_rows(self.dout), 0).double()
        expected = (g * (y - self.mean)).sum(0)
        same(sums[self.suspect], expected[self.suspect])
        return stats, variance


@every_dtype
@pytest.mark.parametrize("prologue", [True, False], ids=["activation", "plain"])
@pytest.mark.parametrize(("shape", "inner", "outer"), SHAPES, ids=str)
def test_exact_on_integers(backend, device, dtype, shape, inner, outer, prologue):
    Case(0, device, shape, inner, outer, dtype, prologue=prologue).check(backend)


def test_float64_stays_float64(cpu_backend):
    Case(1, "cpu", (3, 5, 7), 33, 70, torch.float64).check(cpu_backend)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 16, 16)], ids=["one tile", "two tiles"])
def test_variance_is_exact_on_integers(backend, device, dtype, shape):
    """So many rows divide their sums without rounding."""
    case = Case(2, device, shape, 20, 5, dtype)
    stats, variance = case.check(backend)
    same(stats[1, case.suspect], variance[case.suspect])


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (5, 9)], ids=str)
def test_every_stride(backend, device, stride):
    Case(3, device, (2, 3, 5), 20, 33, torch.float32, stride=stride, prologue=False).check(backend)


def test_many_tiles(backend, device):
    """More than the merge takes at once."""
    case = Case(4, device, (1, 66, 128), 3, 4, torch.float32, prologue=False)
    case.suspect[:] = torch.arange(4, device=device) == 2
    case.check(backend)


@pytest.mark.parametrize("count", [0, 20], ids=["none", "all"])
def test_any_number_of_suspects(backend, device, count):
    case = Case(5, device, (1, 5, 7), 20, 20, torch.float32)
    case.suspect[:] = False
    case.suspect[:count] = True
    case.check(backend)


def test_mean_far_above_deviation(backend, device):
    """Variance and sums are as good as those of values near 0."""
    case, draw = Case(6, device, (3, 9, 11), 20, 33, torch.float32, prologue=False), Draw(6, device)
    case.z.image[:] = 1000 + draw.normal(3, 20, 9, 11)
    case.weight[:] = 1
    case.weight[:, 1:] += 1e-3 * draw.normal(33, 19, 1, 1)
    y = case.y(backend)
    case.mean = y.mean(0).float()
    stats, sums = case.stats(backend), case.sums(backend)
    torch.testing.assert_close(stats[0, case.suspect], y.mean(0)[case.suspect], rtol=1e-14, atol=0)
    variance = y.var(0, correction=0)
    torch.testing.assert_close(stats[1, case.suspect], variance[case.suspect], rtol=1e-12, atol=0)
    g = torch.where(unpack_signs(case.signs, 33), to_rows(case.dout), 0).double()
    terms = g * (y - case.mean)
    every(((sums - terms.sum(0)).abs() <= 1e-12 * terms.abs().sum(0))[case.suspect])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 1, 2)], ids=str)
def test_not_finite_spoils_every_suspect(backend, device, poison, pixel):
    """Wherever in its tile it stands, the first row included, and whatever the sign of that pixel."""
    case = Case(7, device, (2, 3, 4), 20, 33, torch.float32, prologue=False)
    case.weight[:] = 1
    n, h, w = pixel
    case.z.image[n, 4, h, w] = poison
    assert not case.stats(backend)[:, case.suspect].isfinite().any()
    case.mean[:] = float("nan")
    every(case.sums(backend)[case.suspect].isnan())


def test_nan_passes_the_relu(backend, device):
    case = Case(8, device, (1, 3, 5), 8, 5, torch.float32)
    case.z.image[0, 2, 1, 1] = float("nan")
    every(case.stats(backend)[:, case.suspect].isnan())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_shut_out_does_not_matter(backend, device, poison):
    case = Case(9, device, (3, 5, 7), 20, 33, torch.float32)
    clean, opened = case.sums(backend), unpack_signs(case.signs, 33)
    shut = ~opened.view(3, 5, 7, 33).permute(0, 3, 1, 2)
    case.dout[shut] = poison
    same(case.sums(backend)[case.suspect], clean[case.suspect])
    case.signs[40, 0] |= 1 << 3  # row 40 is image 1, line 0, column 5
    case.dout[1, 3, 0, 5] = float("nan")
    assert case.sums(backend)[case.suspect].isnan().tolist() == [False, True, False]


def test_bits_past_the_last_channel_do_not_matter(backend, device):
    case = Case(10, device, (3, 5, 7), 20, 33, torch.float32)
    clean = case.sums(backend)
    case.signs[:, 4] |= 0xFE
    same(case.sums(backend)[case.suspect], clean[case.suspect])


@every_dtype
def test_misaligned_and_repeated(backend, device, dtype):
    case, draw = Case(11, device, (2, 5, 7), 64, 64, dtype), Draw(11, device)
    case.z = draw.activation(2, 64, 5, 7, dtype)
    case.weight, case.dout = draw.normal(64, 64, 1, 1, dtype=dtype), draw.normal(2, 64, 5, 7, dtype=dtype)
    first = case.stats(backend), case.sums(backend)
    same(case.stats(backend)[:, case.suspect], first[0][:, case.suspect])
    case.z = Activation(misaligned(case.z.image), case.z.vectors)
    case.weight, case.dout = misaligned(case.weight), misaligned(case.dout)
    assert_same_sums(case.stats(backend)[:, case.suspect], first[0][:, case.suspect], 2.0**-44)
    assert_same_sums(case.sums(backend)[case.suspect], first[1][case.suspect], 2.0**-44)


def test_bad_arguments(backend, device):
    case = Case(12, device, (2, 3, 3), 20, 12, torch.float32)
    case.mean = case.mean.double()
    with pytest.raises(TypeError, match=r"mean: expected torch\.float32, got torch\.float64"):
        case.sums(backend)
