"""Triton kernel of `move_statistics`."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, variant
from fused_res.kernels.launching import launch


@triton.jit
def _move(running, batch, bias, correction, momentum, C, BLOCK: tl.constexpr):
    """running = (1 - momentum) * running + momentum * correction * (batch + bias), in float64; float32 is rounded to on the way."""
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        old = tl.load(running + c, mask=c < C, other=0.0).to(tl.float64)
        value = tl.load(batch + c, mask=c < C, other=0.0).to(tl.float64)
        if bias is not None:
            value += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float64)
        moved = (1.0 - momentum) * old + momentum * correction * value
        if running.dtype.element_ty != tl.float64:
            moved = moved.to(tl.float32)
        tl.store(running + c, moved.to(running.dtype.element_ty), mask=c < C)


@triton.jit
def move_statistics_kernel(means, variances, counts, biases, vectors, corrections, momenta, channels, BLOCK: tl.constexpr):
    """The running statistics of one unit a program move towards its batch's, in place; its counter goes on.

    Tuples with an entry for each unit. means, variances: running statistics [C], or None. counts: a scalar, int64, or None.
    biases: [C] or None. vectors: [5, C], float32. corrections: P / (P - 1). momenta: numbers, or None for 1 / count, for 0 without
    a count. channels: C.
    """
    for u in tl.static_range(len(vectors)):
        if tl.program_id(0) == u:
            momentum = 0.0
            if counts[u] is not None:
                count = tl.load(counts[u]) + 1
                # Every thread has read the counter before one of them writes it.
                tl.debug_barrier()
                tl.store(counts[u], count)
                momentum = 1.0 / count.to(tl.float64)
            if momenta[u] is not None:
                momentum = momenta[u]
            if means[u] is not None:
                _move(means[u], vectors[u], biases[u], 1.0, momentum, channels[u], BLOCK)
                _move(variances[u], vectors[u] + channels[u], None, corrections[u], momentum, channels[u], BLOCK)


def _takes(buffer: Tensor, like: Tensor) -> bool:
    """Whether the kernel may write to the buffer as it lies."""
    plain = type(buffer) is Tensor and buffer.device == like.device and buffer.is_contiguous()
    return plain and not (buffer.requires_grad or buffer.is_inference())


def move_statistics(moves: Sequence[Any]) -> bool:
    """Contract: fused_res/primitives/move_statistics.py. Whether the kernel takes the buffers; where not, nothing has moved."""
    units = [move.unit for move in moves]
    counts = [unit.num_batches_tracked for unit in units]
    written = [t for unit in units for t in (unit.running_mean, unit.running_var, unit.num_batches_tracked) if t is not None]
    # Units that share a BN move its statistics one after the other, programs do not.
    if len({id(t) for t in written}) < len(written) or not all(_takes(t, moves[0].vectors) for t in written):
        return False
    if not all(count is None or (count.dtype == torch.int64 and count.dim() == 0) for count in counts):
        return False
    if not all(unit.momentum is None or isinstance(unit.momentum, int | float) for unit in units):
        return False
    launch(
        move_statistics_kernel,
        len(moves),
        tuple(unit.running_mean for unit in units),
        tuple(unit.running_var for unit in units),
        tuple(counts),
        tuple(None if unit.bias is None or unit.running_mean is None else unit.bias.detach().contiguous() for unit in units),
        tuple(move.vectors for move in moves),
        tuple(move.pixels / (move.pixels - 1) for move in moves),
        tuple(None if unit.momentum is None else float(unit.momentum) for unit in units),
        tuple(move.vectors.shape[1] for move in moves),
        BLOCK=1024,
        warps=4,
    )
    torch.autograd.graph.increment_version(written)
    return True


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    def unit(channels, momentum, bias, counter=True):
        tensors = (meta(channels, dtype=dtype) if bias else None, None, None, meta(channels), meta(channels))
        names = ("bias", "gamma", "beta", "running_mean", "running_var")
        counts = meta(dtype=torch.int64) if counter else None
        fields = dict(zip(names, tensors, strict=True), num_batches_tracked=counts, momentum=momentum)
        return SimpleNamespace(unit=SimpleNamespace(**fields), vectors=meta(5, channels), pixels=1000)

    bottleneck = [unit(channels, 0.1, False) for channels in (64, 64, 256, 256)]
    yield variant("64 64 256 256", move_statistics, bottleneck, sample=True)
    yield variant("averaged, with biases 512 3", move_statistics, [unit(512, None, True), unit(3, None, True, counter=False)])
