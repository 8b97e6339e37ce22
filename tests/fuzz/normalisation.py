"""The primitives between the convolutions: statistics, normalisation, and the way back through both."""

from typing import NamedTuple

import torch
from compare import same, within
from hypothesis import strategies as st

from fused_res.layout import to_rows
from fused_res.primitives.bn_act import bn_act, pack_signs
from fused_res.primitives.bn_act_backward import (
    Coefficients,
    bn_act_backward_apply,
    bn_act_backward_finalize,
    bn_act_backward_reduce,
)
from fused_res.primitives.bn_finalize import Vectors, bn_finalize, bn_running
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.masked_add import masked_add
from fused_res.primitives.move_statistics import Move, move_statistics
from fused_res.primitives.operands import Addend
from fused_res.primitives.run import of
from fused_res.spec import ConvBN
from fuzz.bounds import affine, gate, hold, hold_signs, hold_statistics, hold_sums, roundoff, stored, untouched
from fuzz.draws import DTYPES, Scope, Target, Values, flags, kinds, offsets, seeds, statistics


class Stats(NamedTuple):
    dtype: str
    pixels: int
    channels: int
    kind: str
    offset: int
    seed: int


def _stats(scope: Scope):
    return st.builds(Stats, scope.dtype, scope.pixels, scope.channels, kinds, offsets, seeds)


def check_stats(case: Stats, backend: str) -> None:
    y = Values(case.seed).matrix(case.pixels, case.channels, dtype=DTYPES[case.dtype], kind=case.kind, offset=case.offset)
    before = y.clone()
    partials, rows = bn_stats(y, run=of(backend))
    assert partials.dtype == statistics(y.dtype)
    hold_statistics(partials, rows, y, "bn_stats")
    untouched([y], [before], "bn_stats")


class Finalize(NamedTuple):
    """rows: of every tile but the last. affine: which of gamma, beta and the residual scale are there."""

    dtype: str
    tiles: int
    rows: int
    last: int
    channels: int
    eps: float
    affine: tuple[bool, bool, bool]
    parameters: str
    seed: int


_eps = st.sampled_from((1e-5, 1e-3, 0.1))
_triple = st.tuples(flags, flags, flags)


def _finalize(scope: Scope):
    dtypes = [d for d in scope.dtypes if d in ("f32", "f64")]
    tiles, rows = st.integers(1, 5), st.integers(1, 70)
    parameters = st.sampled_from(("f32", "bf16", "f16"))
    return st.builds(
        Finalize, st.sampled_from(dtypes), tiles, rows, st.integers(0, 69), scope.channels, _eps, _triple, parameters, seeds
    )


def _affine_vectors(values: Values, case, channels: int, dtype: torch.dtype):
    parameters = statistics(dtype) if dtype == torch.float64 else DTYPES[case.parameters]
    gamma, beta = (values.maybe(there, channels, dtype=parameters) for there in case.affine[:2])
    return gamma, beta, values.maybe(case.affine[2], dtype=parameters)


def _hold_vectors(got, mean, mean_off, var, var_off, eps, gamma, beta, scale, name) -> None:
    """The five rows, from the mean and the variance within their bounds."""
    u = roundoff(got.dtype)
    v = Vectors(*got.double())
    within(v.mean, mean, mean_off + u * mean.abs(), f"{name}: mean")
    within(v.var, var, var_off + u * var, f"{name}: var")
    invstd = (var + eps).rsqrt()
    var_off = var_off + 2 * u * (var + eps)
    off = (
        torch.maximum(((var - var_off).clamp_min(0) + eps).rsqrt() - invstd, invstd - (var + var_off + eps).rsqrt())
        + 4 * u * invstd
    )
    within(v.invstd, invstd, off, f"{name}: invstd")
    g = 1.0 if gamma is None else gamma.double()
    b = torch.zeros_like(mean) if beta is None else beta.double()
    a = 1.0 if scale is None else scale.double()
    factor, factor_off = a * g * invstd, abs(a * g) * off
    tiny = 2.0**-126 if got.dtype == torch.float32 else 0.0
    within(v.scale, factor, factor_off + 4 * u * factor.abs() + tiny, f"{name}: scale")
    limit = factor_off * mean.abs() + (factor.abs() + factor_off) * mean_off + 8 * u * ((factor * mean).abs() + (a * b).abs())
    within(v.shift, a * b - factor * mean, limit + tiny, f"{name}: shift")


