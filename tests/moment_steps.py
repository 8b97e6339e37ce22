"""The steps of the moment form, and what several test files hold them to."""

from types import SimpleNamespace

import torch
from compare import same, within
from pointwise import exact_rows, statistics

from fused_res.layout import to_rows
from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.moments import moments
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_tail import Joined, Pointwise, pointwise_tail
from fused_res.primitives.pointwise_tail_backward import (
    pointwise_tail_backward_apply,
    pointwise_tail_backward_finalize,
    pointwise_tail_backward_reduce,
    scaled_weight,
)
from fused_res.primitives.run import of

SHORTCUTS = ["skip", "second", "projection", "strided projection"]
EPS = 1e-3


def check_moments(z, backend, error=32 * 2.0**-24):
    """Errors of the mean in units of the deviation, which is known to a value's rounding at best; of the covariance, of two."""
    before = z.image.clone()
    mean, covariance = moments(z, run=of(backend))
    same(z.image, before)
    assert mean.dtype == covariance.dtype == torch.float64
    rows = exact_rows(z, backend)
    centred = rows - rows.mean(0)
    expected = centred.T @ centred / len(rows)
    unit = expected.diagonal().sqrt() + 2.0**-24 * rows.abs().amax(0)
    within(mean, rows.mean(0), error * unit)
    within(covariance, expected, error * torch.outer(unit, unit))
    same(covariance, covariance.T)


