"""`pointwise_tail_backward`: back through one 1x1 convolution and its BN in the moment form, in three steps.

With g the incoming gradient where the outer ReLU was open, everything follows from `M = g^T (z - m)` and `sum g`:

    D = i * rowsum(W * M)      dgamma = a * D      dbeta = a * sum g      dW = diag(s) (M - diag(D * i) W G)
    dz = g A - (z - m) B - b      A = diag(s) W      B = A^T diag(i * D / P) W      b = A^T sum g / P

i is invstd, s the scale. A is rounded to z's dtype, and B and b follow from the rounded A: what BN's gradient takes away from
every pixel then still adds up to what it was given, however large s is.

With running statistics B = b = 0, `D = i * (rowsum(W * g^T z) - sum g * mean)` and `dW = diag(s) g^T z`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.layout import to_image, to_rows
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.bn_act_backward import bn_act_backward_reduce
from fused_res.primitives.bn_finalize import Vectors
from fused_res.primitives.common import check, dense, statistics_dtype
from fused_res.primitives.conv_dgrad import Inflow
from fused_res.primitives.moments import FEW, Moments, spread
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_direct import pointwise_direct_sums
from fused_res.primitives.pointwise_tail import Pointwise
from fused_res.primitives.run import Run


class Sums(NamedTuple):
    """Step 1: `sum g` [C], `M` [C, K] (both float64), and `g A` [P, K], or None where it is left to step 3."""

    total: Tensor
    product: Tensor
    through: Tensor | None


class TailGradients(NamedTuple):
    """Step 2: gradients of the weight [C, K, 1, 1] and of gamma, beta, each channel's share of the residual scale, the bias [C];

    `mean` [K] is m, `quadratic` [K, K] is B in A's dtype, `constant` [K] is b; all three None with running statistics or without A.
    """

    dweight: Tensor
    dgamma: Tensor
    dbeta: Tensor
    dscale: Tensor
    dbias: Tensor
    mean: Tensor | None
    quadratic: Tensor | None
    constant: Tensor | None


def plain_scaled_weight(branch: Pointwise) -> Tensor:
    scale, weight = Vectors(*branch.vectors).scale, branch.weight.flatten(1)
    if branch.z.pixels <= FEW:
        return scale[:, None].double() * weight
    return (scale[:, None] * weight).to(weight.dtype)


def scaled_weight(branch: Pointwise, *, run: Run) -> Tensor:
    """A = diag(scale) W, [C, K]: what g is multiplied by, as the backend's products multiply it; in float64 for `FEW` pixels."""
    own = run.find("scaled_weight", branch.weight.device) if branch.z.pixels > FEW else None
    return plain_scaled_weight(branch) if own is None else own(branch)


def _masked(dout: Tensor, signs: Tensor) -> Tensor:
    rows = to_rows(dout)
    return torch.where(unpack_signs(signs, rows.shape[1]), rows, 0)


