"""`bn_act_backward`: all three steps together against autograd in float64, and each step's own promises."""

from types import SimpleNamespace

import pytest
import torch
from compare import same, within
from convolutions import assert_same_sums

from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.bn_act_backward import (
    Coefficients,
    bn_act_backward,
    bn_act_backward_apply,
    bn_act_backward_finalize,
    bn_act_backward_reduce,
)
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

EPS = 1e-3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Name: does each BN use batch statistics, is the ReLU an outer one with saved signs.
CASES = {
    "inner": ((True,), False),
    "inner, frozen": ((False,), False),
    "outer": ((True,), True),
    "outer, frozen": ((False,), True),
    "second": ((True, True), True),
    "second, frozen": ((True, False), True),
    "first frozen": ((False, True), True),
}


class Branch:
    """A BN in float64 under autograd: input y, conv bias, gamma, beta and residual scale; and what the kernels are given of it."""

    def __init__(self, draw, pixels, channels, dtype, device, training, parameters=True, scale=0.5, mean=0.5):
        def leaf(values):
            return values.to(device).double().requires_grad_()

        self.training, self.statistics = training, torch.float64 if dtype == torch.float64 else torch.float32
        self.y = leaf((draw(pixels, channels) + mean).to(dtype))
        self.bias = leaf(torch.zeros(channels))
        self.gamma = self.beta = None
        if parameters:
            self.gamma, self.beta = leaf(draw(channels).float()), leaf(draw(channels).float())
        self.scale = None if scale is None else leaf(torch.tensor(float(scale)))
        self.running = draw(channels).to(device), draw(channels).to(device).abs() + 0.5

    def value(self):
        y = self.y + self.bias
        mean, var = (y.mean(0), y.var(0, correction=0)) if self.training else self.running
        invstd = 1 / (var + EPS).sqrt()
        gamma = torch.ones_like(mean) if self.gamma is None else self.gamma
        beta = torch.zeros_like(mean) if self.beta is None else self.beta
        a = 1.0 if self.scale is None else self.scale
        rows = mean, var, invstd, a * gamma * invstd, a * (beta - gamma * invstd * mean)
        self.vectors = torch.stack([row.expand_as(mean) for row in rows]).detach().to(self.statistics)
        return a * (gamma * (y - mean) * invstd + beta)

    def parameter(self, name):
        tensor = getattr(self, name)
        return None if tensor is None else tensor.detach().to(self.statistics)


def case(name, pixels, channels, dtype, device, **options):
    """Inputs of the three steps and, from autograd, what should come of them."""
    generator = torch.Generator().manual_seed(pixels + channels)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    training, outer = CASES[name]
    branches = [Branch(draw, pixels, channels, dtype, device, live, **options) for live in training]
    total = sum(branch.value() for branch in branches)
    dout = draw(pixels, channels).to(device, dtype)
    if outer:
        opened = (draw(pixels, channels) > 0).to(device)
    else:
        opened = total.detach() > 0
        dout[total.abs() < 1e-4 * total.detach().abs().max()] = 0  # where float32 may see the other sign
    signs = pack_signs(opened) if outer else None
    g = torch.where(opened, dout, 0)
    total.backward(g.double())
    return SimpleNamespace(dout=dout, branches=branches, dtype=dtype, signs=signs, g=g)


def run(c, backend, keep_masked=True):
    """The three steps: one `Coefficients` for each BN, one dy for each BN, and the masked gradient."""
    first, second = c.branches[0], c.branches[1] if len(c.branches) > 1 else None
    ys = [branch.y.detach().to(c.dtype) for branch in c.branches]
    before = [t.clone() for t in (c.dout, *ys)]
    pair = {} if second is None else {"y2": ys[1], "vectors2": second.vectors}
    partials = bn_act_backward_reduce(c.dout, ys[0], first.vectors, signs=c.signs, **pair, run=of(backend))
    assert partials.shape[1:] == (1 + len(ys), c.dout.shape[1])
    coefficients = [
        bn_act_backward_finalize(
            partials,
            row,
            len(c.dout),
            b.vectors,
            b.parameter("gamma"),
            b.parameter("beta"),
            b.parameter("scale"),
            training=b.training,
            run=of(backend),
        )
        for row, b in enumerate(c.branches, 1)
    ]
    pair = {} if second is None else {"y2": ys[1], "coefficients2": coefficients[1], "training2": second.training}
    dy, dy2, masked = bn_act_backward_apply(
        c.dout,
        ys[0],
        first.vectors,
        coefficients[0],
        training=first.training,
        signs=c.signs,
        **pair,
        keep_masked=keep_masked,
        run=of(backend),
    )
    if second is None:  # one call for all three steps gives the same bits
        parameters = [first.parameter(name) for name in ("gamma", "beta", "scale")]
        options = {"training": first.training, "signs": c.signs, "run": of(backend)}
        joined, whole = bn_act_backward(c.dout, ys[0], first.vectors, *parameters, **options)
        same(joined, coefficients[0])
        same(whole, dy)
    torch.testing.assert_close([c.dout, *ys], before, rtol=0, atol=0, equal_nan=True)
    assert (dy2 is None) == (second is None)
    return coefficients, [dy, dy2][: len(ys)], masked


