"""The moment form: moments of an operand, the BN that follows from them, the end of a block, and the three steps back."""

from typing import NamedTuple

import torch
from compare import same, within
from hypothesis import strategies as st
from torch import Tensor

from fused_res.layout import to_image, to_rows
from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.bn_finalize import Vectors
from fused_res.primitives.moments import Moments, moments, moments_finalize
from fused_res.primitives.operands import Activation, multiplied
from fused_res.primitives.pointwise_direct import pointwise_direct_stats, pointwise_direct_sums
from fused_res.primitives.pointwise_tail import Joined, Pointwise, pointwise_tail
from fused_res.primitives.pointwise_tail_backward import (
    pointwise_tail_backward_apply,
    pointwise_tail_backward_finalize,
    pointwise_tail_backward_reduce,
    scaled_weight,
)
from fused_res.primitives.run import of
from fused_res.spec import ConvBN
from fuzz.bounds import affine, gate, hold, hold_signs, hold_sums, roundoff, stored, untouched
from fuzz.draws import DTYPES, Scope, Target, Values, flags, offsets, seeds, statistics


class Operand(NamedTuple):
    """n images of c channels whose pixels at a stride make h x w rows each."""

    n: int
    c: int
    size: tuple[int, int]
    stride: tuple[int, int]
    prologue: bool
    offset: int


def _operand(scope: Scope):
    step = st.integers(1, 3)
    stride = st.one_of(st.just((1, 1)), st.tuples(step, step))
    return st.builds(Operand, st.integers(1, 3), scope.channels, scope.size, stride, flags, offsets)


def _activation(values: Values, o: Operand, dtype: torch.dtype, kind: str = "normal") -> Activation:
    h, w = ((size - 1) * step + 1 for size, step in zip(o.size, o.stride, strict=True))
    image = values.image(o.n, o.c, h, w, dtype=dtype, kind=kind, offset=o.offset)
    return Activation(image, values.vectors(o.c, dtype) if o.prologue else None, o.stride)


def _rows(z: Activation, backend: str) -> Tensor:
    """The operand's rows as the backend itself rounds them, in float64."""
    return Activation(z.image, z.vectors, z.stride).rows(of(backend)).double()


class Second(NamedTuple):
    """kind: of the values. weight: rows nearly orthogonal to the data are suspect."""

    dtype: str
    operand: Operand
    outputs: int
    kind: str
    orthogonal: bool
    affine: tuple[bool, bool, bool]
    seed: int


def _second(scope: Scope):
    kind = st.sampled_from(("normal", "normal", "far", "sparse", "integers"))
    triple = st.tuples(flags, flags, flags)
    return st.builds(Second, scope.dtype, _operand(scope), scope.channels, kind, flags, triple, seeds)


def check_moments(case: Second, backend: str) -> None:
    values, dtype, u = Values(case.seed), DTYPES[case.dtype], roundoff(DTYPES[case.dtype])
    z = _activation(values, case.operand, dtype, case.kind)
    before = z.image.clone()
    mean, covariance = moments(z, run=of(backend))
    rows = _rows(z, backend)
    pixels, channels = rows.shape
    assert mean.dtype == covariance.dtype == torch.float64
    assert mean.shape == (channels,)
    true = rows.mean(0)
    centred = rows - true
    expected = centred.T @ centred / pixels
    # In units of the deviation, which is known to a value's rounding at best.
    unit = expected.diagonal().sqrt() + u * rows.abs().amax(0)
    few = (pixels + 32) * u
    # The mean itself is a sum in float64.
    within(mean, true, few * unit + (pixels + 4) * 2.0**-53 * rows.abs().mean(0), "moments: mean")
    within(covariance, expected, few * torch.outer(unit, unit), "moments: covariance")
    same(covariance, covariance.T, "moments: symmetry")
    untouched([z.image], [before], "moments")


