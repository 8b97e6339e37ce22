"""Triton kernel of `bn_act`."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, variant
from fused_res.kernels.device import (
    SCALE,
    SHIFT,
    add_shortcut,
    affine,
    aligned,
    is_open,
    load_row,
    load_rows,
    locate,
    locate_signs,
    offset,
    pack,
    relu,
    within,
)
from fused_res.kernels.launching import launch_tiles
from fused_res.kernels.tiling import cdiv, tile


@triton.jit
def bn_act_kernel(
    y,
    vectors,
    skip,
    y2,
    vectors2,
    out,
    signs,
    P,
    C,
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = relu(scale * y + shift + shortcut), or without RELU the sum, and a sign bit for every element of it that is open.

    y, out, and skip or y2 or neither: [P, C]. vectors, and vectors2 with y2: [5, C], float32. signs: [P, ceil(C / 8)], uint8, or
    None.
    """
    C = aligned(C, ALIGN)
    _, row, c, at = locate(C, BLOCK_P, BLOCK_P, BLOCK_C)
    p, start = tl.arange(0, BLOCK_P), offset(row, C)
    mask = within(p, P - row, c, C)

    v = affine(load_rows(y + start, at, mask), load_row(vectors, SCALE, C, c)[None, :], load_row(vectors, SHIFT, C, c)[None, :])
    v = add_shortcut(v, skip, y2, vectors2, start, at, mask, C, c)
    rounded = (relu(v) if RELU else v).to(out.dtype.element_ty)
    tl.store(out + start + at, rounded, mask=mask)
    if signs is not None:
        S, b, at = locate_signs(C, BLOCK_P, BLOCK_C)
        packed = pack(is_open(rounded.to(tl.float32)), BLOCK_P, BLOCK_C)
        tl.store(signs + offset(row, S) + at, packed, mask=within(p, P - row, b, S))


def bn_act(
    y: Tensor,
    vectors: Tensor,
    skip: Tensor | None,
    y2: Tensor | None,
    vectors2: Tensor | None,
    keep_signs: bool,
    relu: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Contract: fused_res/primitives/bn_act.py."""
    pixels, channels = y.shape
    out = torch.empty_like(y)
    signs = torch.empty(pixels, -(-channels // 8), dtype=torch.uint8, device=y.device) if keep_signs else None
    block = tile(pixels, channels, y.element_size(), vectors=4)
    arguments = (y, vectors, skip, y2, vectors2, out, signs, pixels, channels)
    launch_tiles(bn_act_kernel, cdiv(pixels, block.rows), block, channels, *arguments, RELU=relu)
    return out, signs


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for pixels, channels in ((100352, 64), (12544, 2048), (392, 512), (1000, 20), (1, 1)):
        y, vectors, wide = meta(pixels, channels, dtype=dtype), meta(5, channels), channels % 16 == 0

        def act(name, *arguments, sample=False, at=f"{pixels}x{channels}", wide=wide):
            return variant(f"{name} {at}", bn_act, *arguments, loads=wide, stores=wide, sample=sample)

        yield act("inner", y, vectors, None, None, None, False)
        yield act("skip", y, vectors, y, None, None, False)
        yield act("skip, signs", y, vectors, y, None, None, True, sample=pixels == 100352)
        yield act("second, signs", y, vectors, None, y, vectors, True)
        yield act("skip, no ReLU", y, vectors, y, None, None, False, False)
