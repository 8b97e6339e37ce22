"""Launches to compile ahead of time, on tensors without data: `fused_res.aot` reads what each file's `aot_variants` gives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res.kernels.launching import Launch, recording
from fused_res.kernels.tiling import unlimited


class Variant(NamedTuple):
    """A launch to compile ahead of time, and what to expect of it; `fused_res.aot` reads `aot_variants(dtype)` of each file.

    loads, stores: whether all of them take 16 bytes, sign bytes and per-channel vectors apart.
    matrix: whether it multiplies matrices, in matrix instructions, on operands that are copied asynchronously.
    sample: whether it belongs to the quick check.
    """

    name: str
    launch: Launch
    loads: bool
    stores: bool
    matrix: bool
    sample: bool


def variant(
    name: str,
    launcher: Callable,
    *arguments: Any,
    loads: bool = False,
    stores: bool = False,
    matrix: bool = False,
    sample: bool = False,
    launched: int = 0,
    **options: Any,
) -> Variant:
    """The launch, or the one numbered `launched`, that the launcher makes of these arguments, whose tensors have no data."""
    with recording() as launches, unlimited():
        launcher(*arguments, **options)
    return Variant(name, launches[launched], loads, stores, matrix, sample)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_image(*shape: int, dtype: torch.dtype) -> Tensor:
    """A channels_last image without data."""
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