def check_moments_finalize(case: Second, backend: str) -> None:
    values, dtype = Values(case.seed), DTYPES[case.dtype]
    z = _activation(values, case.operand, dtype, "normal" if case.kind == "far" else case.kind)
    k, c = case.operand.c, case.outputs
    weight = (values.wide(c, k, 1, 1) / k**0.5).to(dtype)
    wide = statistics(dtype)
    gamma, beta = (values.maybe(there, c, dtype=wide) for there in case.affine[:2])
    scale = values.maybe(case.affine[2], dtype=wide)
    if case.orthogonal and k > 1:
        z.image[:, 1] = z.image[:, 0]
        if z.vectors is not None:
            z.vectors[:, 1] = z.vectors[:, 0]
        weight[0] = 0
        weight[0, 0], weight[0, 1] = 1, -1
    rows = _rows(z, backend)
    weight = multiplied(weight, of(backend))
    centred = rows - rows.mean(0)
    found = Moments(rows.mean(0), (centred.T @ centred + (centred.T @ centred).T) / (2 * len(rows)))
    unit = ConvBN(weight, gamma=gamma, beta=beta, eps=1e-3)
    got, suspect = moments_finalize(found, z, unit, scale, run=of(backend))
    y = rows @ weight.flatten(1).double().T
    mean, var = y.mean(0), (y - y.mean(0)).square().mean(0)
    # Of what is not suspect at most 11 bits of 53 cancel; a suspect's sums may be taken in the precision of the rows.
    most = (weight.flatten(1).double().abs() @ found.covariance.diagonal().sqrt()).square()
    size = rows.abs().mean(0) @ weight.flatten(1).double().abs().T
    u = roundoff(wide)
    of_mean = (k + len(rows)) * 2.0**-53 * size + u * mean.abs() + torch.where(suspect, (len(rows) + k) * u * size, 0)
    of_var = (k + len(rows)) * 2.0**-51 * most + 2 * u * var
    of_var += torch.where(suspect, 4 * (len(rows) + k) * u * (var + var.sqrt() * size) + ((len(rows) + k) * u * size).square(), 0)
    v = Vectors(*got.double())
    assert got.dtype == wide
    within(v.mean, mean, of_mean, "moments_finalize: mean")
    within(v.var, var, of_var, "moments_finalize: var")
    invstd = (v.var + unit.eps).rsqrt()
    a, g = 1.0 if scale is None else scale.double(), 1.0 if gamma is None else gamma.double()
    b = torch.zeros_like(mean) if beta is None else beta.double()
    within(v.invstd, invstd, 4 * u * invstd, "moments_finalize: invstd")
    factor = a * g * invstd
    within(v.scale, factor, 10 * u * factor.abs() + 2.0**-126, "moments_finalize: scale")
    limit = 12 * u * ((factor * v.mean).abs() + (a * b).abs())
    within(v.shift, a * b - factor * v.mean, limit + 2.0**-126, "moments_finalize: shift")


def _suspects(values: Values, channels: int) -> Tensor:
    return values.open(1, channels)[0]


def check_direct(case: Second, backend: str) -> None:
    values, dtype = Values(case.seed), DTYPES[case.dtype]
    z = _activation(values, case.operand, dtype, case.kind)
    k, c = case.operand.c, case.outputs
    weight = (values.wide(c, k, 1, 1) / k**0.5).to(dtype)
    if case.orthogonal:  # which means nothing here
        weight = torch.stack((weight, weight + 1), -1)[..., 0]
    suspect = _suspects(values, c)
    rows, w = _rows(z, backend), weight.flatten(1).double()
    y, size = rows @ w.T, rows.abs() @ w.abs().T
    u = roundoff(dtype)
    off = (k + 4) * u * size
    found = pointwise_direct_stats(z, weight, suspect, run=of(backend))
    assert found.dtype == torch.float64
    assert found.shape == (2, c)
    mean, var = y.mean(0), y.var(0, correction=0)
    e = off.amax(0) + (len(rows) + 4) * u * size.mean(0)
    zero = torch.zeros(c, dtype=torch.float64)
    within(torch.where(suspect, found[0], zero), torch.where(suspect, mean, zero), e, "direct_stats: mean")
    limit = 2 * e * var.sqrt() + e.square() + (len(rows) + 8) * u * var
    within(torch.where(suspect, found[1], zero), torch.where(suspect, var, zero), limit, "direct_stats: var")
    finite = found.isfinite()
    assert finite.all()
    n, (h, wd) = case.operand.n, case.operand.size
    dout, opened = values.image(n, c, h, wd, dtype=dtype), values.open(len(rows), c)
    signs, mean = pack_signs(opened), mean.to(statistics(dtype))
    sums = pointwise_direct_sums(dout, signs, z, weight, mean, suspect, run=of(backend))
    g = torch.where(opened, to_rows(dout).double(), 0)
    terms = g * (y - mean.double())
    limit = (g.abs() * off).sum(0) + (len(rows) + 8) * u * (g.abs() * (y.abs() + mean.double().abs())).sum(0)
    within(torch.where(suspect, sums, zero), torch.where(suspect, terms.sum(0), zero), limit, "direct_sums")


