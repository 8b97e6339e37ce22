"""Triton kernels of `pointwise_direct`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.device import aligned, first_row, offset, store_vectors
from fused_res.kernels.launching import launch
from fused_res.kernels.operands import incoming, load_matrix, load_operand, load_wide, meta_activation, operand
from fused_res.kernels.tiling import PLACES, alignment, cdiv, dot_precision, next_power_of_2, split_rows


@triton.jit
def _channel(
    z,
    weight,
    row,
    first,
    left,
    c,
    C,
    K,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One channel c, [1], of W z in float64, of the values that a matrix product multiplies: rows from `first` on, [BLOCK_P]."""
    y = tl.zeros((BLOCK_P,), tl.float64)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = load_operand(z, row, first, tl.arange(0, BLOCK_P), left, k, K, PRECISION).to(tl.float64)
        y += tl.sum(rows * load_matrix(weight, c, C, k, K, PRECISION).to(tl.float64), axis=1)
    return y


@triton.jit
def pointwise_direct_kernel(
    z,
    weight,
    suspect,
    dout,
    signs,
    mean,
    partials,
    P,
    C,
    K,
    rows,
    ALIGN_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For suspect channels, over tiles of `rows` rows: sums of y - start and its square, and start; with dout sum g * (y - mean).

    z: an `Operand`, its rows [P, K], its vectors [5, K], float32, or None. weight: [C, K]. suspect: [C], bool. dout: [P, C], signs:
    [P, ceil(C / 8)], uint8, mean: [C], all three or none. partials: [T, 3, C], with dout [T, C], float64.
    """
    K = aligned(K, ALIGN_K)
    across = tl.cdiv(C, BLOCK_C)
    t, i = tl.program_id(0) // across, tl.program_id(0) % across
    c = i * BLOCK_C + tl.arange(0, BLOCK_C)
    if tl.sum(tl.load(suspect + c, mask=c < C, other=0).to(tl.int32)) > 0:
        row = first_row(t, rows)
        left = tl.minimum(P - row, rows).to(tl.int32)
        p = tl.arange(0, BLOCK_P)
        for channel in range(i * BLOCK_C, tl.minimum((i + 1) * BLOCK_C, C)):
            if tl.load(suspect + channel) != 0:
                one = channel + tl.arange(0, 1)
                if dout is None:
                    # Counted from the tile's first row, which keeps the digits of a mean far from 0.
                    y = _channel(z, weight, row, 0, left, one, C, K, BLOCK_P, BLOCK_K, PRECISION)
                    start = tl.sum(tl.where(p == 0, y, 0.0))
                else:
                    start = tl.load(mean + channel).to(tl.float64)
                total, squares = tl.zeros((BLOCK_P,), tl.float64), tl.zeros((BLOCK_P,), tl.float64)
                for first in range(0, left, BLOCK_P):
                    inside = first + p < left
                    y = _channel(z, weight, row, first, left, one, C, K, BLOCK_P, BLOCK_K, PRECISION) - start
                    y = tl.where(inside, y, 0.0)
                    if dout is None:
                        total += y
                        squares += y * y
                    else:
                        S = (C + 7) // 8
                        bits = tl.load(signs + offset(row + first, S) + (p * S + channel // 8), mask=inside, other=0)
                        g = load_wide(dout + offset(row + first, C) + (p * C + channel), inside)
                        total += tl.where((bits.to(tl.int32) >> (channel % 8)) & 1 != 0, g * y, 0.0)
                if dout is None:
                    tl.store(partials + offset(t * 3, C) + channel, tl.sum(total))
                    tl.store(partials + offset(t * 3 + 1, C) + channel, tl.sum(squares))
                    tl.store(partials + offset(t * 3 + 2, C) + channel, start)
                else:
                    tl.store(partials + offset(t, C) + channel, tl.sum(total))


@triton.jit
def merge_direct(partials, suspects, T, rows, last, P, C, c, STATS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and biased variance, [BLOCK_C] in float64, of the suspects among channels c; without STATS the sums, and 0.

    partials: of `pointwise_direct_kernel`. Other channels get 0.
    """
    total, squares = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    if tl.sum(suspects.to(tl.int32)) > 0:
        for first in range(0, T, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            mask = (t < T)[:, None] & suspects[None, :]
            at = partials + offset(t * (3 if STATS else 1), C)[:, None] + c[None, :]
            value = load_wide(at, mask)
            if STATS:
                value += load_wide(at + 2 * C, mask) * tl.where(t == T - 1, last, rows).to(tl.float64)[:, None]
            total += tl.sum(value, axis=0)
        if STATS:
            total /= P
            for first in range(0, T, BLOCK_T):
                t = first + tl.arange(0, BLOCK_T)
                mask = (t < T)[:, None] & suspects[None, :]
                at = partials + offset(t * 3, C)[:, None] + c[None, :]
                count = tl.where(t == T - 1, last, rows).to(tl.float64)[:, None]
                near = load_wide(at, mask) / count
                far = load_wide(at + 2 * C, mask) + near - total[None, :]
                square = load_wide(at + C, mask) + count * (far * far - near * near)
                squares += tl.sum(tl.where(mask, square, 0.0), axis=0)
            squares = tl.where(squares < 0, 0.0, squares) / P
    return total, squares


@triton.jit
def pointwise_direct_merge_kernel(
    partials, suspect, out, T, rows, last, P, C, STATS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """For suspect channels, mean and biased variance over T tiles, of `rows` rows each but the last; or the sum of sums.

    partials: [T, 3, C], without STATS [T, C], float64. suspect: [C], bool. out: [2, C], without STATS [C], float64; 0 where not
    suspect.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    suspects = tl.load(suspect + c, mask=c < C, other=0) != 0
    total, squares = merge_direct(partials, suspects, T, rows, last, P, C, c, STATS, BLOCK_T, BLOCK_C)
    if STATS:
        store_vectors(out, (total, squares), C, c)
    else:
        store_vectors(out, (total,), C, c)


class Partials(NamedTuple):
    """What `pointwise_direct_kernel` has left over `tiles` tiles, of `rows` rows each but the last, of `last`."""

    sums: Tensor
    tiles: int
    rows: int
    last: int
    pixels: int


def direct_partials(
    z: Any, weight: Tensor, suspect: Tensor, dout: Tensor | None = None, signs: Tensor | None = None, mean: Tensor | None = None
) -> Partials:
    """The direct pass itself, for a weight [C, K] and rows of dout: for kernels that merge its tiles with `merge_direct`."""
    pixels, stats, (channels, inner) = z.pixels, dout is None, weight.shape
    block_p, block_c = 8, 64
    tiles, rows = split_rows(pixels, cdiv(channels, block_c), block_p, least=256, most=PLACES)
    partials = torch.empty(tiles, 3 if stats else 1, channels, dtype=torch.float64, device=weight.device)
    launch(
        pointwise_direct_kernel,
        tiles * cdiv(channels, block_c),
        *(operand("z", z, weight), weight, suspect, dout, signs, mean, partials, pixels, channels, inner, rows),
        ALIGN_K=alignment(inner),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        BLOCK_K=min(32, next_power_of_2(inner)),
        PRECISION=dot_precision(weight),
        warps=4,
    )
    return Partials(partials, tiles, rows, pixels - rows * (tiles - 1), pixels)


def _merged(partials: Partials, suspect: Tensor, stats: bool) -> Tensor:
    channels = len(suspect)
    out = torch.empty((2, channels) if stats else (channels,), dtype=torch.float64, device=suspect.device)
    launch(
        pointwise_direct_merge_kernel,
        cdiv(channels, 16),
        *(partials.sums, suspect, out, *partials[1:], channels),
        STATS=stats,
        BLOCK_T=32,
        BLOCK_C=16,
        warps=4,
    )
    return out


def pointwise_direct_stats(z: Any, weight: Tensor, suspect: Tensor) -> Tensor:
    """Contract: fused_res/primitives/pointwise_direct.py."""
    return _merged(direct_partials(z, weight.flatten(1).contiguous(), suspect), suspect, True)


def pointwise_direct_sums(dout: Tensor, signs: Tensor, z: Any, weight: Tensor, mean: Tensor, suspect: Tensor) -> Tensor:
    """Contract: fused_res/primitives/pointwise_direct.py."""
    g = incoming(dout, signs, z.pixels)
    return _merged(direct_partials(z, weight.flatten(1).contiguous(), suspect, g, signs, mean), suspect, False)


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    # n, K, C, size, stride
    for n, k, c, size, stride in ((32, 64, 256, 56, 1), (32, 256, 512, 28, 2), (4, 20, 36, 9, 1), (1, 3, 5, 1, 1), (1, 3, 5, 1, 3)):
        z, weight = meta_activation(n, k, size, size, dtype, stride, activated=stride == 1), meta_image(c, k, 1, 1, dtype=dtype)
        dout, signs = meta_image(n, c, size, size, dtype=dtype), meta(n * size * size, -(-c // 8), dtype=torch.uint8)
        suspect, at = meta(c, dtype=torch.bool), f"{n}x{k}x{size}x{size}/{stride} {c}"
        for launched, step in enumerate(("", "merge ")):
            yield variant(f"{step}stats {at}", pointwise_direct_stats, z, weight, suspect, launched=launched)
            yield variant(f"{step}sums {at}", pointwise_direct_sums, dout, signs, z, weight, meta(c), suspect, launched=launched)
