"""Where Triton's kernels say that pixels lie, against divisions."""

import pytest
import torch
from compare import same

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_res.kernels.implicit_gemm import decode


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