def check_finalize(case: Finalize, backend: str) -> None:
    values, dtype = Values(case.seed), DTYPES[case.dtype]
    means = values.wide(case.tiles, case.channels) * 2 + values.wide(case.channels)
    squares = values.wide(case.tiles, case.channels).square() * case.rows
    partials = torch.stack((means, squares), 1).to(dtype)
    pixels = case.rows * (case.tiles - 1) + 1 + case.last % case.rows
    gamma, beta, scale = _affine_vectors(values, case, case.channels, dtype)
    given = [t for t in (partials, gamma, beta, scale) if t is not None]
    before = [t.clone() for t in given]
    got = bn_finalize(partials, case.rows, pixels, gamma, beta, case.eps, scale, run=of(backend))
    assert got.shape == (5, case.channels)
    assert got.dtype == dtype
    counts = torch.full((case.tiles, 1), float(case.rows), dtype=torch.float64)
    counts[-1] = pixels - case.rows * (case.tiles - 1)
    means, squares = partials.double().unbind(1)
    u = roundoff(dtype)
    mean = (means * counts).sum(0) / pixels
    mean_off = (case.tiles + 5) * u * (means.abs() * counts).sum(0) / pixels
    between = counts * (means - mean).square()
    var = (squares + between).sum(0) / pixels
    # A tile's distance from the mean is off by that of the mean and by its own rounding.
    off = mean_off + 2 * u * means.abs().amax(0)
    var_off = (case.tiles + 8) * u * var + 2 * off * (between.sum(0) / pixels).sqrt() + off.square()
    _hold_vectors(got, mean, mean_off, var, var_off, case.eps, gamma, beta, scale, "bn_finalize")
    untouched(given, before, "bn_finalize")


class Running(NamedTuple):
    dtype: str
    buffers: str
    channels: int
    eps: float
    affine: tuple[bool, bool, bool]
    bias: bool
    parameters: str
    seed: int


def _running(scope: Scope):
    dtypes = [d for d in scope.dtypes if d in ("f32", "f64")]
    sixteen = st.sampled_from(("f32", "bf16", "f16"))
    return st.builds(Running, st.sampled_from(dtypes), sixteen, scope.channels, _eps, _triple, flags, sixteen, seeds)


def check_running(case: Running, backend: str) -> None:
    values, dtype, c = Values(case.seed), DTYPES[case.dtype], case.channels
    buffers = dtype if dtype == torch.float64 else DTYPES[case.buffers]
    mean, var = values.wide(c).to(buffers), values.wide(c).square().to(buffers)
    bias = values.maybe(case.bias, c, dtype=dtype if dtype == torch.float64 else DTYPES[case.parameters])
    gamma, beta, scale = _affine_vectors(values, case, c, dtype)
    got = bn_running(mean, var, bias, gamma, beta, case.eps, scale, dtype=dtype, run=of(backend))
    true = mean.double() - (0 if bias is None else bias.double())
    off = roundoff(dtype) * (mean.double().abs() + true.abs())
    _hold_vectors(got, true, off, var.double(), torch.zeros(c), case.eps, gamma, beta, scale, "bn_running")


class Act(NamedTuple):
    """shortcut: none, skip or second."""

    dtype: str
    pixels: int
    channels: int
    shortcut: str
    signs: bool
    kind: str
    offset: int
    special: bool
    seed: int


def _act(scope: Scope):
    shortcuts = st.sampled_from(("none", "skip", "second"))
    return st.builds(Act, scope.dtype, scope.pixels, scope.channels, shortcuts, flags, kinds, offsets, flags, seeds)