class Tail(NamedTuple):
    """shortcut: skip, second or projection (from `beside` channels, at a stride)."""

    dtype: str
    operand: Operand
    outputs: int
    shortcut: str
    beside: int
    stride: tuple[int, int]
    signs: bool
    seed: int


def _tail(scope: Scope):
    step = st.integers(1, 2)
    shortcut = st.sampled_from(("skip", "second", "projection"))
    operand = _operand(scope).map(lambda o: o._replace(stride=(1, 1)))
    return st.builds(Tail, scope.dtype, operand, scope.channels, shortcut, scope.channels, st.tuples(step, step), flags, seeds)


def _branch(values: Values, o: Operand, outputs: int, dtype: torch.dtype) -> Pointwise:
    weight = (values.wide(outputs, o.c, 1, 1) / o.c**0.5).to(dtype)
    if o.offset:
        weight = torch.stack((weight, weight + 1), -1)[..., 0]
    return Pointwise(_activation(values, o, dtype), weight, values.vectors(outputs, dtype))


def _normalised(branch: Pointwise, backend: str) -> tuple[Tensor, Tensor]:
    rows, w = _rows(branch.z, backend), branch.weight.flatten(1).double()
    off = (w.shape[1] + 8) * roundoff(branch.weight.dtype) * (rows.abs() @ w.abs().T)
    return affine(rows @ w.T, branch.vectors, off)


def check_tail(case: Tail, backend: str) -> None:
    values, dtype, o = Values(case.seed), DTYPES[case.dtype], case.operand
    main = _branch(values, o, case.outputs, dtype)
    total, slack = _normalised(main, backend)
    shape = o.n, case.outputs, *o.size
    other, off, shortcut = 0.0, 0.0, None
    given = [main.z.image, main.weight]
    if case.shortcut == "projection":
        beside = o._replace(c=case.beside, stride=case.stride, prologue=False)
        branch = _branch(values, beside, case.outputs, dtype)
        other, off = _normalised(branch, backend)
        shortcut = Joined(projection=branch)
        given += [branch.z.image, branch.weight]
    else:
        image, vectors2 = values.image(*shape, dtype=dtype, offset=o.offset), values.vectors(case.outputs, dtype)
        given.append(image)
        if case.shortcut == "skip":
            shortcut, other = Joined(skip=image), to_rows(image).double()
        else:
            shortcut = Joined(y2=image, vectors2=vectors2)
            other, off = affine(to_rows(image).double(), vectors2)
    before = [t.clone() for t in given]
    out, signs = pointwise_tail(main, shortcut, keep_signs=case.signs, run=of(backend))
    assert out.shape == shape
    assert out.dtype == dtype
    limit = slack + off + 4 * roundoff(dtype) * (total.abs() + other.abs())
    hold(to_rows(out), (total + other).relu(), limit, "pointwise_tail")
    assert (signs is not None) == case.signs
    if signs is not None:
        hold_signs(signs, to_rows(out), "pointwise_tail: signs")
    untouched(given, before, "pointwise_tail")


class TailBack(NamedTuple):
    """end: of the last step: plain, inner, or into an image at z's stride. reread: whether step 1 leaves g A to step 3."""

    dtype: str
    operand: Operand
    outputs: int
    training: bool
    end: str
    reread: bool
    affine: tuple[bool, bool, bool]
    seed: int


def _tail_back(scope: Scope):
    ends, triple = st.sampled_from(("plain", "inner", "into")), st.tuples(flags, flags, flags)
    return st.builds(TailBack, scope.dtype, _operand(scope), scope.channels, flags, ends, flags, triple, seeds)


