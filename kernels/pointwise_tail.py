"""Triton kernel of `pointwise_tail`."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.arguments import sign_word
from fused_res.kernels.device import (
    SCALE,
    SHIFT,
    add_shortcut,
    affine,
    aligned,
    first_row,
    is_open,
    load_row_where,
    offset,
    pack,
    relu,
    within,
)
from fused_res.kernels.launching import launch
from fused_res.kernels.operands import load_matrix, load_operand, meta_activation, operand
from fused_res.kernels.tiling import ProductTile, alignment, cdiv, dot_precision, limits, next_power_of_2
from fused_res.layout import to_image, to_rows


@triton.jit
def _product(
    z,
    weight,
    row,
    left,
    c,
    C,
    K,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """W z of a block of rows from `row` on and of the channels c, in float32."""
    y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        rows = load_operand(z, row, 0, tl.arange(0, BLOCK_P), left, k, K, PRECISION, EVEN)
        y = tl.dot(rows, tl.trans(load_matrix(weight, c, C, k, K, PRECISION, EVEN)), y, input_precision=PRECISION)
    return y


@triton.jit
def pointwise_tail_kernel(
    z,
    weight,
    vectors,
    skip,
    y2,
    vectors2,
    z2,
    weight2,
    out,
    signs,
    P,
    C,
    K,
    K2,
    ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_K2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORD: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = relu(scale * (W z) + shift + shortcut), and a sign bit for every element of it that is open.

    z, z2: `Operand`s, their rows [P, K] and [P, K2], their vectors [5, K] and [5, K2], float32, or None. weight: [C, K], weight2:
    [C, K2]. vectors, vectors2: [5, C], float32. The shortcut is skip [P, C]; or scale2 * y2 + shift2 of y2 [P, C]; or the same of
    weight2 z2; what is not in use is None. out: [P, C]. signs: [P, ceil(C / 8)], uint8, or None. EVEN: all blocks are full.
    """
    C, K, K2 = aligned(C, ALIGN), aligned(K, ALIGN_K), aligned(K2, ALIGN_K2)
    across = tl.cdiv(C, BLOCK_C)
    row, column = first_row(tl.program_id(0) // across, BLOCK_P), tl.program_id(0) % across * BLOCK_C
    left = tl.minimum(P - row, BLOCK_P).to(tl.int32)
    p, c = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_C)

    y = _product(z, weight, row, left, c, C, K, BLOCK_P, BLOCK_C, BLOCK_K, EVEN, PRECISION, STAGES)
    there = None if EVEN else c < C
    shift = load_row_where(vectors, SHIFT, C, c, there)
    if weight2 is not None:
        shift += load_row_where(vectors2, SHIFT, C, c, there)  # once for a column, in place of every element
    v = affine(y, load_row_where(vectors, SCALE, C, c, there)[None, :], shift[None, :])
    if weight2 is not None:
        y = _product(z2, weight2, row, left, c, C, K2, BLOCK_P, BLOCK_C, BLOCK_K, EVEN, PRECISION, STAGES)
        v = affine(y, load_row_where(vectors2, SCALE, C, c, there)[None, :], v)
    start, at, mask = offset(row, C), p[:, None] * C + c[None, :], None
    if not EVEN:
        mask = within(p, left, c, C)
    rounded = relu(add_shortcut(v, skip, y2, vectors2, start, at, mask, C, c)).to(out.dtype.element_ty)
    tl.store(out + start + at, rounded, mask=mask)
    if signs is not None:
        words = signs
        if WORD == 32:
            words = signs.to(tl.pointer_type(tl.uint32))
        S = (C + WORD - 1) // WORD
        b = column // WORD + tl.arange(0, BLOCK_C // WORD)
        packed = pack(is_open(rounded.to(tl.float32)), BLOCK_P, BLOCK_C, WORD)
        if not EVEN:
            mask = within(p, left, b, S)
        tl.store(words + offset(row, S) + p[:, None] * S + b[None, :], packed, mask=mask)