def check_act(case: Act, backend: str) -> None:
    values, dtype = Values(case.seed), DTYPES[case.dtype]
    options = {"dtype": dtype, "kind": case.kind, "offset": case.offset}
    shape = case.pixels, case.channels
    y, vectors = values.matrix(*shape, **options), values.vectors(case.channels, dtype)
    if case.special:
        y.view(-1)[case.seed % y.numel()] = float("nan")
    skip = values.matrix(*shape, **options) if case.shortcut == "skip" else None
    y2, vectors2 = None, None
    if case.shortcut == "second":
        y2, vectors2 = values.matrix(*shape, **options), values.vectors(case.channels, dtype)
    given = [t for t in (y, vectors, skip, y2, vectors2) if t is not None]
    before = [t.clone() for t in given]
    out, signs = bn_act(y, vectors, skip=skip, y2=y2, vectors2=vectors2, keep_signs=case.signs, run=of(backend))
    u = roundoff(dtype)
    total, slack = affine(y.double(), vectors)
    size = total.abs() + slack / u
    if skip is not None:
        total, size = total + skip.double(), size + skip.double().abs()
    if y2 is not None:
        other, off = affine(y2.double(), vectors2)
        total, size = total + other, size + other.abs() + off / u
    assert out.dtype == dtype
    hold(out, total.relu(), 4 * u * size, "bn_act: out")
    assert (signs is None) == (not case.signs)
    if signs is not None:
        hold_signs(signs, out, "bn_act: signs")
    untouched(given, before, "bn_act")


class Back(NamedTuple):
    """mask: by the saved signs, or by the sign of the pre-activation. second: whether two BNs were added before the ReLU."""

    dtype: str
    pixels: int
    channels: int
    mask: str
    second: bool
    training: tuple[bool, bool]
    keep: bool
    scaled: bool
    affine: tuple[bool, bool]
    kind: str
    offset: int
    seed: int


def _back(scope: Scope):
    masks, pair = st.sampled_from(("signs", "inner")), st.tuples(flags, flags)
    rows = scope.dtype, scope.pixels, scope.channels
    return st.builds(Back, *rows, masks, flags, pair, flags, flags, pair, kinds, offsets, seeds)


def check_back(case: Back, backend: str) -> None:
    values, dtype, shape = Values(case.seed), DTYPES[case.dtype], (case.pixels, case.channels)
    u = roundoff(dtype)
    dout = values.matrix(*shape, dtype=dtype, offset=case.offset)
    y, vectors = values.matrix(*shape, dtype=dtype, kind=case.kind, offset=case.offset), values.vectors(case.channels, dtype)
    signs = pack_signs(values.open(*shape)) if case.mask == "signs" else None
    second = case.second and signs is not None
    y2 = values.matrix(*shape, dtype=dtype, kind=case.kind, offset=case.offset) if second else None
    vectors2 = values.vectors(case.channels, dtype) if second else None
    given = [t for t in (dout, y, vectors, signs, y2, vectors2) if t is not None]
    before = [t.clone() for t in given]
    g, doubt = gate(dout, y, vectors, signs)

    partials = bn_act_backward_reduce(dout, y, vectors, signs=signs, y2=y2, vectors2=vectors2, run=of(backend))
    assert partials.dtype == vectors.dtype
    assert partials.shape[1:] == (3 if second else 2, case.channels)
    hold_sums(partials[:, 0], g, doubt.sum(0), "reduce: sum g")
    for row, (image, its) in enumerate(((y, vectors), (y2, vectors2))[: 1 + second], 1):
        deviation = image.double() - Vectors(*its.double()).mean
        hold_sums(partials[:, row], g * deviation, (doubt * deviation.abs()).sum(0), f"reduce: sum {row}")

    parameters = statistics(dtype)
    gamma, beta = (values.maybe(there, case.channels, dtype=parameters) for there in case.affine)
    scale = values.maybe(case.scaled, dtype=parameters)
    found = []
    for row in range(1, 2 + second):
        training, v = case.training[row - 1], vectors if row == 1 else vectors2
        got = bn_act_backward_finalize(partials, row, case.pixels, v, gamma, beta, scale, training=training, run=of(backend))
        _hold_coefficients(got, partials.double(), row, case.pixels, v.double(), gamma, beta, scale, training, u)
        found.append(got)

    pair = {"y2": y2, "coefficients2": found[1], "training2": case.training[1]} if second else {}
    dy, dy2, kept = bn_act_backward_apply(
        dout, y, vectors, found[0], training=case.training[0], signs=signs, keep_masked=case.keep, run=of(backend), **pair
    )
    assert (kept is not None) == case.keep
    assert (dy2 is not None) == second
    if kept is not None:
        within(kept.double(), g, doubt, "apply: g")
    for name, got, image, c, training in (("dy", dy, y, found[0], case.training[0]), ("dy2", dy2, y2, found[-1], case.training[1])):
        if got is None:
            continue
        assert got.dtype == dtype
        c = Coefficients(*c.double())
        terms = [c.p * g] + ([c.q * image.double(), c.r.expand_as(g)] if training else [])
        slack = 4 * u * sum(term.abs() for term in terms) + c.p.abs() * doubt
        hold(got, sum(terms), slack, f"apply: {name}")
    untouched(given, before, "bn_act_backward")


