"""`pointwise_direct`: sums over y = W z for the few channels in which the moment form would cancel; nothing without them."""

import torch
from torch import Tensor

from fused_res.layout import to_rows
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.operands import Activation
from fused_res.primitives.run import Run

_STRETCH = 64  # channels whose y the plain formula holds at once


def _stretches(suspect: Tensor) -> list[Tensor]:
    """Indices of the channels to go through, a few at a time: the suspects, or all of them where asking would stop the GPU."""
    wanted = suspect.nonzero().flatten() if suspect.device.type == "cpu" else torch.arange(len(suspect), device=suspect.device)
    return list(wanted.split(_STRETCH)) if len(wanted) else []


def plain_stats(z: Activation, weight: Tensor, suspect: Tensor, run: Run) -> Tensor:
    found = torch.zeros(2, len(suspect), dtype=torch.float64, device=suspect.device)
    for some in _stretches(suspect):
        y = z.rows(run).double() @ weight.flatten(1)[some].double().T
        found[0, some] = y.mean(0)
        found[1, some] = (y - y.mean(0)).square().mean(0)
    return found


def pointwise_direct_stats(z: Activation, weight: Tensor, suspect: Tensor, *, run: Run) -> Tensor:
    """Mean and biased variance of the channels of y = W z that are suspect.

    Args:
        z: operand with rows [P, K].
        weight: [C, K, 1, 1].
        suspect: bool [C].

    Returns:
        [2, C], float64; any finite values where not suspect. Decided on the device, without waiting for it.
    """
    own = run.find("pointwise_direct_stats", weight.device)
    return plain_stats(z, weight, suspect, run) if own is None else own(z, weight, suspect)


def plain_sums(dout: Tensor, signs: Tensor, z: Activation, weight: Tensor, mean: Tensor, suspect: Tensor, run: Run) -> Tensor:
    found = torch.zeros(len(suspect), dtype=torch.float64, device=suspect.device)
    for some in _stretches(suspect):
        y = z.rows(run).double() @ weight.flatten(1)[some].double().T
        g = torch.where(unpack_signs(signs, len(suspect))[:, some], to_rows(dout)[:, some].double(), 0)
        found[some] = (g * (y - mean[some])).sum(0)
    return found


def pointwise_direct_sums(
    dout: Tensor, signs: Tensor, z: Activation, weight: Tensor, mean: Tensor, suspect: Tensor, *, run: Run
) -> Tensor:
    """`sum g * (y - mean)` over the pixels, for the channels of y = W z that are suspect.

    Args:
        dout: incoming gradient [N, C, H, W], channels_last; g is it where `signs` are open, and 0 elsewhere.
        z, weight, suspect: as in `pointwise_direct_stats`.
        mean: [C], the mean of y.

    Returns:
        [C], float64; any finite values where not suspect.
    """
    if mean.dtype != statistics_dtype(weight.dtype):
        raise TypeError(f"mean: expected {statistics_dtype(weight.dtype)}, got {mean.dtype}")
    own = run.find("pointwise_direct_sums", weight.device)
    if own is None:
        return plain_sums(dout, signs, z, weight, mean, suspect, run)
    return own(dout, signs, z, weight, mean, suspect)
