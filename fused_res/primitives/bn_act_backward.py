"""`bn_act_backward`: through the ReLU and one or two BNs, in three steps: reduce, finalize, apply.

With g the incoming gradient where the ReLU let it pass and 0 elsewhere, the gradient of a BN's input is affine in g and y,
`dy = p * g + q * y + r`, with per-channel p, q, r that are known after one reduction over the pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.primitives.bn_act import sign_bytes, unpack_signs
from fused_res.primitives.bn_finalize import Vectors, checked_parameters
from fused_res.primitives.common import check, check_rows, statistics_dtype
from fused_res.primitives.run import Run


class Coefficients(NamedTuple):
    """The rows of the [7, C] tensor that `bn_act_backward_finalize` returns.

    p, q, r as above; then the gradients of gamma and beta, each channel's share of the residual scale's gradient, and the
    gradient of the convolution's bias.
    """

    p: Tensor
    q: Tensor
    r: Tensor
    dgamma: Tensor
    dbeta: Tensor
    dscale: Tensor
    dbias: Tensor


def masked(dout: Tensor, y: Tensor, vectors: Tensor, signs: Tensor | None) -> Tensor:
    """g in the vectors' dtype: dout where the ReLU was open, by its saved signs or by the sign of scale * y + shift."""
    v = Vectors(*vectors)
    if signs is not None:
        open_ = unpack_signs(signs, dout.shape[1])
    else:
        open_ = ~(torch.addcmul(v.shift, y.to(v.scale.dtype), v.scale) <= 0)
    return torch.where(open_, dout.to(v.scale.dtype), 0)


def plain_reduce(
    dout: Tensor, y: Tensor, vectors: Tensor, signs: Tensor | None, y2: Tensor | None, vectors2: Tensor | None
) -> Tensor:
    g = masked(dout, y, vectors, signs)
    sums = [g.sum(0), (g * (y - Vectors(*vectors).mean)).sum(0)]
    if y2 is not None:
        sums.append((g * (y2 - Vectors(*vectors2).mean)).sum(0))
    return torch.stack(sums).unsqueeze(0)


def bn_act_backward_reduce(
    dout: Tensor,
    y: Tensor,
    vectors: Tensor,
    *,
    signs: Tensor | None = None,
    y2: Tensor | None = None,
    vectors2: Tensor | None = None,
    run: Run,
) -> Tensor:
    """Partial sums over tiles of rows of `g`, `g * (y - mean)` and, with a second BN, `g * (y2 - mean2)`.

    Args:
        dout: incoming gradient [P, C].
        y, vectors: the BN's input [P, C] and its [5, C] vectors.
        signs: saved signs of the outer ReLU; without them the ReLU is the inner one, right after this BN, and its signs are
            those of `scale * y + shift`.
        y2, vectors2: a second BN whose output was added before the ReLU; needs `signs`.

    Returns:
        [T, 2, C], or [T, 3, C] with a second BN, in the vectors' dtype. The sums over T are the result; how many tiles there
        are is the backend's choice.
    """
    _check_pair(dout, y, vectors, signs)
    if y2 is not None:
        if signs is None:
            raise ValueError("signs: expected with y2, got None")
        _check_pair(dout, y2, vectors2, signs)
    return (run.find("bn_act_backward_reduce", y.device) or plain_reduce)(dout, y, vectors, signs, y2, vectors2)


def plain_finalize(
    partials: Tensor,
    row: int,
    pixels: int,
    vectors: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None,
    training: bool,
) -> Tensor:
    v = Vectors(*vectors)
    total = partials[:, 0].sum(0)
    d = v.invstd * partials[:, row].sum(0)
    p = v.scale
    q = -p * v.invstd * d / pixels if training else torch.zeros_like(p)
    r = -p * total / pixels - q * v.mean if training else q
    dscale = d if gamma is None else gamma * d
    dscale = dscale if beta is None else dscale + beta * total
    dgamma, dbeta = d, total
    if residual_scale is not None:
        a = residual_scale.to(d.dtype)
        dgamma, dbeta = a * dgamma, a * dbeta
    return torch.stack((p, q, r, dgamma, dbeta, dscale, torch.zeros_like(p) if training else p * total))


