"""`bn_stats`: the statistics of every channel, one partial result for each tile of rows."""

import torch
from torch import Tensor

from fused_res.primitives.common import check_rows, statistics_dtype
from fused_res.primitives.run import Run


def plain(y: Tensor) -> tuple[Tensor, int]:
    wide = y.to(statistics_dtype(y.dtype))
    mean = wide.mean(0)
    return torch.stack((mean, (wide - mean).square_().sum(0))).unsqueeze(0), y.shape[0]


def bn_stats(y: Tensor, *, run: Run) -> tuple[Tensor, int]:
    """Partial statistics of the columns of y.

    Args:
        y: activations [P, C], P >= 1.

    Returns:
        `partials` [T, 2, C] and `rows`: tile t covers rows t*rows to min((t+1)*rows, P) of y, partials[t, 0] is its mean and
        partials[t, 1] the sum of squared deviations from that mean. Centred tiles keep their digits where the mean dwarfs the
        deviation (Chan, Golub, LeVeque 1983); `bn_finalize` merges them in a fixed order.
    """
    check_rows("y", y)
    if y.shape[0] < 1:
        raise ValueError("y: expected at least one row, got none")
    return (run.find("bn_stats", y.device) or plain)(y)