def close(actual, expected, error, rounding=0.0):
    """Errors in units of the largest value of each column, and of each value."""
    expected = expected.double()
    unit = expected.abs().amax(0, keepdim=True) if expected.dim() == 2 else expected.abs().max()
    within(actual.double(), expected, error * unit + rounding * expected.abs() + 1e-30)


def check(c, backend, error):
    coefficients, dys, masked = run(c, backend)
    same(masked, c.g)
    for branch, rows, dy in zip(c.branches, coefficients, dys, strict=True):
        assert rows.dtype == branch.statistics
        assert dy.dtype == c.dtype
        got = Coefficients(*rows)
        smallest = torch.finfo(c.dtype).smallest_normal * torch.finfo(c.dtype).eps
        close(dy, branch.y.grad, error + smallest, torch.finfo(c.dtype).eps / 2)
        if branch.gamma is not None:
            close(got.dgamma, branch.gamma.grad, error)
            close(got.dbeta, branch.beta.grad, error)
        if branch.scale is not None:
            close(got.dscale.sum(), branch.scale.grad, 4 * error * len(got.dscale) ** 0.5)
        if branch.training:
            assert not got.dbias.any()
        else:
            close(got.dbias, branch.bias.grad, error)
            assert not got.q.any()
            assert not got.r.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("pixels", "channels"), [(5, 3), (70, 20)])
def test_matches_autograd(backend, device, name, dtype, pixels, channels):
    check(case(name, pixels, channels, dtype, device), backend, 4e-6)


@pytest.mark.parametrize("name", CASES)
def test_float64(device, name):
    check(case(name, 70, 20, torch.float64, device), "reference", 1e-12)


@pytest.mark.parametrize("name", ["inner", "outer", "second"])
@pytest.mark.parametrize(("pixels", "channels"), [(390, 100), (1100, 9)])
def test_several_blocks_in_a_tile(backend, device, few_programs, name, pixels, channels):
    check(case(name, pixels, channels, torch.float32, device), backend, 4e-6)


@pytest.mark.parametrize("name", ["inner", "second, frozen"])
@pytest.mark.parametrize("options", [{"parameters": False}, {"scale": None}, {"scale": 0.0}], ids=str)
def test_absent_parameters(backend, device, name, options):
    check(case(name, 70, 9, torch.float32, device, **options), backend, 4e-6)