def bn_act_backward_finalize(
    partials: Tensor,
    row: int,
    pixels: int,
    vectors: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None = None,
    *,
    training: bool,
    run: Run,
) -> Tensor:
    """The sums of one BN become its coefficients and its parameters' gradients.

    With `D = invstd * sum(g * (y - mean))`: `dgamma = a * D`, `dbeta = a * sum(g)`, `dscale = gamma * D + beta * sum(g)`. With
    batch statistics `q = -scale * invstd * D / P`, `r = -scale * sum(g) / P - q * mean` and `dbias = 0`; with running
    statistics `q = r = 0` and `dbias = scale * sum(g)`. Always `p = scale`.

    Args:
        partials: [T, 2 or 3, C] from `bn_act_backward_reduce`.
        row: which row of `partials` holds this BN's `g * (y - mean)`: 1, or 2 for the second BN.
        pixels: P.
        vectors, gamma, beta, residual_scale: as in the forward `bn_finalize`.
        training: whether the BN used the batch's statistics.

    Returns:
        [7, C] in the vectors' dtype; `Coefficients` names its rows.
    """
    tiles, sums, channels = partials.shape
    if row not in range(1, sums):
        raise ValueError(f"row: expected 1 to {sums - 1}, got {row}")
    if pixels < 1:
        raise ValueError(f"pixels: expected at least 1, got {pixels}")
    check("partials", partials, (tiles, sums, channels), vectors.dtype, vectors.device)
    check("vectors", vectors, (5, channels), vectors.dtype, vectors.device)
    gamma, beta = checked_parameters(gamma, beta, residual_scale, vectors)
    kernel = run.find("bn_act_backward_finalize", vectors.device) or plain_finalize
    return kernel(partials, row, pixels, vectors, gamma, beta, residual_scale, training)


def plain_apply(
    dout: Tensor,
    y: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    signs: Tensor | None,
    training: bool,
    y2: Tensor | None,
    coefficients2: Tensor | None,
    training2: bool,
    keep_masked: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    g = masked(dout, y, vectors, signs)

    def affine(c: Coefficients, y: Tensor, training: bool) -> Tensor:
        dy = g * c.p
        return (dy.addcmul_(y.to(dy.dtype), c.q).add_(c.r) if training else dy).to(y.dtype)

    dy = affine(Coefficients(*coefficients), y, training)
    dy2 = None if y2 is None else affine(Coefficients(*coefficients2), y2, training2)
    return dy, dy2, g.to(dout.dtype) if keep_masked else None


def bn_act_backward_apply(
    dout: Tensor,
    y: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    *,
    training: bool,
    signs: Tensor | None = None,
    y2: Tensor | None = None,
    coefficients2: Tensor | None = None,
    training2: bool = False,
    keep_masked: bool = False,
    run: Run,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`dy = p * g + q * y + r` for one or two BNs, and g itself for the shortcut.

    Args:
        dout, y, vectors, signs, y2: as in `bn_act_backward_reduce`.
        coefficients, coefficients2: [7, C] from `bn_act_backward_finalize`.
        training, training2: whether the BN used the batch's statistics; where not, q = r = 0 and y only gives signs, so its
            NaN and Inf stay out of dy.
        keep_masked: whether to return g.

    Returns:
        dy, dy2 or None, and g or None, each [P, C] in y's dtype.
    """
    _check_pair(dout, y, vectors, signs)
    check("coefficients", coefficients, (7, y.shape[1]), vectors.dtype, y.device)
    if (y2 is None) != (coefficients2 is None):
        raise ValueError("coefficients2: expected together with y2")
    if y2 is not None:
        if signs is None:
            raise ValueError("signs: expected with y2, got None")
        check("y2", y2, y.shape, y.dtype, y.device)
        check("coefficients2", coefficients2, coefficients.shape, vectors.dtype, y.device)
    kernel = run.find("bn_act_backward_apply", y.device) or plain_apply
    return kernel(dout, y, vectors, coefficients, signs, training, y2, coefficients2, training2, keep_masked)


def bn_act_backward(
    dout: Tensor,
    y: Tensor,
    vectors: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None = None,
    *,
    signs: Tensor | None = None,
    training: bool,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """All three steps for one BN, whose arguments they name.

    Returns:
        The coefficients [7, C], and dy [P, C] in y's dtype.
    """
    own = run.find_joined("bn_act_backward", y.device)
    if own is None:
        partials = bn_act_backward_reduce(dout, y, vectors, signs=signs, run=run)
        parameters = gamma, beta, residual_scale
        coefficients = bn_act_backward_finalize(partials, 1, y.shape[0], vectors, *parameters, training=training, run=run)
        dy, _, _ = bn_act_backward_apply(dout, y, vectors, coefficients, training=training, signs=signs, run=run)
        return coefficients, dy
    _check_pair(dout, y, vectors, signs)
    return own(dout, y, vectors, *checked_parameters(gamma, beta, residual_scale, vectors), residual_scale, signs, training)


def _check_pair(dout: Tensor, y: Tensor, vectors: Tensor | None, signs: Tensor | None) -> None:
    check_rows("y", y)
    check("dout", dout, y.shape, y.dtype, y.device)
    if vectors is None:
        raise ValueError("vectors2: expected together with y2")
    check("vectors", vectors, (5, y.shape[1]), statistics_dtype(y.dtype), y.device)
    if signs is not None:
        check("signs", signs, (y.shape[0], sign_bytes(y.shape[1])), torch.uint8, y.device)