def _hold_coefficients(got, partials, row, pixels, vectors, gamma, beta, scale, training, u) -> None:
    """Row by row; each is a few products and sums of what precedes it."""
    v = Vectors(*vectors)
    tiles = len(partials) + 4
    total, total_off = partials[:, 0].sum(0), tiles * u * partials[:, 0].abs().sum(0)
    d, d_off = v.invstd * partials[:, row].sum(0), (tiles + 2) * u * v.invstd * partials[:, row].abs().sum(0)
    a = 1.0 if scale is None else scale.double()
    g = torch.ones_like(d) if gamma is None else gamma.double()
    b = torch.zeros_like(d) if beta is None else beta.double()
    zero = torch.zeros_like(d)
    q = -v.scale * v.invstd * d / pixels
    q_off = (v.scale * v.invstd).abs() * d_off / pixels + 8 * u * q.abs()
    r = -v.scale * total / pixels - q * v.mean
    r_off = (
        v.scale.abs() * total_off / pixels + q_off * v.mean.abs() + 8 * u * ((v.scale * total / pixels).abs() + (q * v.mean).abs())
    )
    dscale_off = g.abs() * d_off + b.abs() * total_off + 8 * u * ((g * d).abs() + (b * total).abs())
    expected = {
        "p": (v.scale, zero),
        "q": (q, q_off) if training else (zero, zero),
        "r": (r, r_off) if training else (zero, zero),
        "dgamma": (a * d, abs(a) * d_off + 4 * u * (a * d).abs()),
        "dbeta": (a * total, abs(a) * total_off + 4 * u * (a * total).abs()),
        "dscale": (g * d + b * total, dscale_off),
        "dbias": (zero, zero) if training else (v.scale * total, v.scale.abs() * total_off + 4 * u * (v.scale * total).abs()),
    }
    for (name, (truth, limit)), row_of in zip(expected.items(), got.double(), strict=True):
        within(row_of, truth, limit + 2.0**-126, f"finalize: {name}")


class Add(NamedTuple):
    dtype: str
    n: int
    channels: int
    size: tuple[int, int]
    stride: tuple[int, int]
    signs: bool
    offsets: tuple[int, int]
    seed: int


def _add(scope: Scope):
    stride = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return st.builds(
        Add, scope.dtype, st.integers(1, 3), scope.channels, scope.size, stride, flags, st.tuples(offsets, offsets), seeds
    )


