"""What a call of a block needs beside its tensors: what `fused_res.call` makes once for all calls that are alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.block.held import Kept


class Moved(NamedTuple):
    """The running statistics and counters that a call under batch statistics writes to, and the momenta by which they move."""

    buffers: tuple[Tensor, ...]
    momenta: tuple[float | None, ...]


class Prepared(NamedTuple):
    """dtype: what the block computes in; casts: whether anything is cast to it. pixels: of what each of `block.norms()` normalises.

    outer: the shape of the block's output. given: whether the shortcut is a tensor, x itself if the caller gave none. spec, eps: as
    `fused_res.block.packing.pack` returns them. level, backend: of the plan; backend is `AUTO` where the call is watched.
    kept: what the backward keeps of the block's tensors, unless the call is watched.
    evaluates: whether evaluation without gradients has its convolutions prepared (`fused_res.block.evaluation`).
    narrow: as `fused_res.block.op.is_narrow` says. programs: what has been recorded of such calls (`fused_res.block.program`).
    momenta: those that have a program of their own.
    """

    dtype: torch.dtype
    casts: bool
    pixels: tuple[int, ...]
    outer: tuple[int, ...]
    given: bool
    spec: Sequence[int]
    eps: Sequence[float]
    level: str
    backend: str
    watched: bool
    evaluates: bool
    narrow: bool
    kept: Kept | None
    programs: dict
    momenta: set[tuple[float | None, ...]]
