"""Triton kernel of `bn_stats`."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, variant
from fused_res.kernels.device import aligned, load_rows, locate, offset, places, within
from fused_res.kernels.launching import launch_tiles
from fused_res.kernels.tiling import STAGES, row_tiles, tile


@triton.jit
def bn_stats_kernel(
    y, partials, P, C, rows, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr
):
    """Mean and centred sum of squares of every channel, over tiles of `rows` rows.

    y: [P, C]. partials: [T, 2, C], float32.
    """
    C = aligned(C, ALIGN)
    t, row, c, _ = locate(C, rows, BLOCK_P, BLOCK_C)
    left = tl.minimum(P - row, rows).to(tl.int32)
    p = tl.arange(0, BLOCK_P)

    # Float32 values count from the tile's first row, which keeps the digits of a mean far from 0; narrower dtypes have none to
    # lose. Each slot of the block does Welford's update on its own: with n rows before, a row at distance delta moves the mean
    # by delta / (n + 1) and adds delta^2 * n / (n + 1) to the squares.
    WIDE: tl.constexpr = y.dtype.element_ty == tl.float32
    if WIDE:
        pivot = tl.load(y + offset(row, C) + c, mask=c < C, other=0.0)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    n = 0.0
    values = y + offset(row, C)
    for first in tl.range(0, left, BLOCK_P, num_stages=STAGES):
        delta = load_rows(values, places(p, left - first, c, C), within(p, left - first, c, C))
        if WIDE:
            delta -= pivot[None, :]
        delta -= mean
        weight = tl.where(p < left - first, 1.0 / (n + 1.0), 0.0)
        mean += delta * weight[:, None]
        squares += delta * (delta * (n * weight)[:, None])
        n += 1.0
        values += BLOCK_P * C

    count = tl.cdiv(tl.maximum(left - p, 0), BLOCK_P).to(tl.float32)[:, None]  # rows that each slot has seen
    total = tl.sum(mean * count, axis=0) / left
    mean -= total[None, :]
    rest = tl.sum(mean * count, axis=0) / left  # what rounding left out of the total
    squares = tl.sum(squares + count * mean * mean, axis=0)
    if WIDE:
        total += pivot
    start = partials + offset(t * 2, C)
    tl.store(start + c, total + rest, mask=c < C)
    tl.store(start + C + c, squares, mask=c < C)


def bn_stats(y: Tensor) -> tuple[Tensor, int]:
    """Contract: fused_res/primitives/bn_stats.py."""
    pixels, channels = y.shape
    block = tile(pixels, channels, y.element_size(), vectors=2)
    tiles, rows = row_tiles(pixels, channels, block)
    partials = torch.empty(tiles, 2, channels, dtype=torch.float32, device=y.device)
    launch_tiles(bn_stats_kernel, tiles, block, channels, y, partials, pixels, channels, rows, STAGES=STAGES)
    return partials, rows


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for pixels, channels in ((802816, 64), (12544, 2048), (392, 512), (1000, 20), (130, 3), (1, 1)):
        y, wide = meta(pixels, channels, dtype=dtype), channels % 16 == 0
        yield variant(f"{pixels}x{channels}", bn_stats, y, loads=wide, sample=pixels == 802816)