def test_mean_far_above_deviation(backend, device):
    check(case("outer", 70, 9, torch.float32, device, mean=1000.0), backend, 3e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact_on_integers(backend, device, few_programs, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(-8, 9, shape, generator=generator).to(device, torch.float32)

    pixels, channels = 600, 20
    dout, y, y2 = (draw(pixels, channels).to(dtype) for _ in range(3))
    vectors, vectors2, opened = draw(5, channels), draw(5, channels), draw(pixels, channels) > 0
    g = dout.double() * opened
    sums = [g.sum(0), (g * (y.double() - vectors[0])).sum(0), (g * (y2.double() - vectors2[0])).sum(0)]
    partials = bn_act_backward_reduce(dout, y, vectors, signs=pack_signs(opened), y2=y2, vectors2=vectors2, run=of(backend))
    same(partials.double().sum(0), torch.stack(sums))
    g = dout.double() * (vectors[3] * y.double() + vectors[4] > 0)
    partials = bn_act_backward_reduce(dout, y, vectors, run=of(backend))
    same(partials.double().sum(0), torch.stack([g.sum(0), (g * (y.double() - vectors[0])).sum(0)]))
    for tiles in (partials, partials.repeat(300, 1, 1)):
        rows = Coefficients(*bn_act_backward_finalize(tiles, 1, 1, vectors, None, None, training=False, run=of(backend)))
        same(rows.dbeta.double(), tiles.double().sum(0)[0])
        same(rows.dgamma.double(), vectors[2] * tiles.double().sum(0)[1])


@pytest.mark.parametrize("signs", [False, True], ids=["inner", "outer"])
def test_gradient_passes_nan_and_stops_at_zero(backend, device, signs):
    """The ReLU is shut where its input is <= 0, and only there; what it shuts out does not matter, not even NaN."""
    values = torch.tensor([[0.0, -0.0, 1e-38, -1e-38, float("nan"), float("inf"), float("-inf"), 1.0]], device=device)
    opened = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 1]], device=device) > 0
    vectors, coefficients = torch.zeros(5, 8, device=device), torch.zeros(7, 8, device=device)
    vectors[3], coefficients[0] = 1.0, 2.0
    dout = torch.where(opened, 3.0, float("nan"))
    given = {"signs": pack_signs(opened)} if signs else {}
    dy, _, masked = bn_act_backward_apply(
        dout, values, vectors, coefficients, training=False, keep_masked=True, run=of(backend), **given
    )
    same(masked, 3.0 * opened)
    same(dy, 6.0 * opened)
    partials = bn_act_backward_reduce(dout, values, vectors, run=of(backend), **given)
    same(partials.sum(0)[0], masked[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_frozen_input_stays_out_of_dy(backend, device, poison):
    c = case("second, frozen", 9, 20, torch.float32, device)
    _, clean, _ = run(c, backend)
    coefficients = torch.zeros(7, 20, device=device)
    coefficients[0] = c.branches[1].vectors[3]
    bad = torch.full((9, 20), poison, device=device)
    for y, y2 in ((bad, bad), (bad, c.branches[1].y.detach().float())):
        _, dy2, _ = bn_act_backward_apply(
            c.dout,
            y,
            c.branches[0].vectors,
            coefficients,
            training=False,
            signs=c.signs,
            y2=y2,
            coefficients2=coefficients,
            training2=False,
            run=of(backend),
        )
        same(dy2, clean[1])


@pytest.mark.parametrize("where", ["dout", "y"])
def test_not_finite_spoils_its_channel_only(backend, device, where):
    c = case("second", 130, 20, torch.float32, device)
    others = [channel for channel in range(20) if channel != 7]
    (clean, clean2), clean_dys, _ = run(c, backend)
    target = c.dout if where == "dout" else c.branches[0].y
    target.data[c.g[:, 7].nonzero()[0, 0], 7] = float("nan")
    (rows, rows2), dys, _ = run(c, backend)
    assert Coefficients(*rows).dgamma[7].isnan()
    for got, expected in ((rows, clean), (rows2, clean2), (dys[0], clean_dys[0]), (dys[1], clean_dys[1])):
        same(got[:, others], expected[:, others])


def test_bits_past_the_last_channel_do_not_matter(backend, device):
    c = case("second", 9, 20, torch.float32, device)
    _, clean, _ = run(c, backend)
    c.signs[:, 2] |= 0xF0
    _, dys, masked = run(c, backend)
    same(masked, c.g)
    same(dys[0], clean[0])


@pytest.mark.parametrize("name", ["inner", "second"])
def test_repeats_bit_for_bit_and_misaligned(backend, device, name):
    c = case(name, 130, 64, torch.bfloat16, device)
    rows, dys, _ = run(c, backend)
    again, again_dys, _ = run(c, backend, keep_masked=False)
    for got, expected in zip((*again, *again_dys), (*rows, *dys), strict=True):
        same(got, expected)
    c.dout = torch.cat([c.dout.new_zeros(1), c.dout.flatten()])[1:].view_as(c.dout)
    moved, moved_dys, _ = run(c, backend, keep_masked=False)
    for got, expected in zip((*moved, *moved_dys), (*rows, *dys), strict=True):
        assert_same_sums(got, expected)


def test_no_rows(backend, device):
    empty, vectors = torch.zeros(0, 20, device=device), torch.zeros(5, 20, device=device)
    partials = bn_act_backward_reduce(empty, empty, vectors, run=of(backend))
    assert not partials.sum(0).any()
    dy, _, _ = bn_act_backward_apply(empty, empty, vectors, torch.zeros(7, 20, device=device), training=False, run=of(backend))
    assert dy.shape == (0, 20)


def test_bad_arguments(backend, device):
    y, vectors, coefficients = (torch.zeros(n, 6, device=device) for n in (4, 5, 7))
    signs, partials = torch.zeros(4, 1, dtype=torch.uint8, device=device), torch.zeros(1, 2, 6, device=device)

    def reduce(**more):
        return bn_act_backward_reduce(y, y, vectors, run=of(backend), **more)

    def finalize(row=1, pixels=4, **more):
        return bn_act_backward_finalize(partials, row, pixels, vectors, None, None, training=True, run=of(backend), **more)

    def apply(**more):
        return bn_act_backward_apply(y, y, vectors, coefficients, training=True, run=of(backend), **more)

    with pytest.raises(ValueError, match="signs: expected with y2, got None"):
        reduce(y2=y, vectors2=vectors)
    with pytest.raises(ValueError, match="vectors2: expected together with y2"):
        reduce(signs=signs, y2=y)
    with pytest.raises(ValueError, match=r"signs: expected shape \(4, 1\), got \(4, 6\)"):
        reduce(signs=signs.expand(4, 6))
    with pytest.raises(TypeError, match=r"signs: expected torch\.uint8, got torch\.bool"):
        reduce(signs=signs.bool())
    with pytest.raises(ValueError, match="row: expected 1 to 1, got 2"):
        finalize(row=2)
    with pytest.raises(ValueError, match="pixels: expected at least 1, got 0"):
        finalize(pixels=0)
    with pytest.raises(ValueError, match=r"residual_scale: expected shape \(\), got \(1,\)"):
        finalize(residual_scale=vectors[0, :1])
    with pytest.raises(ValueError, match="signs: expected with y2, got None"):
        apply(y2=y, coefficients2=coefficients)
    with pytest.raises(ValueError, match="coefficients2: expected together with y2"):
        apply(signs=signs, y2=y)