def check_tail_back(case: TailBack, backend: str) -> None:
    """Each step is held to the formula on what the step before gave."""
    values, dtype = Values(case.seed), DTYPES[case.dtype]
    u, half, wide = roundoff(dtype), torch.finfo(dtype).eps / 2, statistics(dtype)
    o = case.operand._replace(prologue=True) if case.end == "inner" else case.operand
    if case.end != "into":
        o = o._replace(stride=(1, 1))
    branch = _branch(values, o, case.outputs, dtype)
    z, c, k = branch.z, case.outputs, o.c
    n, (h, w) = o.n, o.size
    rows = _rows(z, backend)
    pixels = len(rows)
    dout, opened = values.image(n, c, h, w, dtype=dtype, offset=o.offset), values.open(pixels, c)
    signs = pack_signs(opened)
    g = torch.where(opened, to_rows(dout).double(), 0)
    true_mean = rows.mean(0)
    centred = rows - true_mean
    product = centred.T @ centred / pixels
    found = Moments(true_mean, (product + product.T) / 2) if case.training else None
    y = rows @ branch.weight.flatten(1).double().T
    v = branch.vectors.double()
    if case.training:
        var = y.var(0, correction=0) + 1e-2
        v = torch.stack((y.mean(0), var, var.rsqrt(), v[3], v[4]))
        branch = branch._replace(vectors=v.to(wide))
    v = Vectors(*branch.vectors.double())
    given = [z.image, branch.weight, dout, signs]
    before = [t.clone() for t in given]

    scaled = scaled_weight(branch, run=of(backend))
    weight = branch.weight.flatten(1).double()
    a = v.scale[:, None] * weight
    within(scaled.double(), a, stored(a, 2 * u * a.abs(), scaled.dtype), "scaled_weight")

    fresh = Activation(z.image, z.vectors, z.stride)
    mean = None if found is None else found.mean
    sums = pointwise_tail_backward_reduce(dout, signs, fresh, mean, None if case.reread else scaled, run=of(backend))
    assert sums.total.dtype == sums.product.dtype == torch.float64
    centre = rows if mean is None else rows - mean
    within(sums.total, g.sum(0), (pixels + 4) * u * g.abs().sum(0), "reduce: sum g")
    # Kernels take z from its mean in float32.
    size = centre.abs() + u * (rows.abs() + (0 if mean is None else mean.abs())) / u * (1 if dtype.itemsize == 2 else 0)
    limit = (pixels + 16) * u * (g.abs().T @ size) + 4 * u * (g.abs().T @ (rows.abs() + (0 if mean is None else mean.abs())))
    if dtype.itemsize == 2:
        limit = limit + 2 * half * (g.abs().T @ size)
    within(sums.product, g.T @ centre, limit, "reduce: M")
    through = g @ scaled.double()
    if sums.through is not None:
        off = (c + 8) * u * (g.abs() @ scaled.double().abs())
        within(sums.through.double(), through, stored(through, off, sums.through.dtype), "reduce: g A")

    gamma, beta = (values.maybe(there, c, dtype=wide) for there in case.affine[:2])
    scale = values.maybe(case.affine[2], dtype=wide)
    grads = pointwise_tail_backward_finalize(sums, found, branch, scaled, gamma, beta, scale, dout, signs, run=of(backend))
    _hold_tail_gradients(grads, sums, found, branch, scaled, gamma, beta, scale, (g, y, rows), pixels)

    into, start = None, 0.0
    height, width = z.image.shape[2:]
    if case.end == "into":
        into = values.image(n, k, height, width, dtype=dtype)
        start = into.double().clone()
    fresh = Activation(z.image, z.vectors, z.stride)
    kept = None if sums.through is None else sums.through.clone()
    inflow = pointwise_tail_backward_apply(
        dout, signs, fresh, scaled, kept, grads, inner=case.end == "inner", into=into, run=of(backend)
    )
    base = through if sums.through is None else sums.through.double()
    terms, off = base.clone(), (c + 8) * u * (g.abs() @ scaled.double().abs())
    # g A is rounded where it is kept, and in the moment form's 16-bit products.
    off = off + 2 * half * base.abs()
    if found is not None:
        quadratic, constant = grads.quadratic.double(), grads.constant.double()
        terms = through - (centred @ quadratic + constant)
        spread = rows.abs() + true_mean.abs()
        off = off + (k + 16) * u * (centred.abs() @ quadratic.abs() + constant.abs()) + 4 * u * (spread @ quadratic.abs())
        if dtype.itemsize == 2:
            off = off + 2 * half * (centred.abs() @ quadratic.abs())
    else:
        terms = through
    if into is not None:
        assert inflow.image.data_ptr() == into.data_ptr()
        joined = torch.zeros_like(start)
        joined[:, :, :: z.stride[0], :: z.stride[1]] = to_image(terms.contiguous(), n, h, w)
        limit = torch.zeros_like(start)
        limit[:, :, :: z.stride[0], :: z.stride[1]] = to_image((off + u * terms.abs()).contiguous(), n, h, w)
        touched = torch.zeros_like(start, dtype=torch.bool)
        touched[:, :, :: z.stride[0], :: z.stride[1]] = True
        expected = start + joined
        limit = torch.where(touched, stored(expected, limit + 2 * u * (start.abs() + joined.abs()), dtype), 0)
        within(into.double(), expected, limit, "apply: into")
    else:
        got = to_rows(inflow.image)
        limit = stored(terms, off, dtype)
        if inflow.masked:
            value, doubt = affine(to_rows(z.image).double(), z.vectors)
            terms = torch.where(value > 0, terms, 0)
            limit = torch.where(value.abs() <= doubt, limit + terms.abs() + got.double().abs(), torch.where(value > 0, limit, 0))
        within(got.double(), terms, limit, "apply: dz")
        assert (inflow.partials is not None) == (case.end == "inner")
        if inflow.partials is not None:
            grad, doubt = gate(got, to_rows(z.image), z.vectors, None)
            hold_sums(inflow.partials[:, 0], grad, doubt.sum(0), "apply: sum g")
            deviation = to_rows(z.image).double() - z.vectors[0].double()
            hold_sums(inflow.partials[:, 1], grad * deviation, (doubt * deviation.abs()).sum(0), "apply: sum g (y - mean)")
    untouched(given, before, "pointwise_tail_backward")


