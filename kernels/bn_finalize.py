"""Triton kernel of `bn_finalize`."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, variant
from fused_res.kernels.device import offset, store_vectors
from fused_res.kernels.launching import launch
from fused_res.kernels.tiling import UNROLL, cdiv, partials_tile


@triton.jit
def _store_affine(vectors, mean, var, gamma, beta, residual_scale, eps, C, c):
    """Mean and variance of the channels c, and the invstd, scale and shift that follow from them."""
    inside = c < C
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = invstd
    if gamma is not None:
        scale = invstd * tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
    shift = -scale * mean
    if beta is not None:
        shift += tl.load(beta + c, mask=inside, other=0.0).to(tl.float32)
    if residual_scale is not None:
        a = tl.load(residual_scale).to(tl.float32)
        scale, shift = scale * a, shift * a
    store_vectors(vectors, (mean, var, invstd, scale, shift), C, c)


@triton.jit
def bn_finalize_kernel(
    partials,
    gamma,
    beta,
    residual_scale,
    vectors,
    T,
    rows,
    last,
    P,
    C,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The statistics of T tiles, of `rows` rows each but the last, become mean, variance, invstd, scale and shift of a BN.

    partials: [T, 2, C], float32. gamma, beta: [C], residual_scale: [1], each or None. vectors: [5, C], float32.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    # Means count from the first tile's, which keeps the digits of a mean far from 0; that tile itself counts as exactly 0, so
    # that a single tile passes unchanged, infinite or not.
    pivot = tl.load(partials + c, mask=inside, other=0.0)
    count = tl.zeros((BLOCK_T, 1), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for first in tl.range(0, T, BLOCK_T, loop_unroll_factor=UNROLL):
        t = first + tl.arange(0, BLOCK_T)
        at = partials + offset(t * 2, C)[:, None] + c[None, :]  # [BLOCK_T, BLOCK_C]
        mask = (t < T)[:, None] & inside[None, :]
        more = tl.where(t < T, tl.where(t == T - 1, last, rows), 0).to(tl.float32)[:, None]
        value = tl.where(((t > 0) & (t < T))[:, None], tl.load(at, mask=mask, other=0.0) - pivot[None, :], 0.0)
        # Each slot merges the tiles it meets, by the formula of Chan, Golub and LeVeque.
        delta = value - mean
        both = count + more
        weight = more / tl.where(both > 0, both, 1.0)
        mean += delta * weight
        squares += tl.load(at + C, mask=mask, other=0.0) + delta * delta * (count * weight)
        count = both
    total = tl.div_rn(tl.sum(mean * count, axis=0), P * 1.0)
    mean -= total[None, :]
    var = tl.div_rn(tl.sum(squares + count * mean * mean, axis=0), P * 1.0)
    _store_affine(vectors, pivot + total, var, gamma, beta, residual_scale, eps, C, c)


@triton.jit
def bn_finalize_running_kernel(running_mean, running_var, bias, gamma, beta, residual_scale, vectors, C, eps, BLOCK: tl.constexpr):
    """Running statistics become mean, variance, invstd, scale and shift of a BN behind a convolution without its bias.

    running_mean, running_var: [C]. bias, gamma, beta: [C], residual_scale: [1], each or None. vectors: [5, C], float32.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(running_mean + c, mask=c < C, other=0.0).to(tl.float32)
    var = tl.load(running_var + c, mask=c < C, other=0.0).to(tl.float32)
    if bias is not None:
        mean -= tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    _store_affine(vectors, mean, var, gamma, beta, residual_scale, eps, C, c)


def bn_finalize(
    partials: Tensor, rows: int, pixels: int, gamma: Tensor | None, beta: Tensor | None, eps: float, residual_scale: Tensor | None
) -> Tensor:
    """Contract: fused_res/primitives/bn_finalize.py."""
    tiles, _, channels = partials.shape
    vectors = torch.empty(5, channels, dtype=torch.float32, device=partials.device)
    block = partials_tile(tiles)
    last = pixels - rows * (tiles - 1)
    launch(
        bn_finalize_kernel,
        cdiv(channels, block.channels),
        *(partials, gamma, beta, residual_scale, vectors, tiles, rows, last, pixels, channels, eps),
        BLOCK_T=block.rows,
        BLOCK_C=block.channels,
        UNROLL=UNROLL,
        warps=block.warps,
    )
    return vectors


def bn_running(
    mean: Tensor,
    var: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Contract: fused_res/primitives/bn_finalize.py. dtype: float32."""
    vectors, block = torch.empty(5, len(mean), dtype=dtype, device=mean.device), 128
    launch(
        bn_finalize_running_kernel,
        cdiv(len(mean), block),
        *(None if t is None else t.contiguous() for t in (mean, var, bias, gamma, beta, residual_scale)),
        *(vectors, len(mean), eps),
        BLOCK=block,
        warps=4,
    )
    return vectors


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    parameter, scale = meta(256, dtype=dtype), meta(dtype=dtype)
    for tiles in (1, 50, 512, 1000):
        partials = meta(tiles, 2, 256)
        yield variant(
            f"affine T={tiles}", bn_finalize, partials, 100, 100 * tiles, parameter, parameter, 1e-5, scale, sample=tiles == 512
        )
        yield variant(f"plain T={tiles}", bn_finalize, partials, 1, tiles, None, None, 1e-5, None)
    yield variant(
        "running, affine 256", bn_running, meta(256), meta(256), parameter, meta(256), meta(256), 1e-5, scale, torch.float32
    )
    yield variant("running, plain 20", bn_running, meta(20), meta(20), None, None, None, 1e-5, None, torch.float32)
