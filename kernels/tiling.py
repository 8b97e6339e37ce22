"""What part of a matrix a program takes, from its shape and what the GPU allows a block."""

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

# Blocks of rows in a reduction's loop: one at work, the others on their way.
STAGES = 4
# Steps of a merge of partial results whose loads are on their way together: most of its time goes into waiting for them.
UNROLL = 4
# Programs of a reduction, about: they occupy the largest GPUs, are all resident on those of 108 multiprocessors, and one block
# of a finalize kernel holds their partial results.
PROGRAMS = 512
# Rows of a tile at most whose pixels are counted from its first one (`implicit_gemm.decode`).
PLACES = 2**14


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which kernels may call too, is slow on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is at least n, for n of 1 and more."""
    return 1 << (n - 1).bit_length()


class Tile(NamedTuple):
    """The part of a [P, C] matrix that a program of `warps` warps holds at once."""

    rows: int
    channels: int
    warps: int


class ProductTile(NamedTuple):
    """What a program of a matrix product holds: rows and columns of the result, depth of a step; its warps, its loop's stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile(pixels: int, channels: int, itemsize: int, vectors: int) -> Tile:
    """The tile in which each thread of 4 warps holds `vectors` 16-byte vectors; smaller where programs would be too few.

    With at most 64 channels every thread loads its own piece of the per-channel vectors, without shared memory.
    """
    width = max(8, min(64, next_power_of_2(channels)))
    across = cdiv(channels, width)
    rows = 128 * vectors * 16 // itemsize // width
    while rows * width > 1024 and cdiv(pixels, rows) * across < 512:
        rows //= 2
    return Tile(rows, width, 4)


def row_tiles(pixels: int, channels: int, block: Tile) -> tuple[int, int]:
    """How many tiles a reduction cuts the rows into, at least one, and the rows of each but the last."""
    most = max(1, PROGRAMS // cdiv(channels, block.channels))
    rows = block.rows * max(1, cdiv(cdiv(pixels, block.rows), most))
    return max(1, cdiv(pixels, rows)), rows


def split_rows(pixels: int, across: int, step: int, least: int = 1, most: int = 2**31) -> tuple[int, int]:
    """The same for matrix products, of `across` blocks each, one or two of which fill a multiprocessor.

    A tile has from `least` to `most` rows, in multiples of `step`.
    """
    rows = cdiv(pixels * across, max(1, PROGRAMS // 2))
    rows = step * cdiv(min(max(rows, least), most), step)
    return max(1, cdiv(pixels, rows)), rows


def dot_precision(tensor: Tensor) -> str:
    """How matrix products of float32 multiply, "tf32" or "ieee": as torch's convolutions on the tensor's device do."""
    library = torch.backends.mkldnn if tensor.device.type == "cpu" else torch.backends.cudnn
    return "tf32" if library.conv.fp32_precision == "tf32" else "ieee"


def partials_tile(tiles: int) -> Tile:
    """The part of [T, C] partial results that a program of a finalize kernel holds at once."""
    rows = next((rows for rows in (8, 64) if tiles <= rows), 512)
    return Tile(rows, 8, 8 if rows == 512 else 4)


def alignment(channels: int) -> int:
    """Largest power of two up to 16 that divides C."""
    return gcd(channels, 16)


class Limits(NamedTuple):
    """What a GPU allows a tile. shared: bytes of shared memory of a block. results: of a matrix product, of a thread.

    Where `mma` instructions multiply, what they read takes registers, too; `wgmma` reads shared memory. `tcgen05` does as well, but
    the kernels' results pass through registers on their way out of its own memory, and so many spill.
    """

    shared: float
    results: int

    @classmethod
    def of(cls, capability: int, shared: int) -> "Limits":
        """capability: 86 for compute capability 8.6."""
        return cls(shared, 128 if 90 <= capability < 100 else 64)


_NONE = Limits(math.inf, 128)


class _Local(threading.local):
    target: Limits | None = None


_local = _Local()


@contextmanager
def _under(target: Limits) -> Iterator[None]:
    before, _local.target = _local.target, target
    try:
        yield
    finally:
        _local.target = before


def compiling_for(capability: int, shared: int) -> AbstractContextManager[None]:
    """Inside, in this thread, launchers choose their tiles for a GPU of this compute capability, whose blocks may have so much
    shared memory.
    """
    return _under(Limits.of(capability, shared))


def unlimited() -> AbstractContextManager[None]:
    """Inside, launchers choose their tiles as if no GPU set a limit, unless `compiling_for` one says otherwise."""
    return _under(_local.target or _NONE)


@functools.cache
def _limits(index: int) -> Limits:
    major, minor = driver.active.get_device_capability(index)
    return Limits.of(10 * major + minor, driver.active.utils.get_device_properties(index)["max_shared_mem"])


def limits(device: torch.device) -> Limits:
    """Of the GPU, or as `compiling_for` and `unlimited` say; none in the interpreter."""
    if _local.target is not None:
        return _local.target
    if device.type == "cpu":
        return _NONE
    return _limits(driver.active.get_current_device() if device.index is None else device.index)
