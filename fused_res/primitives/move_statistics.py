"""`move_statistics`: the running statistics of BNs move towards their batch's, in place, and their counters go on."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fused_res.primitives.run import Run
from fused_res.spec import ConvBN


class Move(NamedTuple):
    """A unit under batch statistics: its [5, C] vectors from `bn_finalize`, and over how many pixels they were taken."""

    unit: ConvBN
    vectors: Tensor
    pixels: int


def plain(moves: Sequence[Move]) -> None:
    # One by one: on a GPU torch's operators on lists leave the tensors' versions as they were.
    for unit, vectors, pixels in moves:
        if unit.num_batches_tracked is not None:
            unit.num_batches_tracked.add_(1)
        if unit.running_mean is None:
            continue
        batch_mean, batch_var = vectors[:2].unbind()
        mean = batch_mean if unit.bias is None else batch_mean + unit.bias.detach()
        var = batch_var * (pixels / (pixels - 1))
        weight = unit.momentum
        if weight is None:
            weight = 0.0 if unit.num_batches_tracked is None else unit.num_batches_tracked.to(mean.dtype).reciprocal()
        for running, value in ((unit.running_mean, mean), (unit.running_var, var)):
            if running.dtype != value.dtype:
                running.copy_(running.to(value.dtype).lerp(value, weight))
            else:
                running.lerp_(value, weight)


def move_statistics(moves: Sequence[Move], *, run: Run) -> None:
    """`running = (1 - momentum) * running + momentum * batch`, with the unbiased variance, as `nn.BatchNorm2d` does.

    The mean is that of the convolution's output with its bias. Without a host synchronisation. A backend's own kernel takes plain
    buffers, dense and of no autograd graph, and says whether it did; the formula moves all others.

    Args:
        moves: units in the order of their calls; at least 2 pixels each.
    """
    own = run.find("move_statistics", moves[0].vectors.device)
    if own is None or not own(moves):
        plain(moves)
