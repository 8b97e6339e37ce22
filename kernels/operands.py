"""What the kernels of the moment form read: z, the input of a 1x1 convolution, and g, the masked gradient of its output."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.arguments import check_dense, check_image
from fused_res.kernels.device import activate, load_where, narrow, offset, widen, within
from fused_res.kernels.implicit_gemm import decode, load_signs
from fused_res.kernels.launching import launch
from fused_res.kernels.tiling import cdiv, dot_precision, limits
from fused_res.layout import to_rows


class Operand(NamedTuple):
    """An `Activation` of fused_res/primitives/operands.py as a kernel takes it.

    data: [rows, K] as they lie in memory. vectors: [5, K] of the BN and ReLU that are still to be applied, or None.
    width, pixels: of the sampled image; image, line, step: how many rows of `data` apart its images, its lines and its pixels
    are; all None without a stride. They are no tuple of their own: Triton 3.6 cannot compare one that has a 1 in it with None.
    """

    data: Tensor
    vectors: Tensor | None
    width: int | None = None
    pixels: int | None = None
    image: int | None = None
    line: int | None = None
    step: int | None = None


def operand(name: str, z: Any, like: Tensor) -> Operand:
    """The kernels' view of an `Activation`, strided or not, without a copy, in the dtype and on the device of `like`.

    What a strided one is sampled from may have 2^31 - 1 rows.
    """
    rows = to_rows(check_image(name, z.image, z.image.shape, like))
    vectors = z.vectors
    if vectors is not None:
        check_dense(f"{name}.vectors", vectors, (5, rows.shape[1]), torch.float32, like)
    if z.stride == (1, 1):
        return Operand(rows, vectors)
    if len(rows) >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2^31 pixels at stride {z.stride}, got {len(rows)}")
    (height, width), (down, right) = z.image.shape[2:], z.stride
    w, h = cdiv(width, right), cdiv(height, down)
    return Operand(rows, vectors, w, h * w, height * width, down * width, right)


def incoming(dout: Tensor, signs: Tensor, pixels: int) -> Tensor:
    """The rows of dout, after a check of its signs."""
    rows = to_rows(dout)
    if len(rows) != pixels:
        raise ValueError(f"dout: expected {pixels} pixels, as z has, got {len(rows)}")
    check_dense("signs", signs, (pixels, cdiv(rows.shape[1], 8)), torch.uint8, rows)
    return rows


@triton.jit
def sampled(z, first, p):
    """The rows in memory of rows first + p of a sampled operand, all int32. p: as `decode` takes it."""
    n, h, w = decode(first, z.pixels // z.width, z.width, p)
    return n * z.image + h * z.line + w * z.step


@triton.jit
def load_operand(z, row, first, p, left, k, K, PRECISION: tl.constexpr, EVEN: tl.constexpr = False):
    """Rows first + p of the tile of `left` rows that begins at a row, and columns k, as a matrix product multiplies them.

    Columns past the last one are 0; rows past the last one are not. EVEN: none lies past the last one. Tiles of a sampled operand
    have at most `tiling.PLACES` rows.
    """
    mask, there = None, None
    if not EVEN:
        mask, there = within(first + p, left, k, K), k < K
        p, k = tl.minimum(p, left - first - 1), k % K
    if z.step is None:
        start, at = z.data + offset(row + first, K), p * K
    else:
        start, at = z.data, offset(sampled(z, row.to(tl.int32), first + p), K)
    v = load_where(start + (at[:, None] + k[None, :]), mask)
    if z.vectors is not None:
        v = activate(widen(v), z.vectors, K, k, there)
    return narrow(v, z.data.dtype.element_ty, PRECISION)


@triton.jit
def load_gradient(
    dout,
    signs,
    row,
    first,
    left,
    column,
    C,
    WORD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr = False,
    PAIRS: tl.constexpr = False,
):
    """Rows from `first` on of the tile of `left` rows that begins at a row, and channels from a column on, of g.

    g is dout where the outer ReLU was open, and 0 elsewhere and outside. EVEN: nothing lies outside. PAIRS: as `in_pairs` says.
    """
    p, c = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_C)
    if PAIRS:
        g = _load_pairs(dout, signs, row + first, p, left - first, column, C, BLOCK_P, BLOCK_C, EVEN)
    else:
        mask, inside = None, None
        if not EVEN:
            mask, inside = within(first + p, left, c, C), first + p < left
            p, c = tl.minimum(p, left - first - 1), c % C
        g = load_where(dout + offset(row + first, C) + (p[:, None] * C + c[None, :]), mask)
        g = tl.where(load_signs(signs, row + first, p, column, inside, C, WORD, BLOCK_P, BLOCK_C, EVEN), g, 0.0)
    return g


def in_pairs(dout: Tensor, word: int) -> bool:
    """Whether a kernel that multiplies g as its left operand is to take it in pairs of channels: two of 2 bytes are one word.

    That spares two of five instructions where `wgmma` reads the operand from registers, and costs some on other GPUs. word: what
    `sign_word` says.
    """
    return word == 32 and dout.element_size() == 2 and dout.data_ptr() % 4 == 0 and limits(dout.device).results >= 128


@triton.jit
def _load_pairs(dout, signs, row, p, left, column, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr):
    """Rows row + p, the first `left` of them, of g in a dtype of 2 bytes, masked in words of two channels."""
    c, b = column // 2 + tl.arange(0, BLOCK_C // 2), column // 32 + tl.arange(0, BLOCK_C // 32)
    mask, there = None, None
    if not EVEN:
        mask, there = within(p, left, c, C // 2), within(p, left, b, C // 32)
        p, c, b = tl.minimum(p, left - 1), c % (C // 2), b % (C // 32)
    at, at_bits = p[:, None] * (C // 2) + c[None, :], p[:, None] * (C // 32) + b[None, :]
    pairs = load_where(dout.to(tl.pointer_type(tl.uint32)) + offset(row, C // 2) + at, mask)
    bits = load_where(signs.to(tl.pointer_type(tl.uint32)) + offset(row, C // 32) + at_bits, there)
    # Of 16 channels the even ones' bits move into the lower half of a word, the odd ones' into the upper half: then a shift
    # brings the bits of a pair to where its halves begin, and a multiplication fills these.
    even, odd = bits & 0x55555555, bits & 0xAAAAAAAA
    below, above = (even & 0xFFFF) | (odd << 15 & 0xFFFF0000), (even >> 16) | (odd >> 1 & 0xFFFF0000)
    apart = tl.reshape(tl.join(below, above), (BLOCK_P, BLOCK_C // 16))
    shifts = (2 * tl.arange(0, 8)).to(tl.uint32)
    kept = (apart[:, :, None] >> shifts[None, None, :] & 0x10001) * 0xFFFF
    pairs &= tl.reshape(kept, (BLOCK_P, BLOCK_C // 2))
    halves = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(halves, (BLOCK_P, BLOCK_C)).to(dout.dtype.element_ty, bitcast=True)


@triton.jit
def load_matrix(matrix, r, R, c, C, PRECISION: tl.constexpr, EVEN: tl.constexpr = False):
    """Rows r and columns c of a [R, C] matrix, as a matrix product multiplies them; 0 outside. EVEN: nothing lies outside."""
    mask = None
    if not EVEN:
        mask = within(r, R, c, C)
        r, c = r % R, c % C
    v = load_where(matrix + r[:, None] * C + c[None, :], mask)
    return narrow(v, matrix.dtype.element_ty, PRECISION)


@triton.jit
def load_wide(pointer, mask):
    """float64 of whatever is there; 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def pivot(z, row, left, k, K, REACH: tl.constexpr, SHARE: tl.constexpr, PRECISION: tl.constexpr):
    """For each column of a tile of `left` rows the value to count from, float32 [1, columns]: 0, or where the column is far
    from 0 the median of three of its values.

    It is far where of the first rows at least SHARE eighths are no farther from the median than REACH times the median.
    Values near 0 lose nothing by counting from there. The difference of two values within a factor of 2 needs no more digits
    than they have (Sterbenz's lemma). Every program that asks for a column of a tile gets the same answer, to the bit.
    """
    p = tl.arange(0, 1)
    a = load_operand(z, row, 0, p, left, k, K, PRECISION).to(tl.float32)
    b = load_operand(z, row, left // 2, p, left, k, K, PRECISION).to(tl.float32)
    c = load_operand(z, row, left - 1, p, left, k, K, PRECISION).to(tl.float32)
    low, high = tl.where(a < b, a, b), tl.where(a < b, b, a)
    median = tl.where(c < low, low, tl.where(c < high, c, high))
    ROWS: tl.constexpr = 64
    p = tl.arange(0, ROWS)
    v = load_operand(z, row, 0, p, left, k, K, PRECISION).to(tl.float32)
    near = (tl.abs(v - median) <= REACH * tl.abs(median)) & (p < left)[:, None]
    far = tl.sum(near.to(tl.int32), axis=0) * 8 >= SHARE * tl.minimum(left, ROWS)
    return tl.where(far[None, :], median, 0.0)


@triton.jit
def within_reach(start, DTYPE: tl.constexpr):
    """What differences from `start` are multiplied by before they are rounded to DTYPE: 1, or 1/2 where float16 may not hold them.

    From a start of less than 8 the difference of every float16 rounds to one. Halves of those from a larger one lose nothing:
    their last digits lie far above the smallest float16.
    """
    if tl.float16 == DTYPE:
        return tl.where(tl.abs(start) < 8, 1.0, 0.5)
    return tl.where(start == start, 1.0, 1.0)


@triton.jit
def operands_multiplied_kernel(matrix, out, N, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """Values as a matrix product multiplies them.

    matrix, out: [N].
    """
    at = offset(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    v = tl.load(matrix + at, mask=at < N, other=0.0)
    tl.store(out + at, narrow(v, matrix.dtype.element_ty, PRECISION), mask=at < N)


def multiplied(matrix: Tensor) -> Tensor:
    """Contract: fused_res/primitives/operands.py."""
    precision = dot_precision(matrix)
    if matrix.dtype != torch.float32 or precision != "tf32":
        return matrix
    matrix = matrix.contiguous()
    out, block = torch.empty_like(matrix), 1024
    launch(
        operands_multiplied_kernel,
        cdiv(matrix.numel(), block),
        matrix,
        out,
        matrix.numel(),
        PRECISION=precision,
        BLOCK=block,
        warps=4,
    )
    return out


def meta_activation(n: int, c: int, h: int, w: int, dtype: torch.dtype, stride: int = 1, activated: bool = True) -> Any:
    """An `Activation` without data whose strided sample is [n, c, h, w]."""
    image = meta_image(n, c, h * stride, w * stride, dtype=dtype)
    return SimpleNamespace(image=image, vectors=meta(5, c) if activated else None, stride=(stride, stride), pixels=n * h * w)


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    if dtype == torch.float32:
        yield variant("multiplied 2048x512", multiplied, meta(2048, 512), loads=True, stores=True)
        yield variant("multiplied 5x3", multiplied, meta(5, 3))