def check_add(case: Add, backend: str) -> None:
    values, dtype = Values(case.seed), DTYPES[case.dtype]
    (h, w), (down, right) = case.size, case.stride
    dx = values.image(case.n, case.channels, h, w, dtype=dtype, offset=case.offsets[0])
    small = -(-h // down), -(-w // right)
    image = values.image(case.n, case.channels, *small, dtype=dtype, offset=case.offsets[1])
    opened = values.open(case.n * small[0] * small[1], case.channels) if case.signs else None
    signs = None if opened is None else pack_signs(opened)
    before, other = dx.clone(), image.clone()
    masked_add(dx, Addend(image, signs, case.stride), run=of(backend))
    joins = (
        image.double()
        if opened is None
        else torch.where(opened, to_rows(image).double(), 0).view(case.n, *small, -1).permute(0, 3, 1, 2)
    )
    expected = before.double()
    expected[:, :, ::down, ::right] += joins
    changed = torch.zeros_like(expected)
    changed[:, :, ::down, ::right] = joins.abs()
    slack = torch.where(changed > 0, roundoff(dtype) * (before.double().abs() + changed), 0)
    limit = torch.where(changed > 0, stored(expected, slack, dtype), 0)
    within(dx.double(), expected, limit, "masked_add")
    same(image, other, "masked_add: image")


class Moves(NamedTuple):
    """buffers: dtype of the running statistics; momentum None is the cumulative average."""

    buffers: str
    channels: tuple[int, ...]
    pixels: int
    momentum: float | None
    counted: bool
    bias: bool
    strided: bool
    steps: int
    seed: int


def _moves(scope: Scope):
    momenta = st.sampled_from((0.1, 0.0, 1.0, 0.37, None))
    widths = st.lists(scope.channels, min_size=1, max_size=3).map(tuple)
    buffers = st.sampled_from(("f32", "f32", "bf16", "f16", "f64"))
    return st.builds(Moves, buffers, widths, st.integers(2, 70), momenta, flags, flags, flags, st.integers(1, 3), seeds)


def check_moves(case: Moves, backend: str) -> None:
    values, dtype = Values(case.seed), DTYPES[case.buffers]
    wide = statistics(dtype)
    u = roundoff(dtype)

    def buffer(tensor):
        return torch.stack((tensor, tensor), 1)[:, 0] if case.strided else tensor

    units, expected = [], []
    for c in case.channels:
        mean, var = buffer(values.wide(c).to(dtype)), buffer(values.wide(c).square().to(dtype))
        count = torch.tensor(case.seed % 5) if case.counted else None
        bias = values.maybe(case.bias, c, dtype=wide)
        units.append(ConvBN(torch.empty(c, 1, 1, 1), bias, None, None, mean, var, count, training=True, momentum=case.momentum))
        expected.append((mean.double().clone(), var.double().clone()))
    for step in range(1, case.steps + 1):
        vectors = [values.vectors(c, wide) for c in case.channels]
        moves = [Move(unit, v, case.pixels) for unit, v in zip(units, vectors, strict=True)]
        move_statistics(moves, run=of(backend))
        for i, (unit, v) in enumerate(zip(units, vectors, strict=True)):
            m = case.momentum
            if m is None:
                m = 0.0 if unit.num_batches_tracked is None else 1 / (case.seed % 5 + step)
            if unit.num_batches_tracked is not None:
                assert unit.num_batches_tracked.item() == case.seed % 5 + step
            batch = v.double()
            bias = 0.0 if unit.bias is None else unit.bias.double()
            values_now = (batch[0] + bias, batch[1] * case.pixels / (case.pixels - 1))
            sizes = (batch[0].abs() + abs(bias), values_now[1])
            pairs = zip((unit.running_mean, unit.running_var), expected[i], values_now, sizes, strict=True)
            for name, (running, old, new, size) in zip(("mean", "var"), pairs, strict=True):
                truth = (1 - m) * old + m * new
                slack = 8 * u * (old.abs() + size) if 0 < m < 1 else 4 * u * (size if m else 0 * old)
                hold(running, truth, slack, f"move_statistics: running {name}, step {step}")
            expected[i] = (unit.running_mean.double().clone(), unit.running_var.double().clone())


TARGETS = {
    "bn_stats": Target(_stats, check_stats),
    "bn_finalize": Target(_finalize, check_finalize),
    "bn_running": Target(_running, check_running),
    "bn_act": Target(_act, check_act),
    "bn_act_backward": Target(_back, check_back),
    "masked_add": Target(_add, check_add),
    "move_statistics": Target(_moves, check_moves),
}
