"""Triton kernels of `moments_finalize`."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.device import offset, store_vectors, within
from fused_res.kernels.launching import launch
from fused_res.kernels.operands import load_wide, meta_activation
from fused_res.kernels.pointwise_direct import direct_partials, merge_direct
from fused_res.kernels.tiling import cdiv

# As in fused_res/primitives/moments.py.
SUSPECT = 2.0**-11


@triton.jit
def moments_finalize_rows_kernel(
    mean, covariance, weight, weighted, stats, suspect, C, K, RATIO: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Mean and variance of W z by the moments of z, and in which channels the variance cannot be trusted.

    mean, m: [K], covariance, G: [K, K], float64. weight, W: [C, K]. weighted, W G: [C, K], stats: [2, C], float64. suspect: [C],
    bool.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    average, most = tl.zeros((BLOCK_C, BLOCK_K), tl.float64), tl.zeros((BLOCK_C, BLOCK_K), tl.float64)
    var = tl.zeros((BLOCK_C, BLOCK_K), tl.float64)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at, mask = offset(c, K)[:, None] + k[None, :], within(c, C, k, K)
        w = load_wide(weight + at, mask)
        deviation = tl.sqrt(load_wide(covariance + offset(k, K + 1), k < K))
        average += w * load_wide(mean + k, k < K)[None, :]
        most += tl.abs(w) * deviation[None, :]
        var += w * load_wide(weighted + at, mask)
    squares, largest = tl.sum(var, axis=1), tl.sum(most, axis=1)
    tl.store(suspect + c, squares < RATIO * (largest * largest), mask=c < C)
    store_vectors(stats, (tl.sum(average, axis=1), tl.where(squares < 0, 0.0, squares)), C, c)


@triton.jit
def moments_finalize_kernel(
    stats,
    suspect,
    direct,
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
):
    """Mean and variance, of suspect channels those of the direct pass, become mean, variance, invstd, scale and shift of a BN.

    stats: [2, C], float64, suspect: [C], bool, from `moments_finalize_rows_kernel`. direct: [T, 3, C], float64, from
    `pointwise_direct_kernel` over T tiles of `rows` rows each but the last. gamma, beta: [C], residual_scale: [1], each or None.
    vectors: [5, C], float32.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    suspects = tl.load(suspect + c, mask=inside, other=0) != 0
    mean, var = merge_direct(direct, suspects, T, rows, last, P, C, c, True, BLOCK_T, BLOCK_C)
    mean = tl.where(suspects, mean, load_wide(stats + c, inside))
    var = tl.where(suspects, var, load_wide(stats + C + c, inside))
    invstd = 1.0 / tl.sqrt(var + eps)
    scale = invstd
    if gamma is not None:
        scale = invstd * load_wide(gamma + c, inside)
    shift = -scale * mean
    if beta is not None:
        shift += load_wide(beta + c, inside)
    if residual_scale is not None:
        a = tl.load(residual_scale).to(tl.float64)
        scale, shift = scale * a, shift * a
    store_vectors(vectors, (mean, var, invstd, scale, shift), C, c)


def row_statistics(found: Any, weight: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [2, C] of W z, and which channels [C] are suspect, for a weight [C, K] and W G."""
    channels, inner = weight.shape
    stats = torch.empty(2, channels, dtype=torch.float64, device=weight.device)
    suspect = torch.empty(channels, dtype=torch.bool, device=weight.device)
    launch(
        moments_finalize_rows_kernel,
        cdiv(channels, 4),
        *(*found[:2], weight, weighted, stats, suspect, channels, inner),
        RATIO=SUSPECT,
        BLOCK_C=4,
        BLOCK_K=128,
        warps=4,
    )
    return stats, suspect


def moments_finalize(found: Any, z: Any, unit: Any, residual_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contract: fused_res/primitives/moments.py. W G is the library's product."""
    weight, channels = unit.weight.flatten(1).contiguous(), unit.weight.shape[0]
    stats, suspect = row_statistics(found, weight, torch.mm(weight.double(), found[1]))
    direct = direct_partials(z, weight, suspect)
    vectors = torch.empty(5, channels, dtype=torch.float32, device=weight.device)
    launch(
        moments_finalize_kernel,
        cdiv(channels, 16),
        *(stats, suspect, direct.sums, unit.gamma, unit.beta, residual_scale, vectors, *direct[1:], channels, unit.eps),
        BLOCK_T=32,
        BLOCK_C=16,
        warps=4,
    )
    return vectors, suspect


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    # n, K, C, size, stride
    for n, k, c, size, stride in ((32, 64, 256, 56, 1), (8, 512, 2048, 7, 1), (32, 256, 512, 28, 2), (4, 20, 36, 9, 1)):
        z, weight = meta_activation(n, k, size, size, dtype, stride, activated=stride == 1), meta_image(c, k, 1, 1, dtype=dtype)
        found = meta(k, dtype=torch.float64), meta(k, k, dtype=torch.float64)
        parameter, at = meta(c), f"{n}x{k}x{size}x{size}/{stride} {c}"
        affine = SimpleNamespace(weight=weight, gamma=parameter, beta=parameter, eps=1e-5)
        bare = SimpleNamespace(weight=weight, gamma=None, beta=None, eps=1e-5)
        yield variant(f"rows {at}", moments_finalize, found, z, affine, None, launched=0)
        yield variant(f"affine {at}", moments_finalize, found, z, affine, meta(), launched=2, sample=k == 64)
        yield variant(f"plain {at}", moments_finalize, found, z, bare, None, launched=2)