def tail_arguments(draw, shape, inner, outer, dtype, shortcut, prologue=True):
    n, h, w = shape

    def branch(z):
        weight = draw.normal(outer, z.image.shape[1], 1, 1) / z.image.shape[1] ** 0.5
        return Pointwise(z, weight.to(dtype), draw.normal(5, outer, dtype=statistics(dtype)))

    main = branch(draw.activation(n, inner, h, w, dtype, prologue=prologue))
    other = draw.normal(n, outer, h, w, dtype=dtype)
    if shortcut == "skip":
        return main, Joined(skip=other)
    if shortcut == "second":
        return main, Joined(y2=other, vectors2=draw.normal(5, outer, dtype=statistics(dtype)))
    stride = (2, 3) if shortcut.startswith("strided") else (1, 1)
    size = (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1 + (stride[1] > 1)
    return main, Joined(projection=branch(draw.activation(n, 2 * inner, *size, dtype, prologue=False, stride=stride)))


def exact_tail(main, shortcut, backend):
    """The sum in front of the ReLU, and the largest that its terms may be, both [P, C] in float64."""

    def branch(part):
        rows, weight = exact_rows(part.z, backend), part.weight.flatten(1).double()
        scale, shift = part.vectors[3].double(), part.vectors[4].double()
        return rows @ weight.T * scale + shift, rows.abs() @ weight.abs().T * scale.abs() + shift.abs()

    total, size = branch(main)
    if shortcut.skip is not None:
        more = to_rows(shortcut.skip).double()
        return total + more, size + more.abs()
    if shortcut.projection is not None:
        more, its = branch(shortcut.projection)
        return total + more, size + its
    more = to_rows(shortcut.y2).double() * shortcut.vectors2[3].double() + shortcut.vectors2[4].double()
    return total + more, size + more.abs()


def check_tail(main, shortcut, backend):
    dtype, (total, size) = main.weight.dtype, exact_tail(main, shortcut, backend)
    before = main.z.image.clone(), main.weight.clone()
    out, signs = pointwise_tail(main, shortcut, keep_signs=True, run=of(backend))
    n, _, h, w = main.z.image.shape
    assert out.shape == (n, main.weight.shape[0], h, w)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    same(main.z.image, before[0])
    same(main.weight, before[1])
    # One rounding of what is stored, and those of the arithmetic, which grow with the terms.
    arithmetic = 2.0**-48 if dtype == torch.float64 else 2.0**-21
    finfo = torch.finfo(dtype)
    limit = arithmetic * size + finfo.eps / 2 * total.abs() + finfo.smallest_normal * finfo.eps
    rows = to_rows(out)
    within(rows.double(), total.relu(), limit)
    same(signs, pack_signs(~(rows <= 0)))
    return out, signs


def backward_case(
    draw, backend, shape, inner, outer, dtype, *, training=True, prologue=True, stride=(1, 1), residual_scale=0.5, mean=0.0
):
    """Operands of the three steps, and from autograd in float64 what should come of them."""
    n, h, w = shape
    wide, size = statistics(dtype), ((h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1)
    z = draw.activation(n, inner, *size, dtype, prologue=prologue, stride=stride, mean=mean)
    weight = (draw.normal(outer, inner, 1, 1) / inner**0.5).to(dtype)
    gamma, beta = draw.normal(outer, dtype=wide), draw.normal(outer, dtype=wide)
    running = draw.normal(outer, dtype=torch.float64), draw.normal(outer, dtype=torch.float64).abs() + 0.5
    dout, opened = draw.normal(n, outer, h, w, dtype=dtype), draw.opened(n * h * w, outer)
    scale = torch.tensor(residual_scale, dtype=wide, device=draw.device)

    rows = exact_rows(z, backend).requires_grad_()
    leaves = [t.double().requires_grad_() for t in (weight, gamma, beta, scale)]
    bias = torch.zeros(outer, dtype=torch.float64, device=draw.device, requires_grad=True)
    y = rows @ leaves[0].flatten(1).T + bias
    mean, var = (y.mean(0), y.var(0, correction=0)) if training else running
    invstd = 1 / (var + EPS).sqrt()
    total = leaves[3] * (leaves[1] * (y - mean) * invstd + leaves[2])
    g = torch.where(opened, to_rows(dout), 0)
    total.backward(g.double())
    vectors = torch.stack((mean, var, invstd, leaves[3] * leaves[1] * invstd, leaves[3] * (leaves[2] - leaves[1] * invstd * mean)))
    parameters = zip(("dw", "dgamma", "dbeta", "da"), leaves, strict=True)
    truth = SimpleNamespace(dz=rows.grad, dbias=bias.grad, **{name: leaf.grad for name, leaf in parameters})
    branch = Pointwise(z, weight, vectors.detach().to(wide))
    return SimpleNamespace(
        branch=branch, gamma=gamma, beta=beta, scale=scale, dout=dout, signs=pack_signs(opened), g=g, training=training, truth=truth
    )


def run_backward(c, backend, *, inner=False, reread=False):
    """The three steps; with `reread` the last one reads the incoming gradient again."""
    before = c.branch.z.image.clone(), c.dout.clone()
    z = Activation(c.branch.z.image, c.branch.z.vectors, c.branch.z.stride)
    found = moments(z, run=of(backend)) if c.training else None
    scaled = scaled_weight(c.branch, run=of(backend))
    mean = None if found is None else found.mean
    sums = pointwise_tail_backward_reduce(c.dout, c.signs, z, mean, None if reread else scaled, run=of(backend))
    assert sums.total.dtype == sums.product.dtype == torch.float64
    gradients = pointwise_tail_backward_finalize(
        sums, found, c.branch, scaled, c.gamma, c.beta, c.scale, c.dout, c.signs, run=of(backend)
    )
    inflow = pointwise_tail_backward_apply(c.dout, c.signs, z, scaled, sums.through, gradients, inner=inner, run=of(backend))
    same(c.branch.z.image, before[0])
    same(c.dout, before[1])
    return sums, gradients, inflow


def close(got, want, error, rounding=0.0):
    """Errors in units of the largest value, and of each value."""
    within(got.double(), want, error * want.abs().max() + rounding * want.abs() + 1e-30)


def check_backward(c, backend, error, **options):
    sums, gradients, inflow = run_backward(c, backend, **options)
    dtype, truth = c.branch.weight.dtype, c.truth
    half = torch.finfo(dtype).eps / 2
    n, _, h, w = c.dout.shape
    close(sums.total, c.g.double().sum(0), error)
    assert gradients.dweight.dtype == inflow.image.dtype == dtype
    assert inflow.image.shape == (n, c.branch.weight.shape[1], h, w)
    close(gradients.dweight, truth.dw, error, half)
    close(gradients.dgamma, truth.dgamma, error)
    close(gradients.dbeta, truth.dbeta, error)
    assert (gradients.dscale.double().sum() - truth.da).abs() <= error * gradients.dscale.double().abs().sum()
    if c.training:
        assert not gradients.dbias.any()
    else:
        close(gradients.dbias, truth.dbias, error)
    # A and B are rounded to z's dtype. Where the gradient is masked already, 0 is right wherever the ReLU below was shut.
    dz = truth.dz
    if inflow.masked:
        dz = torch.where((exact_rows(c.branch.z, backend) > 0) | (to_rows(inflow.image) != 0), dz, 0)
    close(to_rows(inflow.image), dz, error + 4 * half, half)
    return inflow
