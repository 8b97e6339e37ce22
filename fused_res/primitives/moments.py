"""`moments`: mean and covariance of a 1x1 convolution's input, and the BN that follows from them.

For y = W z, `mean(y) = W m` and `var(y) = diag(W G W^T)`, with m the mean of z and G its covariance: BN of y is known before y.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.common import dense, statistics_dtype
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_direct import pointwise_direct_stats
from fused_res.primitives.run import Run
from fused_res.spec import ConvBN

SUSPECT = 2.0**-11
"""Below this ratio of w'Gw to (sum |w_k| sigma_k)^2, the most it could be, too many digits of the quadratic form have cancelled."""

FEW = 16
"""Up to so many pixels BN's gradient is a small difference of large terms, and all steps run by the plain formulas, in float64."""


class Moments(NamedTuple):
    """mean m [K] and covariance G = mean((z - m)(z - m)^T) [K, K], symmetric to the last bit; both float64."""

    mean: Tensor
    covariance: Tensor


def plain(z: Activation, run: Run) -> tuple[Tensor, Tensor]:
    rows = z.rows(run).double()
    mean = rows.mean(0)
    rows = rows - mean
    product = rows.T @ rows
    # Not every library's product of a matrix with its own transpose is symmetric to the last bit.
    return mean, (product + product.T) / (2 * rows.shape[0])


def moments(z: Activation, *, run: Run) -> Moments:
    """Mean and centred second moments of the columns of z, of the values that a matrix product would multiply.

    Args:
        z: operand whose rows, the pixels of its stride, are [P, K], P >= 1.

    Returns:
        `Moments`. Products of single values may be rounded to float32, sums over tiles are kept in float64, and tiles are
        centred: the error of every element of G stays within a few 2^-24 of sqrt(G_jj G_kk) wherever the mean is.
    """
    if z.pixels < 1:
        raise ValueError("z: expected at least one row, got none")
    own = run.step("moments", z.image, z) if z.pixels > FEW else None
    return Moments(*(plain(z, run) if own is None else own(z)))


class Tail(NamedTuple):
    """BN of a 1x1 convolution by its input's moments: the [5, C] vectors, and which channels took their variance directly."""

    vectors: Tensor
    suspect: Tensor


class Spread(NamedTuple):
    """var(y) [C], clamped at 0, and W G [C, K], both float64; and the channels [C] whose variance cannot be trusted."""

    var: Tensor
    weighted: Tensor
    suspect: Tensor


def spread(found: Moments, weight: Tensor) -> Spread:
    """The quadratic forms w'Gw of the rows of a weight [C, K, 1, 1]."""
    w = weight.flatten(1).double()
    weighted = w @ found.covariance
    var = (weighted * w).sum(1)
    most = (w.abs() @ found.covariance.diagonal().sqrt()).square()
    return Spread(var.clamp_min(0), weighted, var < SUSPECT * most)


def plain_finalize(found: Moments, z: Activation, unit: ConvBN, residual_scale: Tensor | None, run: Run) -> Tail:
    var, _, suspect = spread(found, unit.weight)
    mean = unit.weight.flatten(1).double() @ found.mean
    direct = pointwise_direct_stats(z, unit.weight, suspect, run=run)
    dtype = statistics_dtype(unit.weight.dtype)
    chosen = torch.where(suspect, direct, torch.stack((mean, var))).to(dtype)
    vectors = bn_finalize(chosen.unsqueeze(0), 1, 1, unit.gamma, unit.beta, unit.eps, residual_scale, run=run)
    return Tail(vectors, suspect)


def moments_finalize(found: Moments, z: Activation, unit: ConvBN, residual_scale: Tensor | None = None, *, run: Run) -> Tail:
    """The vectors of a BN with batch statistics behind a 1x1 convolution, without the convolution's output.

    A row of the weight that is nearly orthogonal to the data (see `SUSPECT`) gets its statistics by a direct pass.

    Args:
        found: moments of z.
        z: the convolution's input.
        unit: weight [C, K, 1, 1]; gamma, beta, eps.
        residual_scale: the scalar a, or None for 1.

    Returns:
        `Tail`, its vectors as from `bn_finalize`.
    """
    own = run.find("moments_finalize", z.image.device) if z.pixels > FEW else None
    if own is None:
        return plain_finalize(found, z, unit, residual_scale, run)
    return Tail(*own(found, z, unit._replace(gamma=dense(unit.gamma), beta=dense(unit.beta)), residual_scale))
