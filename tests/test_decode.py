"""Where Triton's kernels say that pixels lie, against divisions."""

import pytest
import torch
from compare import same

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_res.kernels.ahead import meta, meta_image
from fused_res.kernels.implicit_gemm import decode
from fused_res.kernels.launching import recording
from fused_res.kernels.moments import moments
from fused_res.kernels.operands import meta_activation
from fused_res.kernels.pointwise_direct import pointwise_direct_stats
from fused_res.kernels.pointwise_tail_backward import pointwise_tail_backward_reduce
from fused_res.kernels.tiling import PLACES, unlimited


@triton.jit
def _decode_kernel(out, first, last, H, W, B: tl.constexpr):
    b = tl.arange(0, B)
    n, h, w = decode(tl.cast(first, tl.int64), H, W, last - b)
    tl.store(out + b, n)
    tl.store(out + B + b, h)
    tl.store(out + 2 * B + b, w)


# The widths around 2^15, where a multiplication would no longer do; primes; powers of two; single rows and columns.
SIZES = [(1, 1), (5, 1), (1, 5), (3, 7), (7, 127), (13, 4096), (2, 32749), (3, 32768), (2, 32769), (32771, 2), (40000, 26000)]


@pytest.mark.parametrize("last", [63, 2**15 - 1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_places_of_pixels(device, size, last):
    height, width = size
    for first in (0, width - 1, height * width - 1, 2**31 - 2**15 - 1, 2**31 + height * width // 2):
        out = torch.empty(3, 64, dtype=torch.int64, device=device)
        _decode_kernel[(1,)](out, first, last, height, width, B=64)
        pixels = first + last - torch.arange(64, device=device)
        n = pixels // (height * width)
        same(out, torch.stack([n, pixels // width % height, pixels % width]))


@pytest.mark.parametrize("channels", [64, 2048])
def test_tiles_of_sampled_images_are_small_enough(channels):
    """Also of so many pixels that the number of programs would make them larger."""
    z = meta_activation(64, 256, 512, 512, torch.bfloat16, stride=2, activated=False)
    dout = meta_image(64, channels, 512, 512, dtype=torch.bfloat16)
    signs, weight = meta(z.pixels, channels // 8, dtype=torch.uint8), meta(channels, 256, dtype=torch.bfloat16)
    with unlimited(), recording() as found:
        moments(z)
        pointwise_tail_backward_reduce(dout, signs, z, None, None)
        pointwise_direct_stats(z, weight, meta(channels, dtype=torch.bool))
    tiles = [dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) for launch in found]
    rows = [tile["rows"] for tile in tiles if "z" in tile]
    assert len(rows) == 3
    assert all(count <= PLACES for count in rows), rows
