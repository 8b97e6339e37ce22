"""Triton kernel of `masked_add`."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.device import aligned, load_rows, locate, locate_signs, offset, unpack, within
from fused_res.kernels.implicit_gemm import decode
from fused_res.kernels.launching import launch_tiles
from fused_res.kernels.tiling import cdiv, tile


@triton.jit
def masked_add_kernel(
    dx,
    image,
    signs,
    H,
    W,
    h,
    w,
    down,
    right,
    P,
    C,
    SCATTERED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx += the image, where its signs are open, at every down-th line and right-th pixel.

    dx: [N, H, W, C]. image: [N, h, w, C]. signs: [P, ceil(C / 8)], uint8, or None. P: N * h * w.
    """
    C = aligned(C, ALIGN)
    _, row, c, at = locate(C, BLOCK_P, BLOCK_P, BLOCK_C)
    p, start = tl.arange(0, BLOCK_P), offset(row, C)
    mask = within(p, P - row, c, C)
    g = load_rows(image + start, at, mask)
    if signs is not None:
        S, b, at_signs = locate_signs(C, BLOCK_P, BLOCK_C)
        bits = tl.load(signs + offset(row, S) + at_signs, mask=within(p, P - row, b, S), other=0)
        g = tl.where(unpack(bits, BLOCK_P, BLOCK_C), g, 0.0)
    places = dx + start + at
    if SCATTERED:
        n, i, j = decode(row, h, w, p)
        places = dx + (((n * H + i * down) * W + j * right) * C)[:, None] + c[None, :]
    total = tl.load(places, mask=mask, other=0.0).to(tl.float32) + g
    tl.store(places, total.to(dx.dtype.element_ty), mask=mask)


def masked_add(dx: Tensor, image: Tensor, signs: Tensor | None, stride: tuple[int, int]) -> None:
    """Contract: fused_res/primitives/masked_add.py."""
    if not dx.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"dx: expected a channels_last image, got strides {dx.stride()} for shape {tuple(dx.shape)}")
    n, channels, h, w = image.shape
    pixels = n * h * w
    block = tile(pixels, channels, dx.element_size(), vectors=4)
    arguments = (dx, image.contiguous(memory_format=torch.channels_last), signs, *dx.shape[2:], h, w, *stride, pixels, channels)
    launch_tiles(masked_add_kernel, cdiv(pixels, block.rows), block, channels, *arguments, SCATTERED=tuple(stride) != (1, 1))


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for n, channels, size in ((32, 256, 56), (8, 20, 9)):
        dx, signs, wide = (
            meta_image(n, channels, size, size, dtype=dtype),
            meta(n * size * size, -(-channels // 8), dtype=torch.uint8),
            channels % 16 == 0,
        )
        half = meta_image(n, channels, -(-size // 2), -(-size // 2), dtype=dtype)
        at = f"{n}x{channels}x{size}x{size}"
        yield variant(f"open {at}", masked_add, dx, dx, signs, (1, 1), loads=wide, stores=wide, sample=wide)
        yield variant(f"strided {at}", masked_add, dx, half, None, (2, 2), loads=wide, stores=wide)
