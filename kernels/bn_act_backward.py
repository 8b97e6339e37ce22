"""Triton kernels of `bn_act_backward`."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, variant
from fused_res.kernels.device import (
    INVSTD,
    MEAN,
    SCALE,
    SHIFT,
    affine,
    aligned,
    is_open,
    load_row,
    load_rows,
    locate,
    locate_signs,
    offset,
    places,
    store_vectors,
    through_bn,
    unpack,
    within,
)
from fused_res.kernels.launching import launch, launch_tiles
from fused_res.kernels.tiling import STAGES, UNROLL, cdiv, partials_tile, row_tiles, tile


@triton.jit
def bn_act_backward_reduce_kernel(
    dout,
    y,
    vectors,
    signs,
    y2,
    vectors2,
    partials,
    P,
    C,
    rows,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Over tiles of `rows` rows: sum g, sum g * (y - mean), and with y2 sum g * (y2 - mean2).

    dout, y, y2: [P, C]. vectors, vectors2: [5, C], float32. signs: [P, ceil(C / 8)], uint8; None: the ReLU's signs are those of
    scale * y + shift. y2 and vectors2 may be None. partials: [T, 2 or 3, C], float32.
    """
    C = aligned(C, ALIGN)
    t, row, c, _ = locate(C, rows, BLOCK_P, BLOCK_C)
    left = tl.minimum(P - row, rows).to(tl.int32)
    p = tl.arange(0, BLOCK_P)

    mean = load_row(vectors, MEAN, C, c)[None, :]
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if signs is None:
        scale, shift = load_row(vectors, SCALE, C, c)[None, :], load_row(vectors, SHIFT, C, c)[None, :]
    else:
        # Bytes are too narrow for asynchronous copies: they are fetched one block ahead.
        S, b, _ = locate_signs(C, BLOCK_P, BLOCK_C)
        signs += offset(row, S)
        ahead = tl.load(signs + places(p, left, b, S), mask=within(p, left, b, S), other=0)
    if y2 is not None:
        mean2 = load_row(vectors2, MEAN, C, c)[None, :]
        sum_y2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    start, step = offset(row, C), BLOCK_P * C
    for first in tl.range(0, left, BLOCK_P, num_stages=STAGES):
        at, mask = places(p, left - first, c, C), within(p, left - first, c, C)
        g = load_rows(dout + start, at, mask)
        value = load_rows(y + start, at, mask)
        if signs is None:
            opened = is_open(affine(value, scale, shift))
        else:
            opened = unpack(ahead, BLOCK_P, BLOCK_C)
            following = first + BLOCK_P
            at_signs, there = places(p, left - following, b, S), within(p, left - following, b, S)
            ahead = tl.load(signs + offset(following, S) + at_signs, mask=there, other=0)
        g = tl.where(opened, g, 0.0)
        sum_g += g
        sum_y += g * (value - mean)
        if y2 is not None:
            sum_y2 += g * (load_rows(y2 + start, at, mask) - mean2)
        start += step

    SUMS: tl.constexpr = 2 if y2 is None else 3
    start = partials + offset(t * SUMS, C)
    tl.store(start + c, tl.sum(sum_g, axis=0), mask=c < C)
    tl.store(start + C + c, tl.sum(sum_y, axis=0), mask=c < C)
    if y2 is not None:
        tl.store(start + 2 * C + c, tl.sum(sum_y2, axis=0), mask=c < C)


def bn_act_backward_reduce(
    dout: Tensor, y: Tensor, vectors: Tensor, signs: Tensor | None, y2: Tensor | None, vectors2: Tensor | None
) -> Tensor:
    """Contract: fused_res/primitives/bn_act_backward.py."""
    pixels, channels = y.shape
    block = tile(pixels, channels, y.element_size(), vectors=2 if y2 is None else 1)
    tiles, rows = row_tiles(pixels, channels, block)
    partials = torch.empty(tiles, 2 if y2 is None else 3, channels, dtype=torch.float32, device=y.device)
    arguments = (dout, y, vectors, signs, y2, vectors2, partials, pixels, channels, rows)
    launch_tiles(bn_act_backward_reduce_kernel, tiles, block, channels, *arguments, STAGES=STAGES)
    return partials


