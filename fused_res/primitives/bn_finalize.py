"""`bn_finalize`: partial statistics become the scale and shift of a BN."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.common import check, check_rows, dense
from fused_res.primitives.run import Run


class Vectors(NamedTuple):
    """The rows of the [5, C] tensor that `bn_finalize` returns.

    `scale = a * gamma * invstd`, `shift = a * (beta - gamma * invstd * mean)`, `invstd = 1 / sqrt(var + eps)`, with the biased
    variance; a = 1 without a residual scale.
    """

    mean: Tensor
    var: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor


def plain(
    partials: Tensor, rows: int, pixels: int, gamma: Tensor | None, beta: Tensor | None, eps: float, residual_scale: Tensor | None
) -> Tensor:
    counts = torch.full((partials.shape[0], 1), float(rows), dtype=partials.dtype, device=partials.device)
    counts[-1] = pixels - rows * (partials.shape[0] - 1)
    means, squares = partials.unbind(1)
    if partials.shape[0] == 1:  # nothing to merge, and running statistics may be infinite
        mean, var = means[0], squares[0] / pixels
    else:
        mean = (means * counts).sum(0) / pixels
        var = (squares + counts * (means - mean).square()).sum(0) / pixels
    invstd = (var + eps).rsqrt()
    scale = invstd if gamma is None else invstd * gamma
    shift = -scale * mean if beta is None else beta - scale * mean
    if residual_scale is not None:
        scale, shift = scale * residual_scale.to(scale.dtype), shift * residual_scale.to(scale.dtype)
    return torch.stack((mean, var, invstd, scale, shift))


def bn_finalize(
    partials: Tensor,
    rows: int,
    pixels: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual_scale: Tensor | None = None,
    *,
    run: Run,
) -> Tensor:
    """Merge partial statistics and derive what normalisation needs.

    Running statistics are one tile of one row: `partials = [[running_mean, running_var]]`, `rows = pixels = 1`.

    Args:
        partials: [T, 2, C] of mean and sum of squared deviations, as `bn_stats` returns them.
        rows: rows in every tile but the last.
        pixels: rows in all tiles together, rows * (T - 1) < pixels <= rows * T.
        gamma, beta: [C], any floating-point dtype, any strides; None stands for 1 and 0.
        eps: added to the variance.
        residual_scale: a scalar tensor a that multiplies the BN's output; None stands for 1.

    Returns:
        [5, C] in the dtype of `partials`; `Vectors` names its rows.
    """
    tiles, _, channels = partials.shape
    check("partials", partials, (tiles, 2, channels), partials.dtype, partials.device)
    if not rows * (tiles - 1) < pixels <= rows * tiles:
        raise ValueError(f"pixels: {tiles} tiles of {rows} rows cannot hold {pixels} rows")
    gamma, beta = checked_parameters(gamma, beta, residual_scale, partials)
    return (run.find("bn_finalize", partials.device) or plain)(partials, rows, pixels, gamma, beta, eps, residual_scale)


def checked_parameters(
    gamma: Tensor | None, beta: Tensor | None, residual_scale: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """gamma and beta as kernels read them, for what has its channels last."""
    gamma, beta = dense(gamma), dense(beta)
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if vector is not None:
            check(name, vector, like.shape[-1:], vector.dtype, like.device)
    if residual_scale is not None:
        check("residual_scale", residual_scale, (), residual_scale.dtype, like.device)
    return gamma, beta


def bn_stats_finalize(
    y: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, residual_scale: Tensor | None = None, *, run: Run
) -> Tensor:
    """`bn_finalize` of `bn_stats` of y [P, C]; for the other arguments and the result see there."""
    own = run.find_joined("bn_stats_finalize", y.device)
    if own is None:
        partials, rows = bn_stats(y, run=run)
        return bn_finalize(partials, rows, y.shape[0], gamma, beta, eps, residual_scale, run=run)
    check_rows("y", y)
    return own(y, *checked_parameters(gamma, beta, residual_scale, y), eps, residual_scale)


def plain_running(
    mean: Tensor,
    var: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual_scale: Tensor | None,
    dtype: torch.dtype,
    run: Run,
) -> Tensor:
    mean = mean.to(dtype) if bias is None else mean.to(dtype) - bias
    partials = torch.stack((mean, var.to(dtype))).unsqueeze(0)
    return bn_finalize(partials, 1, 1, gamma, beta, eps, residual_scale, run=run)


def bn_running(
    mean: Tensor,
    var: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual_scale: Tensor | None = None,
    *,
    dtype: torch.dtype,
    run: Run,
) -> Tensor:
    """The vectors of a BN that uses its running statistics, behind a convolution whose output lacks its bias.

    Under batch statistics the bias cancels, under running ones it moves the mean.

    Args:
        mean, var: running statistics [C], any floating-point dtype.
        bias: of the convolution, [C], or None.
        gamma, beta, eps, residual_scale: as in `bn_finalize`.
        dtype: of the vectors.

    Returns:
        [5, C], as from `bn_finalize`.
    """
    for name, vector in (("mean", mean), ("var", var), ("bias", bias), ("gamma", gamma), ("beta", beta)):
        if vector is not None and (vector.shape != mean.shape or vector.device != mean.device):
            raise ValueError(
                f"{name}: expected shape {tuple(mean.shape)} on {mean.device}, got {tuple(vector.shape)} on {vector.device}"
            )
    arguments = mean, var, bias, gamma, beta, eps, residual_scale, dtype
    own = run.find("bn_running", mean.device)
    return plain_running(*arguments, run) if own is None else own(*arguments)
