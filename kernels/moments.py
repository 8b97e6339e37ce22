"""Triton kernels of `moments`."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, variant
from fused_res.kernels.device import aligned, first_row, narrow, offset, store_vectors, widen, within
from fused_res.kernels.launching import launch
from fused_res.kernels.operands import load_operand, load_wide, meta_activation, operand, pivot, within_reach
from fused_res.kernels.tiling import (
    STAGES,
    UNROLL,
    ProductTile,
    alignment,
    cdiv,
    dot_precision,
    limits,
    next_power_of_2,
    split_rows,
)

# More rows than these would leave too much to float32 sums.
_MOST_ROWS = 1024
# Channels whose mean is beyond about twice their deviation count from a pivot; the differences are multiplied in two halves.
_REACH, _SHARE = 0.875, 7


@triton.jit
def _halves(z, row, first, p, left, k, K, start, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """c = z - start, 0 outside: in float32, and, `within_reach`, as the sum of two values that are multiplied as they are."""
    v = load_operand(z, row, first, p, left, k, K, PRECISION, EVEN)
    # Values that come as they lie in memory take fewer instructions by the compiler's own conversion (docs/loops.csv).
    centred = (v.to(tl.float32) if z.vectors is None else widen(v)) - start
    if not EVEN:
        centred = tl.where(within(first + p, left, k, K), centred, 0.0)
    reached = centred * within_reach(start, v.dtype)
    high = narrow(reached, v.dtype, PRECISION)
    return centred, high, narrow(reached - widen(high), v.dtype, PRECISION)


@triton.jit
def _accumulate(
    z,
    row,
    left,
    k_i,
    k,
    K,
    start_i,
    start,
    SPLIT: tl.constexpr,
    ONE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over a tile of what columns k are from `start`, [BLOCK_P, BLOCK_K], and of the products of columns k_i and k."""
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    product = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for first in tl.range(0, left, BLOCK_P, num_stages=STAGES):
        centred, high, low = _halves(z, row, first, p, left, k, K, start, EVEN, PRECISION)
        total += centred
        high_i, low_i = high, low
        if not ONE:
            _, high_i, low_i = _halves(z, row, first, p, left, k_i, K, start_i, EVEN, PRECISION)
        # Tensor cores truncate what they add to an accumulator: each step has one of its own, and joins a sum that is rounded.
        # The limit on imprecise sums means nothing to these dtypes, but keeps the compiler from making the sum the accumulator.
        part = tl.dot(tl.trans(high_i), high, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_P)
        if SPLIT:
            part = tl.dot(tl.trans(high_i), low, part, input_precision=PRECISION)
            part = tl.dot(tl.trans(low_i), high, part, input_precision=PRECISION)
            if z.data.dtype.element_ty == tl.bfloat16:  # the others' lower halves are below 2^-11 each
                part = tl.dot(tl.trans(low_i), low, part, input_precision=PRECISION)
        product += part
    if SPLIT:
        DTYPE: tl.constexpr = z.data.dtype.element_ty
        product = product / tl.trans(within_reach(start_i, DTYPE)) / within_reach(start, DTYPE)
    return total, product


