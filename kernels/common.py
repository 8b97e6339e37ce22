"""What the kernels share: device helpers, tile shapes, and launching."""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver


@triton.jit
def aligned(C, ALIGN: tl.constexpr):
    """C, which ALIGN divides, in a form that tells the compiler so: rows then start as aligned as the tensor does."""
    return C // ALIGN * ALIGN


@triton.jit
def offset(row, C):
    """First element of a row, in 64 bits: P * C may exceed 2^31."""
    return row.to(tl.int64) * C


@triton.jit
def first_row(tile, rows):
    """First row of a tile, in 64 bits."""
    return tile.to(tl.int64) * rows


@triton.jit
def locate(C, rows, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's tile of `rows` rows: its number, its first row, the channels, and a block's places from that row on."""
    across = tl.cdiv(C, BLOCK_C)
    t = tl.program_id(0) // across
    c = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.arange(0, BLOCK_P)[:, None] * C + c[None, :]  # [BLOCK_P, BLOCK_C]
    return t, first_row(t, rows), c, at


@triton.jit
def locate_signs(C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Bytes in a row of sign bits, the bytes of this program's channels, and a block's places."""
    S = (C + 7) // 8
    b = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    at = tl.arange(0, BLOCK_P)[:, None] * S + b[None, :]  # [BLOCK_P, BLOCK_C / 8]
    return S, b, at


@triton.jit
def within(rows, P, columns, C):
    """Mask [rows, columns] of a block: the first P rows and the columns below C."""
    return (rows < P)[:, None] & (columns < C)[None, :]


@triton.jit
def affine(y, scale, shift):
    """scale * y + shift with one rounding, so that forward and backward take the same sign for every element."""
    return tl.fma(y, scale, shift)


@triton.jit
def is_open(v):
    """Whether the ReLU lets v's gradient pass; NaN does."""
    return (v <= 0) == 0


@triton.jit
def relu(v):
    """max(v, 0) that keeps NaN."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def narrow(v, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """v as a matrix product of this dtype and precision multiplies it: TF32 keeps the upper 10 bits of a float32's fraction."""
    if tl.float32 == DTYPE and PRECISION == "tf32":
        bits = v.to(tl.int32, bitcast=True)
        bits = tl.where(v == v, bits, 0)
        even = bits + 0xFFF + ((bits >> 13) & 1)
        v = tl.where(v == v, (even & -0x2000).to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def load_row(vectors, row: tl.constexpr, C, c):
    """Row of a [rows, C] tensor of per-channel vectors, at the channels c; 0 past the last channel."""
    return tl.load(vectors + row * C + c, mask=c < C, other=0.0)


@triton.jit
def store_vectors(pointer, vectors, C, c):
    """Per-channel vectors as the rows of a [rows, C] tensor."""
    for row in tl.static_range(len(vectors)):
        tl.store(pointer + row * C + c, vectors[row], mask=c < C)


@triton.jit
def load_rows(pointer, at, mask):
    """A tile of activations in float32; 0 where masked."""
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activate(v, vectors, C, c):
    """relu(scale * v + shift), with the vectors of the channels c."""
    return relu(affine(v, load_row(vectors, 3, C, c)[None, :], load_row(vectors, 4, C, c)[None, :]))


@triton.jit
def add_shortcut(v, skip, y2, vectors2, start, at, mask, C, c):
    """v + skip, or v + scale2 * y2 + shift2, of whichever is there the elements `at` from `start` on."""
    if skip is not None:
        v += load_rows(skip + start, at, mask)
    if y2 is not None:
        v += affine(load_rows(y2 + start, at, mask), load_row(vectors2, 3, C, c)[None, :], load_row(vectors2, 4, C, c)[None, :])
    return v


@triton.jit
def through_bn(g, y, coefficients, C, c, LIVE: tl.constexpr):
    """p * g + q * y + r, with the coefficients of the channels c; p * g where the statistics are no function of y."""
    result = g * load_row(coefficients, 0, C, c)[None, :]
    if LIVE:
        result += tl.fma(y, load_row(coefficients, 1, C, c)[None, :], load_row(coefficients, 2, C, c)[None, :])
    return result


@triton.jit
def store_gradient(pointer, gradient, at, mask, y, vectors, partials, t, C, c):
    """Store a block of the gradient of z at elements `at`, where z is `relu(scale * y + shift)` if there are `partials`.

    It is then masked by that ReLU, and row t of `partials` [T, 2, C] becomes the sums over the block of g and g * (y - mean), of
    the values as they are stored.
    """
    if partials is not None:
        v = load_rows(y, at, mask)
        opened = is_open(affine(v, load_row(vectors, 3, C, c)[None, :], load_row(vectors, 4, C, c)[None, :]))
        gradient = tl.where(opened, gradient, 0.0)
    stored = gradient.to(pointer.dtype.element_ty)
    tl.store(pointer + at, stored, mask=mask)
    if partials is not None:
        g = tl.where(mask, stored.to(tl.float32), 0.0)
        moment = g * (v - load_row(vectors, 0, C, c)[None, :])
        store_vectors(partials + offset(t * 2, C), (tl.sum(g, axis=0), tl.sum(moment, axis=0)), C, c)


@triton.jit
def pack(bits, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Booleans [BLOCK_P, BLOCK_C] as sign bytes [BLOCK_P, BLOCK_C / 8], the first channel in the lowest bit."""
    grouped = tl.reshape(bits.to(tl.int32), (BLOCK_P, BLOCK_C // 8, 8))
    return tl.sum(grouped << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack(signs, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Inverse of `pack`."""
    bits = (signs.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_P, BLOCK_C)) != 0


# Blocks of rows in a reduction's loop: one at work, the others on their way.
STAGES = 4
# Steps of a merge of partial results whose loads are on their way together: most of its time goes into waiting for them.
UNROLL = 4
# Programs of a reduction, about: they occupy the largest GPUs, are all resident on those of 108 multiprocessors, and one block
# of a finalize kernel holds their partial results.
PROGRAMS = 512


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


class Launch(NamedTuple):
    """A kernel with everything it is launched with."""

    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]
    warps: int


_recorders: list[list[Launch]] = []


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
_targets: list[Limits] = []


@contextmanager
def compiling_for(capability: int, shared: int) -> Iterator[None]:
    """Inside, launchers choose their tiles for a GPU of this compute capability, whose blocks may have so much shared memory."""
    _targets.append(Limits.of(capability, shared))
    try:
        yield
    finally:
        _targets.pop()


@functools.cache
def _limits(index: int) -> Limits:
    major, minor = driver.active.get_device_capability(index)
    return Limits.of(10 * major + minor, driver.active.utils.get_device_properties(index)["max_shared_mem"])


def limits(device: torch.device) -> Limits:
    """Of the GPU; none in the interpreter, and where launches are only recorded."""
    if _targets:
        return _targets[-1]
    if _recorders or device.type == "cpu":
        return _NONE
    return _limits(driver.active.get_current_device() if device.index is None else device.index)


class _Watcher(threading.local):
    call: Callable | None = None


_watcher = _Watcher()


@contextmanager
def watching(call: Callable) -> Iterator[None]:
    """Inside, in this thread, launches go through `call(launch, *arguments, **constants)`; `launch` runs on the current device."""
    before, _watcher.call = _watcher.call, call
    try:
        yield
    finally:
        _watcher.call = before


def _tensors(arguments: tuple) -> Iterator[Tensor]:
    """The tensors among arguments and tuples of them."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def launch(kernel: Any, programs: int, *arguments: Any, warps: int, **constants: Any) -> None:
    """Run the kernel on the current stream of the device of the first tensor among the arguments."""
    if _recorders:
        _recorders[-1].append(Launch(kernel, programs, arguments, constants, warps))
        return
    with torch.cuda.device_of(next(_tensors(arguments))):
        run = kernel[(programs,)]
        if _watcher.call is None:
            run(*arguments, **constants, num_warps=warps)
        else:
            _watcher.call(run, *arguments, **constants, num_warps=warps)


def launch_tiles(kernel: Any, tiles: int, block: Tile, channels: int, *arguments: Any, **constants: Any) -> None:
    """Run the kernel over tiles of rows and blocks of channels, with the constants that follow from the block."""
    programs = tiles * cdiv(channels, block.channels)
    constants |= {"ALIGN": alignment(channels), "BLOCK_P": block.rows, "BLOCK_C": block.channels}
    launch(kernel, programs, *arguments, warps=block.warps, **constants)


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
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        launcher(*arguments, **options)
    finally:
        _recorders.pop()
    return Variant(name, launches[launched], loads, stores, matrix, sample)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")