def default_tile(channels: int, narrow_dtype: bool, precision: str, two_products: bool, results: int) -> ProductTile:
    """Pixels by channels, over the inner channels; of 2 bytes as measured on an H200 (benchmarks.tiles), if a thread may have so
    many results, and otherwise what issues the least (docs/loops.csv).
    """
    wide = max(16, next_power_of_2(channels))
    if narrow_dtype and results < 128:
        return ProductTile(64, min(128, wide), 32, 4, 3)
    if narrow_dtype:
        return ProductTile(64 if two_products else 128, min(128, wide), 64, 4, 3)
    return ProductTile(64, min(128 if precision == "tf32" else 64, wide), 32, 8, 3)


def pointwise_tail(main: Any, shortcut: Any, keep_signs: bool, *, tile: ProductTile | None = None) -> tuple[Tensor, Tensor | None]:
    """Contract: fused_res/primitives/pointwise_tail.py. tile: by default `default_tile`."""
    image, weight = main.z.image, main.weight.flatten(1).contiguous()
    n, _, h, w = image.shape
    pixels, channels, inner = n * h * w, *weight.shape
    out = torch.empty(pixels, channels, dtype=image.dtype, device=image.device)
    signs = torch.empty(pixels, -(-channels // 8), dtype=torch.uint8, device=image.device) if keep_signs else None
    skip, y2 = (None if image is None else to_rows(image) for image in (shortcut.skip, shortcut.y2))
    vectors2, z2, weight2, inner2, side = shortcut.vectors2, None, None, 1, shortcut.projection
    if side is not None:
        z2, weight2, vectors2 = operand("projection.z", side.z, image), side.weight.flatten(1).contiguous(), side.vectors
        inner2 = weight2.shape[1]
    precision, narrow_dtype = dot_precision(image), image.element_size() == 2
    tile = tile or default_tile(channels, narrow_dtype, precision, side is not None, limits(image.device).results)
    launch(
        pointwise_tail_kernel,
        cdiv(pixels, tile.rows) * cdiv(channels, tile.columns),
        *(
            operand("main.z", main.z, weight),
            weight,
            main.vectors,
            skip,
            y2,
            vectors2,
            z2,
            weight2,
            out,
            signs,
            pixels,
            channels,
            inner,
            inner2,
        ),
        ALIGN=alignment(channels),
        ALIGN_K=alignment(inner),
        ALIGN_K2=alignment(inner2),
        BLOCK_P=tile.rows,
        BLOCK_C=tile.columns,
        BLOCK_K=tile.depth,
        WORD=8 if side is None else sign_word(signs, channels, tile.columns),
        EVEN=pixels % tile.rows == channels % tile.columns == inner % tile.depth == 0
        and (side is None or inner2 % tile.depth == 0),
        PRECISION=precision,
        STAGES=tile.stages,
        warps=tile.warps,
    )
    return to_image(out, n, h, w), signs


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    # n, K, C, size, a projection's channels and stride
    for n, k, c, size, k2, stride in (
        (32, 64, 256, 56, 64, 1),
        (32, 128, 512, 28, 256, 2),
        (8, 512, 2048, 7, 1024, 2),
        (4, 20, 36, 9, 12, 3),
        (1, 3, 5, 1, 1, 3),
    ):
        z, out, wide = meta_activation(n, k, size, size, dtype), meta_image(n, c, size, size, dtype=dtype), k % 16 == 0
        main = SimpleNamespace(z=z, weight=meta_image(c, k, 1, 1, dtype=dtype), vectors=meta(5, c))
        z2 = meta_activation(n, k2, size, size, dtype, stride, activated=False)
        projection = SimpleNamespace(z=z2, weight=meta_image(c, k2, 1, 1, dtype=dtype), vectors=meta(5, c))
        at = f"{n}x{k}x{size}x{size} {c}"

        def tail(name, keep_signs, main=main, at=at, wide=wide, sample=False, **shortcut):
            shortcut = SimpleNamespace(**{"skip": None, "y2": None, "vectors2": None, "projection": None} | shortcut)
            name = f"{name}{', signs' if keep_signs else ''} {at}"
            return variant(name, pointwise_tail, main, shortcut, keep_signs, loads=wide, stores=wide, matrix=True, sample=sample)

        yield tail("skip", False, skip=out)
        yield tail("skip", True, skip=out, sample=k == 64)
        yield tail("second", True, y2=out, vectors2=meta(5, c))
        yield tail("projection", True, projection=projection, sample=k == 128)