@triton.jit
def moments_kernel(
    z,
    vectors,
    products,
    P,
    K,
    rows,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    REACH: tl.constexpr,
    SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Over tiles of `rows` rows: what the columns of z count from, their sums from there, and the products of all pairs of them.

    z: an `Operand`, its rows [P, K], its vectors [5, K], float32, or None. vectors: [T, 2, K], products: [T, K, K], float32, of
    which blocks below the diagonal are not written. EVEN: all blocks are full.
    """
    K = aligned(K, ALIGN)
    across = tl.cdiv(K, BLOCK_K)
    t, i, j = tl.program_id(0) // (across * across), tl.program_id(0) // across % across, tl.program_id(0) % across
    if i <= j:
        row = first_row(t, rows)
        left = tl.minimum(P - row, rows).to(tl.int32)
        k_i, k = i * BLOCK_K + tl.arange(0, BLOCK_K), j * BLOCK_K + tl.arange(0, BLOCK_K)
        start = pivot(z, row, left, k, K, REACH, SHARE, PRECISION)
        start_i = start
        if not ONE:
            start_i = pivot(z, row, left, k_i, K, REACH, SHARE, PRECISION)
        far = 0
        if SPLIT:
            far = tl.sum((start != 0).to(tl.int32)) + tl.sum((start_i != 0).to(tl.int32))
        columns = (k_i, k, K, start_i, start)
        if far == 0:
            total, product = _accumulate(z, row, left, *columns, False, ONE, EVEN, BLOCK_P, BLOCK_K, PRECISION, STAGES)
        else:
            total, product = _accumulate(z, row, left, *columns, True, ONE, EVEN, BLOCK_P, BLOCK_K, PRECISION, STAGES)
        at = k_i[:, None] * K + k[None, :]
        tl.store(products + offset(t, K) * K + at, product, mask=within(k_i, K, k, K))
        if i == j:
            store_vectors(vectors + offset(t * 2, K), (tl.sum(start, axis=0), tl.sum(total, axis=0)), K, k)


@triton.jit
def _counts(first, T, rows, last, BLOCK_T: tl.constexpr):
    """Numbers of BLOCK_T tiles from one on, which of them are there, and their rows, [BLOCK_T, 1] in float64."""
    t = first + tl.arange(0, BLOCK_T)
    return t, (t < T)[:, None], tl.where(t == T - 1, last, rows).to(tl.float64)[:, None]


@triton.jit
def moments_merge_kernel(
    vectors,
    products,
    mean,
    covariance,
    T,
    rows,
    last,
    P,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Mean and covariance over T tiles, of `rows` rows each but the last.

    vectors: [T, 2, K], products: [T, K, K], float32, from `moments_kernel`. mean: [K], covariance: [K, K], float64.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    j, k = e // K, e % K
    # What is above the diagonal stands below it, too: symmetric whatever is rounded on the way.
    inside = j <= k
    # Means and products count from the first tile's pivots, which keeps the digits of a mean far from 0.
    from_j = tl.load(vectors + j, mask=inside, other=0.0).to(tl.float64)[None, :]
    from_k = tl.load(vectors + k, mask=inside, other=0.0).to(tl.float64)[None, :]
    total_j, total_k = tl.zeros((BLOCK_T, BLOCK_E), tl.float64), tl.zeros((BLOCK_T, BLOCK_E), tl.float64)
    square = tl.zeros((BLOCK_T, BLOCK_E), tl.float64)
    for first in tl.range(0, T, BLOCK_T, loop_unroll_factor=UNROLL):
        t, there, count = _counts(first, T, rows, last, BLOCK_T)
        mask, at = there & inside[None, :], vectors + offset(t * 2, K)[:, None]
        sum_j, sum_k = load_wide(at + K + j[None, :], mask), load_wide(at + K + k[None, :], mask)
        start_j = tl.where(mask, load_wide(at + j[None, :], mask) - from_j, 0.0)
        start_k = tl.where(mask, load_wide(at + k[None, :], mask) - from_k, 0.0)
        # sum (z_j - from_j) (z_k - from_k), where the tile has the product and the sums of what z is from its own pivots.
        value = load_wide(products + (offset(t, K) * K)[:, None] + e[None, :], mask)
        square += value + start_j * sum_k + start_k * (sum_j + count * start_j)
        total_j += sum_j + count * start_j
        total_k += sum_k + count * start_k
    far_j, far_k = tl.sum(total_j, axis=0) / P, tl.sum(total_k, axis=0) / P
    found = tl.sum(square, axis=0) / P - far_j * far_k
    tl.store(covariance + e, found, mask=inside)
    tl.store(covariance + k * K + j, found, mask=inside)
    tl.store(mean + e, tl.sum(from_k, axis=0) + far_k, mask=e < K)


def default_tile(channels: int, dtype: torch.dtype, precision: str, results: int) -> ProductTile:
    """Channels by channels, over the pixels: what registers allow, where a thread may have so many results; there are two sums."""
    wide, narrow_dtype = max(16, next_power_of_2(channels)), dtype.itemsize == 2
    if precision == "ieee" and not narrow_dtype:
        return ProductTile(min(64, wide), min(64, wide), 64, 8, STAGES)
    if results < 128 and wide >= 64:
        return ProductTile(64, 64, 16, 4 if narrow_dtype else 8, STAGES)
    if wide <= 64:
        return ProductTile(wide, wide, 32 if narrow_dtype else 16, 4, STAGES)
    # Halves within float16's reach take more registers: with steps of 32 pixels they spill.
    return ProductTile(128, 128, 32 if dtype == torch.bfloat16 or (wide == 128 and not narrow_dtype) else 16, 8, STAGES)


def moments(z: Any, *, tile: ProductTile | None = None) -> tuple[Tensor, Tensor]:
    """Contract: fused_res/primitives/moments.py. tile: by default `default_tile`; as many rows as columns."""
    read, pixels, precision = operand("z", z, z.image), z.pixels, dot_precision(z.image)
    channels, dtype = z.image.shape[1], z.image.dtype
    block, _, step, warps, stages = tile or default_tile(channels, dtype, precision, limits(z.image.device).results)
    across = cdiv(channels, block)
    tiles, rows = split_rows(pixels, across * (across + 1) // 2, step, least=256, most=_MOST_ROWS)
    device = z.image.device
    vectors = torch.empty(tiles, 2, channels, dtype=torch.float32, device=device)
    products = torch.empty(tiles, channels, channels, dtype=torch.float32, device=device)
    launch(
        moments_kernel,
        tiles * across**2,
        *(read, vectors, products, pixels, channels, rows),
        ALIGN=alignment(channels),
        BLOCK_P=step,
        BLOCK_K=block,
        ONE=across == 1,
        EVEN=tiles * rows == pixels and channels % block == 0,
        SPLIT=dtype.itemsize == 2 or precision == "tf32",
        REACH=_REACH,
        SHARE=_SHARE,
        PRECISION=precision,
        STAGES=stages,
        warps=warps,
    )
    mean = torch.empty(channels, dtype=torch.float64, device=device)
    covariance = torch.empty(channels, channels, dtype=torch.float64, device=device)
    together = min(32, next_power_of_2(tiles))
    elements = (512 if together == 32 else 256) // together  # with few tiles a thread has more elements, and spills sooner
    counts = tiles, rows, pixels - rows * (tiles - 1), pixels, channels
    launch(
        moments_merge_kernel,
        cdiv(channels * channels, elements),
        *(vectors, products, mean, covariance, *counts),
        BLOCK_T=together,
        BLOCK_E=elements,
        UNROLL=UNROLL,
        warps=4,
    )
    return mean, covariance


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    # n, K, output's size, stride
    for n, k, size, stride in (
        (32, 64, 56, 1),
        (32, 128, 28, 1),
        (8, 512, 7, 1),
        (32, 256, 28, 2),
        (8, 1024, 7, 2),
        (4, 20, 9, 1),
        (1, 3, 1, 1),
        (1, 3, 1, 3),
    ):
        z, wide = meta_activation(n, k, size, size, dtype, stride, activated=stride == 1), k % 16 == 0
        at = f"{n}x{k}x{size}x{size}/{stride}"
        yield variant(at, moments, z, loads=wide, stores=wide, matrix=True, sample=k in (64, 1024))
        if size > 1:
            yield variant(f"merge {at}", moments, z, launched=1)