def plain_reduce(dout: Tensor, signs: Tensor, z: Activation, mean: Tensor | None, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
    g, rows = _masked(dout, signs).double(), z.rows(run).double()
    return g.sum(0), g.T @ (rows if mean is None else rows - mean), None


def pointwise_tail_backward_reduce(
    dout: Tensor, signs: Tensor, z: Activation, mean: Tensor | None, scaled: Tensor | None, *, run: Run
) -> Sums:
    """`sum g` and `M = g^T (z - m)` in one pass over the incoming gradient, which may also write `g A`.

    Args:
        dout: [N, C, H, W], channels_last, in z's dtype.
        signs: of the outer ReLU, [P, ceil(C / 8)].
        z: operand with rows [P, K].
        mean: m [K], float64; None for running statistics, then `M = g^T z`.
        scaled: A from `scaled_weight`; None where dz is not wanted.

    Returns:
        `Sums`. Sums over tiles are float32 or better within a tile and float64 across tiles.
    """
    operands = dout, signs, z, mean, scaled
    own = run.step("pointwise_tail_backward_reduce", dout, *operands) if z.pixels > FEW else None
    return Sums(*(plain_reduce(dout, signs, z, mean, run) if own is None else own(*operands)))


def plain_finalize(
    sums: Sums,
    found: Moments | None,
    branch: Pointwise,
    scaled: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None,
    dout: Tensor,
    signs: Tensor,
    suspect: Tensor | None,
    run: Run,
) -> TailGradients:
    v = Vectors(*(row.double() for row in branch.vectors))
    w = branch.weight.flatten(1).double()
    total, product, _ = sums
    d = (w * product).sum(1)
    if found is None:
        d = d - total * v.mean
    else:
        _, weighted, cancelled = spread(found, branch.weight)
        suspect = cancelled if suspect is None else suspect
        mean = Vectors(*branch.vectors).mean
        direct = pointwise_direct_sums(dout, signs, branch.z, branch.weight, mean, suspect, run=run)
        d = torch.where(suspect, direct, d)
    d = v.invstd * d
    pixels, dtype = branch.z.pixels, statistics_dtype(branch.weight.dtype)
    if found is not None:
        product = product - (d * v.invstd)[:, None] * weighted
    dweight = v.scale[:, None] * product
    mean = quadratic = constant = None
    if found is not None and scaled is not None:
        mean, wide = found.mean, torch.promote_types(dtype, scaled.dtype)
        a = scaled.to(wide)
        quadratic = ((v.invstd * d / pixels).to(wide)[:, None] * a).T @ branch.weight.flatten(1).to(wide)
        quadratic = quadratic.to(scaled.dtype)
        constant = (total / pixels @ a.double()).to(wide)
    dscale = d if gamma is None else gamma * d
    dscale = dscale if beta is None else dscale + beta * total
    dbias = torch.zeros_like(total) if found is not None else v.scale * total
    if residual_scale is not None:
        d, total = residual_scale.double() * d, residual_scale.double() * total
    vectors = [t.to(dtype) for t in (d, total, dscale, dbias)]
    return TailGradients(dweight.to(branch.weight.dtype).view_as(branch.weight), *vectors, mean, quadratic, constant)


def pointwise_tail_backward_finalize(
    sums: Sums,
    found: Moments | None,
    branch: Pointwise,
    scaled: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None,
    dout: Tensor,
    signs: Tensor,
    suspect: Tensor | None = None,
    *,
    run: Run,
) -> TailGradients:
    """Everything that is per channel or per pair of channels; in float64, but for B.

    Args:
        sums: of step 1.
        found: the moments of z; None for running statistics.
        branch: z, weight and vectors, as in the forward.
        scaled: A from `scaled_weight`; None where dz is not wanted.
        gamma, beta, residual_scale: as in the forward.
        dout, signs: as in step 1; read only for channels whose variance the moments cannot give.
        suspect: which channels those are, [C], bool, as `moments_finalize` has found them; worked out again where not given.
    """
    arguments = sums, found, branch, scaled, dense(gamma), dense(beta), residual_scale, dout, signs, suspect
    own = run.find("pointwise_tail_backward_finalize", dout.device) if branch.z.pixels > FEW else None
    return plain_finalize(*arguments, run) if own is None else TailGradients(*own(*arguments))


def plain_apply(
    dout: Tensor,
    signs: Tensor,
    z: Activation,
    scaled: Tensor,
    gradients: TailGradients,
    inner: bool,
    into: Tensor | None,
    run: Run,
) -> Inflow:
    dtype = torch.float64 if z.pixels <= FEW else statistics_dtype(dout.dtype)
    dz = _masked(dout, signs).to(dtype) @ scaled.to(dtype)
    if gradients.quadratic is not None:
        centred = (z.rows(run).double() - gradients.mean).to(dtype)
        dz -= torch.addmm(gradients.constant.to(dtype), centred, gradients.quadratic.to(dtype))
    n, _, h, w = dout.shape
    if into is not None:
        down, right = z.stride
        into[:, :, ::down, ::right].add_(to_image(dz, n, h, w))
        return Inflow(into)
    rows = dz.to(dout.dtype)
    if not inner:
        return Inflow(to_image(rows, n, h, w))
    partials = bn_act_backward_reduce(rows, to_rows(z.image), z.vectors, run=run)
    return Inflow(to_image(rows, n, h, w), partials)


def pointwise_tail_backward_apply(
    dout: Tensor,
    signs: Tensor,
    z: Activation,
    scaled: Tensor,
    through: Tensor | None,
    gradients: TailGradients,
    *,
    inner: bool = False,
    into: Tensor | None = None,
    run: Run,
) -> Inflow:
    """`dz = g A - (z - m) B - b`, and the ReLU and sums of the BN below, as the epilogue of `conv_dgrad` with `inner`.

    Args:
        dout, signs, z: as in step 1.
        scaled: A from `scaled_weight`.
        through: `g A` where step 1 wrote it; it may be overwritten.
        gradients: of step 2.
        inner: whether z is `relu(scale * y + shift)` and the sums of the BN that made it are wanted.
        into: an image of the shape, dtype and layout of z's which dz joins in place, at the pixels of z's stride, rounded once;
            excludes `inner`.

    Returns:
        `Inflow`: dz at the pixels of z's stride, [N, K, h, w], channels_last, in z's dtype; partial sums with `inner`; or `into`.
    """
    if into is not None:
        if inner:
            raise ValueError("into: expected None together with inner")
        check("into", to_rows(into), to_rows(z.image).shape, z.image.dtype, z.image.device)
        if into.shape != z.image.shape or not into.is_contiguous(memory_format=torch.channels_last):
            got = f"strides {into.stride()} for shape {tuple(into.shape)}"
            raise ValueError(f"into: expected a channels_last image of shape {tuple(z.image.shape)}, got {got}")
    operands = dout, signs, z, scaled, through, gradients, inner, into
    own = run.step("pointwise_tail_backward_apply", dout, *operands) if z.pixels > FEW else None
    return plain_apply(dout, signs, z, scaled, gradients, inner, into, run) if own is None else Inflow(*own(*operands))
