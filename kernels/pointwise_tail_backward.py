"""Triton kernels of `pointwise_tail_backward`."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.arguments import check_image, sign_word
from fused_res.kernels.device import (
    aligned,
    first_row,
    load_row,
    load_rows,
    load_where,
    narrow,
    offset,
    store_gradient,
    store_vectors,
    widen,
    within,
)
from fused_res.kernels.launching import launch
from fused_res.kernels.operands import (
    in_pairs,
    incoming,
    load_gradient,
    load_matrix,
    load_operand,
    load_wide,
    meta_activation,
    operand,
    pivot,
    sampled,
    within_reach,
)
from fused_res.kernels.tiling import (
    PLACES,
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
from fused_res.layout import to_image, to_rows

# Channels whose values are within a factor of 2 count from a pivot; the differences then need no rounding.
_REACH, _SHARE = 0.5, 8


@triton.jit
def _fold(g, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of every eighth row, [8, BLOCK_C]: without exchange between threads, and in few registers."""
    return tl.sum(tl.reshape(widen(g), (BLOCK_P // 8, 8, BLOCK_C)), axis=0)


@triton.jit
def _accumulate(
    dout,
    signs,
    z,
    factors,
    through,
    start,
    ends,
    FAR: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over a tile of g, [8, BLOCK_C], the same of g as it is multiplied, and the products of g with z, [BLOCK_C, BLOCK_K].

    FAR: z counts from `start`, [1, BLOCK_K]; otherwise that is 0, and z is multiplied as it is. factors: [BLOCK_C, BLOCK_K], whose
    products with g go to `through`, or both None. ends: the tile's first row and its rows; the first channel of g and their number;
    the columns of z and their number.
    """
    row, left, column, C, k, K = ends
    p = tl.arange(0, BLOCK_P)
    DTYPE: tl.constexpr = dout.dtype.element_ty
    ROUNDED: tl.constexpr = tl.float32 == DTYPE and PRECISION == "tf32"
    total = tl.zeros((8, BLOCK_C), tl.float32)
    multiplied = tl.zeros((8, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for first in tl.range(0, left, BLOCK_P, num_stages=STAGES):
        exact = load_gradient(dout, signs, row, first, left, column, C, WORD, BLOCK_P, BLOCK_C, EVEN)
        g = narrow(exact, DTYPE, PRECISION)
        total += _fold(exact, BLOCK_P, BLOCK_C)
        if ROUNDED:
            multiplied += _fold(g, BLOCK_P, BLOCK_C)
        value = load_operand(z, row, first, p, left, k, K, PRECISION, EVEN)
        if FAR:
            value = narrow((widen(value) - start) * within_reach(start, DTYPE), DTYPE, PRECISION)
        if not EVEN:
            value = tl.where((first + p < left)[:, None], value, 0.0)
        product = tl.dot(tl.trans(g), value, product, input_precision=PRECISION)
        if through is not None:
            dz = tl.dot(g, factors, input_precision=PRECISION)
            at = through + offset(row + first, K) + p[:, None] * K + k[None, :]
            if EVEN:
                tl.store(at, dz.to(DTYPE))
            else:
                tl.store(at, dz.to(DTYPE), mask=within(first + p, left, k, K))
    if not ROUNDED:
        multiplied = total
    return total, multiplied, product


@triton.jit
def pointwise_tail_backward_reduce_kernel(
    dout,
    signs,
    z,
    scaled,
    through,
    starts,
    totals,
    products,
    P,
    C,
    K,
    rows,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    REACH: tl.constexpr,
    SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Over tiles of `rows` rows: sum g, and the products of g with z, counted from a start for each column; and g A.

    dout: [P, C]. signs: [P, ceil(C / 8)], uint8. z: an `Operand`, its rows [P, K], its vectors [5, K], float32, or None. scaled, A:
    [C, K], through, g A: [P, K], both or neither. starts: [T, K], totals: [T, 2, C], of g and of g as it is multiplied, products:
    [T, C, K], float32. EVEN: all blocks are full.
    """
    C, K = aligned(C, ALIGN), aligned(K, ALIGN_K)
    across, deep = tl.cdiv(C, BLOCK_C), tl.cdiv(K, BLOCK_K)
    t, i, j = tl.program_id(0) // (across * deep), tl.program_id(0) // deep % across, tl.program_id(0) % deep
    row = first_row(t, rows)
    left = tl.minimum(P - row, rows).to(tl.int32)
    k, c = j * BLOCK_K + tl.arange(0, BLOCK_K), i * BLOCK_C + tl.arange(0, BLOCK_C)
    DTYPE: tl.constexpr = dout.dtype.element_ty

    start = pivot(z, row, left, k, K, REACH, SHARE, PRECISION)
    factors = None
    if through is not None:
        factors = load_matrix(scaled, c, C, k, K, PRECISION, EVEN)
    ends = (row, left, i * BLOCK_C, C, k, K)
    if tl.sum((start != 0).to(tl.int32)) == 0:
        total, multiplied, product = _accumulate(
            dout, signs, z, factors, through, start, ends, False, WORD, BLOCK_P, BLOCK_C, BLOCK_K, EVEN, PRECISION, STAGES
        )
    else:
        total, multiplied, product = _accumulate(
            dout, signs, z, factors, through, start, ends, True, WORD, BLOCK_P, BLOCK_C, BLOCK_K, EVEN, PRECISION, STAGES
        )

    tl.store(
        products + offset(t, C) * K + (c[:, None] * K + k[None, :]), product / within_reach(start, DTYPE), mask=within(c, C, k, K)
    )
    if i == 0:
        store_vectors(starts + offset(t, K), (tl.sum(start, axis=0),), K, k)
    if j == 0:
        store_vectors(totals + offset(t * 2, C), (tl.sum(total, axis=0), tl.sum(multiplied, axis=0)), C, c)


@triton.jit
def pointwise_tail_backward_merge_kernel(
    starts,
    totals,
    products,
    mean,
    total,
    product,
    T,
    C,
    K,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """sum g, and M = g^T (z - mean), over T tiles.

    starts: [T, K], totals: [T, 2, C], products: [T, C, K], float32, from `pointwise_tail_backward_reduce_kernel`. mean: [K],
    float64, or None for 0. total: [C], product: [C, K], float64.
    """
    C, K = aligned(C, ALIGN), aligned(K, ALIGN_K)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    c, k = e // K, e % K
    inside = c < C
    m = tl.zeros((BLOCK_E,), tl.float64)
    if mean is not None:
        m = tl.load(mean + k, mask=inside, other=0.0)
    sums, sum_g = tl.zeros((BLOCK_T, BLOCK_E), tl.float64), tl.zeros((BLOCK_T, BLOCK_E), tl.float64)
    for first in tl.range(0, T, BLOCK_T, loop_unroll_factor=UNROLL):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < T)[:, None] & inside[None, :]
        start = load_wide(starts + offset(t, K)[:, None] + k[None, :], mask)
        at = totals + offset(t * 2, C)[:, None] + c[None, :]
        sum_g += load_wide(at, mask)
        value = load_wide(products + (offset(t, C) * K)[:, None] + e[None, :], mask)
        sums += tl.where(mask, value + load_wide(at + C, mask) * (start - m[None, :]), 0.0)
    tl.store(product + e, tl.sum(sums, axis=0), mask=inside)
    tl.store(total + c, tl.sum(sum_g, axis=0), mask=inside & (k == 0))


def default_reduce_tile(channels: int, inner: int, dtype: torch.dtype, precision: str, results: int) -> ProductTile:
    """Channels by inner channels, over the pixels: what registers allow; of 2 bytes with 64 inner channels as measured on an H200
    (benchmarks.tiles). With more of them bfloat16 takes 128 where a thread may have so many results: g is then masked and summed
    less often (docs/loops.csv). In float16 that spills.
    """
    wide, deep = next_power_of_2(channels), next_power_of_2(inner)
    if dtype == torch.bfloat16 and deep > 64 and wide > 64 and results >= 128:
        return ProductTile(128, 128, 32, 4, 3)
    if dtype.itemsize == 2:
        return ProductTile(max(16, min(128, wide)), max(16, min(64, deep)), 32, 4, 3)
    depth, warps = (32, 8) if precision == "tf32" else (16, 4)
    return ProductTile(max(16, min(64, wide)), max(16, min(64, deep)), depth, warps, STAGES)


def pointwise_tail_backward_reduce(
    dout: Tensor, signs: Tensor, z: Any, mean: Tensor | None, scaled: Tensor | None, *, tile: ProductTile | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contract: fused_res/primitives/pointwise_tail_backward.py. tile: by default `default_reduce_tile`."""
    pixels, channels, inner = z.pixels, dout.shape[1], z.image.shape[1]
    g, precision, device = incoming(dout, signs, pixels), dot_precision(dout), dout.device
    tile = tile or default_reduce_tile(channels, inner, g.dtype, precision, limits(device).results)
    block_c, block_k, step, warps, stages = tile
    one = channels <= block_c and inner <= block_k
    through = torch.empty(pixels, inner, dtype=g.dtype, device=device) if one and scaled is not None else None
    blocks = cdiv(channels, block_c) * cdiv(inner, block_k)
    tiles, rows = split_rows(pixels, blocks, step, least=128, most=PLACES)
    starts = torch.empty(tiles, inner, dtype=torch.float32, device=device)
    totals = torch.empty(tiles, 2, channels, dtype=torch.float32, device=device)
    products = torch.empty(tiles, channels, inner, dtype=torch.float32, device=device)
    launch(
        pointwise_tail_backward_reduce_kernel,
        tiles * blocks,
        *(g, signs, operand("z", z, g), None if through is None else scaled, through, starts, totals, products),
        *(pixels, channels, inner, rows),
        ALIGN=alignment(channels),
        ALIGN_K=alignment(inner),
        WORD=sign_word(signs, channels, block_c),
        BLOCK_P=step,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
        EVEN=tiles * rows == pixels and not (channels % block_c or inner % block_k),
        REACH=_REACH,
        SHARE=_SHARE,
        PRECISION=precision,
        STAGES=stages,
        warps=warps,
    )
    total = torch.empty(channels, dtype=torch.float64, device=device)
    product = torch.empty(channels, inner, dtype=torch.float64, device=device)
    together = min(32, next_power_of_2(tiles))
    launch(
        pointwise_tail_backward_merge_kernel,
        cdiv(channels * inner, 1024 // together),
        *(starts, totals, products, mean, total, product, tiles, channels, inner),
        ALIGN=alignment(channels),
        ALIGN_K=alignment(inner),
        BLOCK_T=together,
        BLOCK_E=1024 // together,
        UNROLL=UNROLL,
        warps=4,
    )
    return total, product, through


@triton.jit
def pointwise_tail_backward_apply_kernel(
    dout,
    signs,
    z,
    scaled,
    mean,
    quadratic,
    constant,
    through,
    dz,
    partials,
    P,
    C,
    K,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    WORD: tl.constexpr,
    PAIRS: tl.constexpr,
    JOINS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz = g A - (z - mean) B - constant; with `partials` masked by the ReLU below, and summed for its BN; with JOINS added to dz.

    dout: [P, C]. signs: [P, ceil(C / 8)], uint8. z: an `Operand`, its rows [P, K], its vectors [5, K], float32, or None. scaled, A:
    [C, K]. mean: [K], float64, quadratic, B: [K, K], constant: [K], float32, all three or none. through: [P, K], g A where that is
    known, or None. dz: [P, K], with JOINS of z's sampled rows; it may be `through`. partials: [T, 2, K], float32, or None. EVEN:
    all blocks are full.
    """
    C, K = aligned(C, ALIGN), aligned(K, ALIGN_K)
    across = tl.cdiv(K, BLOCK_K)
    t = tl.program_id(0) // across
    row = first_row(t, BLOCK_P)
    left = tl.minimum(P - row, BLOCK_P).to(tl.int32)
    p, k = tl.arange(0, BLOCK_P), tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    at, mask = offset(row, K) + p[:, None] * K + k[None, :], None
    if not EVEN:
        mask = within(p, left, k, K)
    DTYPE: tl.constexpr = dout.dtype.element_ty

    result = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    if through is None:
        for column in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            g = load_gradient(dout, signs, row, 0, left, column, C, WORD, BLOCK_P, BLOCK_C, EVEN, PAIRS)
            g = narrow(g, DTYPE, PRECISION)
            factors = load_matrix(scaled, column + tl.arange(0, BLOCK_C), C, k, K, PRECISION, EVEN)
            result = tl.dot(g, factors, result, input_precision=PRECISION)
    else:
        result = load_rows(through, at, mask)
    if quadratic is not None:
        # float16 holds the half of any difference of its values.
        REACH: tl.constexpr = 0.5 if tl.float16 == DTYPE else 1.0
        result *= REACH
        for column in tl.range(0, K, BLOCK_C, num_stages=STAGES):
            d = column + tl.arange(0, BLOCK_C)
            m = load_where(mean + (d if EVEN else d % K), None if EVEN else d < K).to(tl.float32)[None, :]
            value = (m - widen(load_operand(z, row, 0, p, left, d, K, PRECISION, EVEN))) * REACH
            value = narrow(value, DTYPE, PRECISION)
            result = tl.dot(value, load_matrix(quadratic, d, K, k, K, PRECISION, EVEN), result, input_precision=PRECISION)
        result = result / REACH - load_row(constant, 0, K, k)[None, :]
    if JOINS:
        if z.step is not None:
            at = offset(sampled(z, row.to(tl.int32), p), K)[:, None] + k[None, :]
        result += load_rows(dz, at, mask)
    store_gradient(dz, result, at, mask, z.data, z.vectors, partials, t, K, k)


def default_apply_tile(inner: int, narrow_dtype: bool, results: int) -> ProductTile:
    """Pixels by inner channels, over the channels and once more the inner channels; of 2 bytes and 64 inner channels as measured on
    an H200 (benchmarks.tiles), if a thread may have so many results, and otherwise what issues the least (docs/loops.csv).
    """
    wide = max(16, next_power_of_2(inner))
    if narrow_dtype and (results < 128 or wide != 64):
        return ProductTile(64, min(128, wide), 64, 4, 3)
    return ProductTile(128, min(64, wide), 64, 4, 3) if narrow_dtype else ProductTile(64, min(64, wide), 32, 8, 3)


def pointwise_tail_backward_apply(
    dout: Tensor,
    signs: Tensor,
    z: Any,
    scaled: Tensor,
    through: Tensor | None,
    gradients: Any,
    inner: bool,
    into: Tensor | None = None,
    *,
    tile: ProductTile | None = None,
) -> tuple[Tensor, Tensor | None, bool]:
    """Contract: fused_res/primitives/pointwise_tail_backward.py. tile: by default `default_apply_tile`."""
    g, pixels, precision = incoming(dout, signs, z.pixels), z.pixels, dot_precision(dout)
    n, channels, h, w = dout.shape
    size, narrow_dtype = scaled.shape[1], g.element_size() == 2
    if into is not None:
        dz = to_rows(check_image("into", into, z.image.shape, g))
    else:
        dz = torch.empty(pixels, size, dtype=g.dtype, device=g.device) if through is None else through
    block_p, block_k, depth, warps, stages = tile or default_apply_tile(size, narrow_dtype, limits(g.device).results)
    tiles = cdiv(pixels, block_p)
    partials = torch.empty(tiles, 2, size, dtype=torch.float32, device=g.device) if inner else None
    word = sign_word(signs, channels, depth)
    launch(
        pointwise_tail_backward_apply_kernel,
        tiles * cdiv(size, block_k),
        *(g, signs, operand("z", z, g), scaled, gradients.mean, gradients.quadratic, gradients.constant, through, dz, partials),
        *(pixels, channels, size),
        ALIGN=alignment(channels),
        ALIGN_K=alignment(size),
        WORD=word,
        PAIRS=in_pairs(g, word),
        JOINS=into is not None,
        BLOCK_P=block_p,
        BLOCK_C=depth,
        BLOCK_K=block_k,
        EVEN=not (pixels % block_p or channels % depth or size % depth or size % block_k),
        PRECISION=precision,
        STAGES=stages,
        warps=warps,
    )
    return to_image(dz, n, h, w) if into is None else into, partials, inner


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    # n, K, C, size, stride
    for n, k, c, size, stride in (
        (32, 64, 256, 56, 1),
        (32, 128, 512, 28, 1),
        (8, 512, 2048, 7, 1),
        (32, 256, 512, 28, 2),
        (4, 20, 36, 9, 3),
        (1, 3, 5, 1, 1),
        (1, 3, 5, 1, 3),
    ):
        z, wide, inner = meta_activation(n, k, size, size, dtype, stride, activated=stride == 1), k % 16 == 0, stride == 1
        dout, signs = meta_image(n, c, size, size, dtype=dtype), meta(n * size * size, -(-c // 8), dtype=torch.uint8)
        scaled, mean = meta(c, k, dtype=dtype), meta(k, dtype=torch.float64)
        live = SimpleNamespace(mean=mean, quadratic=meta(k, k, dtype=dtype), constant=meta(k))
        frozen = SimpleNamespace(mean=None, quadratic=None, constant=None)
        at = f"{n}x{k}x{size}x{size}/{stride} {c}"

        def step(name, launcher, *arguments, at=at, wide=wide, sample=False):
            return variant(f"{name} {at}", launcher, *arguments, loads=wide, matrix=True, sample=sample)

        yield step("live", pointwise_tail_backward_reduce, dout, signs, z, mean, scaled, sample=k in (64, 512))
        yield step("parameters only", pointwise_tail_backward_reduce, dout, signs, z, mean, None)
        yield variant(f"merge {at}", pointwise_tail_backward_reduce, dout, signs, z, mean, None, launched=1)
        through = meta(n * size * size, k, dtype=dtype)
        yield step("live", pointwise_tail_backward_apply, dout, signs, z, scaled, None, live, inner, sample=k == 128)
        yield step("live, through", pointwise_tail_backward_apply, dout, signs, z, scaled, through, live, inner)
        yield step("frozen", pointwise_tail_backward_apply, dout, signs, z, scaled, None, frozen, inner)
        if not inner:
            yield step("joining", pointwise_tail_backward_apply, dout, signs, z, scaled, None, live, inner, z.image)