@triton.jit
def bn_act_backward_finalize_kernel(
    partials,
    vectors,
    gamma,
    beta,
    residual_scale,
    coefficients,
    T,
    P,
    C,
    SUMS: tl.constexpr,
    ROW: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The sums of T tiles become one BN's coefficients, and its parameters' gradients.

    partials: [T, SUMS, C], float32, of which row 0 has sum g, and row ROW sum g * (y - mean). vectors: [5, C], float32. gamma,
    beta: [C], residual_scale: [1], each or None. coefficients: [7, C], float32.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    d = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in tl.range(0, T, BLOCK_T, loop_unroll_factor=UNROLL):
        t = first + tl.arange(0, BLOCK_T)
        at = partials + offset(t * SUMS, C)[:, None] + c[None, :]  # [BLOCK_T, BLOCK_C]
        mask = (t < T)[:, None] & inside[None, :]
        total += tl.load(at, mask=mask, other=0.0)
        d += tl.load(at + ROW * C, mask=mask, other=0.0)

    invstd = load_row(vectors, INVSTD, C, c)
    total = tl.sum(total, axis=0)
    d = invstd * tl.sum(d, axis=0)
    p = load_row(vectors, SCALE, C, c)
    q = tl.zeros((BLOCK_C,), tl.float32)
    r, dbias = q, q
    if TRAINING:
        q = -p * tl.div_rn(invstd * d, P * 1.0)
        r = -p * tl.div_rn(total, P * 1.0) - q * load_row(vectors, MEAN, C, c)
    else:
        dbias = p * total
    dscale = d
    if gamma is not None:
        dscale = d * tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
    if beta is not None:
        dscale += total * tl.load(beta + c, mask=inside, other=0.0).to(tl.float32)
    dgamma, dbeta = d, total
    if residual_scale is not None:
        a = tl.load(residual_scale).to(tl.float32)
        dgamma, dbeta = a * d, a * total
    store_vectors(coefficients, (p, q, r, dgamma, dbeta, dscale, dbias), C, c)


def bn_act_backward_finalize(
    partials: Tensor,
    row: int,
    pixels: int,
    vectors: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None,
    training: bool,
) -> Tensor:
    """Contract: fused_res/primitives/bn_act_backward.py."""
    tiles, sums, channels = partials.shape
    coefficients = torch.empty(7, channels, dtype=torch.float32, device=partials.device)
    block = partials_tile(tiles)
    launch(
        bn_act_backward_finalize_kernel,
        cdiv(channels, block.channels),
        *(partials, vectors, gamma, beta, residual_scale, coefficients, tiles, pixels, channels),
        SUMS=sums,
        ROW=row,
        TRAINING=training,
        BLOCK_T=block.rows,
        BLOCK_C=block.channels,
        UNROLL=UNROLL,
        warps=block.warps,
    )
    return coefficients


@triton.jit
def bn_act_backward_apply_kernel(
    dout,
    y,
    vectors,
    coefficients,
    signs,
    y2,
    coefficients2,
    dy,
    dy2,
    masked,
    P,
    C,
    TRAINING: tl.constexpr,
    TRAINING2: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy = p * g + q * y + r, with y2 the same for dy2; and g itself where it is wanted.

    dout, y, y2, dy, dy2, masked: [P, C]; y2 with dy2, and masked, may be None. vectors: [5, C], coefficients, coefficients2:
    [7, C], float32. signs: [P, ceil(C / 8)], uint8; None: the ReLU's signs are those of scale * y + shift.
    """
    C = aligned(C, ALIGN)
    _, row, c, at = locate(C, BLOCK_P, BLOCK_P, BLOCK_C)
    p, start = tl.arange(0, BLOCK_P), offset(row, C)
    mask = within(p, P - row, c, C)

    g = load_rows(dout + start, at, mask)
    value, value2 = g, g
    if TRAINING or signs is None:
        value = load_rows(y + start, at, mask)
    if signs is None:
        opened = is_open(affine(value, load_row(vectors, SCALE, C, c)[None, :], load_row(vectors, SHIFT, C, c)[None, :]))
    else:
        S, b, at_signs = locate_signs(C, BLOCK_P, BLOCK_C)
        bits = tl.load(signs + offset(row, S) + at_signs, mask=within(p, P - row, b, S), other=0)
        opened = unpack(bits, BLOCK_P, BLOCK_C)
    if y2 is not None and TRAINING2:
        value2 = load_rows(y2 + start, at, mask)
    g = tl.where(opened, g, 0.0)
    if masked is not None:
        tl.store(masked + start + at, g.to(masked.dtype.element_ty), mask=mask)
    result = through_bn(g, value, coefficients, C, c, c < C, TRAINING)
    tl.store(dy + start + at, result.to(dy.dtype.element_ty), mask=mask)
    if y2 is not None:
        result = through_bn(g, value2, coefficients2, C, c, c < C, TRAINING2)
        tl.store(dy2 + start + at, result.to(dy2.dtype.element_ty), mask=mask)


def bn_act_backward_apply(
    dout: Tensor,
    y: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    signs: Tensor | None,
    training: bool,
    y2: Tensor | None,
    coefficients2: Tensor | None,
    training2: bool,
    keep_masked: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Contract: fused_res/primitives/bn_act_backward.py."""
    pixels, channels = y.shape
    dy = torch.empty_like(y)
    dy2 = None if y2 is None else torch.empty_like(y)
    masked = torch.empty_like(y) if keep_masked else None
    block = tile(pixels, channels, y.element_size(), vectors=2)
    arguments = (dout, y, vectors, coefficients, signs, y2, coefficients2, dy, dy2, masked, pixels, channels)
    modes = {"TRAINING": training, "TRAINING2": training2}
    launch_tiles(bn_act_backward_apply_kernel, cdiv(pixels, block.rows), block, channels, *arguments, **modes)
    return dy, dy2, masked


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for pixels, channels in ((100352, 64), (392, 512), (1000, 20), (1, 1)):
        y, vectors, coefficients = meta(pixels, channels, dtype=dtype), meta(5, channels), meta(7, channels)
        signs, wide = meta(pixels, (channels + 7) // 8, dtype=torch.uint8), channels % 16 == 0
        first = pixels == 100352
        at = f"{pixels}x{channels}"

        def reduce(name, *arguments, sample=False, at=at, wide=wide):
            return variant(f"{name} {at}", bn_act_backward_reduce, *arguments, loads=wide, sample=sample)

        yield reduce("inner", y, y, vectors, None, None, None)
        yield reduce("outer", y, y, vectors, signs, None, None, sample=first)
        yield reduce("outer, second", y, y, vectors, signs, y, vectors)

        def apply(name, *arguments, sample=False, at=at, wide=wide):
            return variant(f"{name} {at}", bn_act_backward_apply, *arguments, loads=wide, stores=wide, sample=sample)

        yield apply("inner", y, y, vectors, coefficients, None, True, None, None, False, False, sample=first)
        yield apply("inner, frozen", y, y, vectors, coefficients, None, False, None, None, False, False)
        yield apply("outer, masked", y, y, vectors, coefficients, signs, True, None, None, False, True)
        yield apply("outer, frozen, masked", y, y, vectors, coefficients, signs, False, None, None, False, True)
        yield apply("outer, second", y, y, vectors, coefficients, signs, True, y, coefficients, True, False, sample=first)
        yield apply("outer, second frozen", y, y, vectors, coefficients, signs, True, y, coefficients, False, False)
    if dtype == torch.float32:
        vectors, parameter, scale = meta(5, 256), meta(256), meta()
        for tiles in (1, 50, 512, 1000):
            sums, pixels = meta(tiles, 3, 256), 100 * tiles
            yield variant(
                f"affine T={tiles}", bn_act_backward_finalize, sums, 2, pixels, vectors, parameter, parameter, scale, True
            )
            yield variant(f"plain T={tiles}", bn_act_backward_finalize, sums, 1, pixels, vectors, None, None, None, False)