def _hold_tail_gradients(grads, sums, found, branch, scaled, gamma, beta, scale, known, pixels) -> None:
    """Step 2 from the sums as they are; channels that are suspect take D from the rows."""
    g, y, rows = known
    dtype = branch.weight.dtype
    u, wide = roundoff(dtype), statistics(dtype)
    weight, v = branch.weight.flatten(1).double(), Vectors(*branch.vectors.double())
    k = weight.shape[1]
    by_product = (weight * sums.product).sum(1)
    by_product_off = (k + 4) * u * (weight * sums.product).abs().sum(1)
    direct = (g * (y - v.mean)).sum(0)
    size = rows.abs() @ weight.abs().T + v.mean.abs()
    if found is None:
        by_product = by_product - sums.total * v.mean
        by_product_off = by_product_off + 4 * u * (sums.total * v.mean).abs()
        direct, off = by_product, by_product_off
    else:
        # The sums of step 1 carry its own error; either way of taking D will do.
        off = (pixels + k + 16) * u * (g.abs() * size).sum(0) + by_product_off + (direct - by_product).abs()
    d, off = v.invstd * by_product, v.invstd * off + 4 * u * (v.invstd * by_product).abs()
    a = 1.0 if scale is None else scale.double()
    gm = 1.0 if gamma is None else gamma.double()
    b = torch.zeros_like(d) if beta is None else beta.double()
    total = sums.total
    tiny = 2.0**-126
    within(grads.dgamma.double(), a * d, abs(a) * off + 4 * u * (a * d).abs() + tiny, "finalize: dgamma")
    within(grads.dbeta.double(), a * total, 4 * u * (a * total).abs() + tiny, "finalize: dbeta")
    limit = abs(gm) * off + 4 * u * ((gm * d).abs() + (b * total).abs())
    within(grads.dscale.double(), gm * d + b * total, limit + tiny, "finalize: dscale")
    dbias = torch.zeros_like(total) if found is not None else v.scale * total
    within(grads.dbias.double(), dbias, 4 * u * dbias.abs() + tiny, "finalize: dbias")
    product, limit = sums.product, 4 * u * sums.product.abs()
    if found is not None:
        weighted = weight @ found.covariance
        around = weight.abs() @ found.covariance.abs()
        product = product - (d * v.invstd)[:, None] * weighted
        limit = limit + (off * v.invstd)[:, None] * weighted.abs() + (k + 8) * u * ((d.abs() + off) * v.invstd)[:, None] * around
    truth = v.scale[:, None] * product
    assert grads.dweight.dtype == dtype
    assert grads.dweight.shape == branch.weight.shape
    hold(grads.dweight.flatten(1), truth, v.scale.abs()[:, None] * limit + 4 * u * truth.abs(), "finalize: dweight")
    if found is None:
        assert grads.quadratic is None
        return
    s = scaled.double()
    factor, factor_off = v.invstd * d / pixels, v.invstd * off / pixels
    quadratic = (factor[:, None] * s).T @ weight
    limit = ((factor_off + (len(d) + 8) * u * factor.abs())[:, None] * s.abs()).T @ weight.abs()
    hold(grads.quadratic, quadratic, limit + tiny, "finalize: B")
    constant = total / pixels @ s
    within(grads.constant.double(), constant, (len(d) + 8) * u * ((total / pixels).abs() @ s.abs()) + tiny, "finalize: b")
    assert wide in (torch.float32, torch.float64)


TARGETS = {
    "moments": Target(_second, check_moments),
    "moments_finalize": Target(_second, check_moments_finalize),
    "pointwise_direct": Target(_second, check_direct),
    "pointwise_tail": Target(_tail, check_tail),
    "pointwise_tail_backward": Target(_tail_back, check_tail_back),
}
