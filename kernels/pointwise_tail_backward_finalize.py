"""Triton kernels of `pointwise_tail_backward_finalize`, and of the scaled weight that the other steps multiply by."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.device import INVSTD, MEAN, SCALE, load_row, narrow, offset, store_vectors, within
from fused_res.kernels.launching import launch
from fused_res.kernels.moments_finalize import row_statistics
from fused_res.kernels.operands import incoming, load_wide, meta_activation
from fused_res.kernels.pointwise_direct import direct_partials, merge_direct
from fused_res.kernels.tiling import cdiv, dot_precision


@triton.jit
def pointwise_tail_backward_finalize_weight_kernel(weight, vectors, scaled, C, K, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """scaled = diag(scale) W, as a matrix product multiplies it.

    weight, W: [C, K]. vectors: [5, C], float32. scaled: [C, K].
    """
    e = offset(tl.program_id(0), BLOCK) + tl.arange(0, BLOCK)
    c, inside = e // K, e // K < C
    w = tl.load(weight + e, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(vectors + 3 * C + c, mask=inside, other=0.0)
    tl.store(scaled + e, narrow(scale * w, scaled.dtype.element_ty, PRECISION), mask=inside)


def scaled_weight(branch: Any) -> Tensor:
    """Contract: fused_res/primitives/pointwise_tail_backward.py."""
    weight = branch.weight.flatten(1).contiguous()
    scaled, block = torch.empty_like(weight), 1024
    launch(
        pointwise_tail_backward_finalize_weight_kernel,
        cdiv(weight.numel(), block),
        *(weight, branch.vectors, scaled, *weight.shape),
        PRECISION=dot_precision(weight),
        BLOCK=block,
        warps=4,
    )
    return scaled


@triton.jit
def pointwise_tail_backward_finalize_rows_kernel(
    total,
    product,
    weight,
    scaled,
    vectors,
    suspect,
    direct,
    gamma,
    beta,
    residual_scale,
    coefficients,
    shares,
    wide,
    T,
    rows,
    last,
    P,
    C,
    K,
    L,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """D of every channel, the gradients of its parameters, and the operands of the products that dW, B and b take.

    total: [C], product, M: [C, K], float64. weight, W: [C, K]. scaled, A: [C, K], or None. vectors: [5, C], float32. suspect: [C],
    bool, and direct: [T, C], float64, from `pointwise_direct_kernel` over T tiles; both None with running statistics. gamma, beta:
    [C], residual_scale: [1], each or None. coefficients: [4, C], float32. shares: [C, L], L > K, float64, or None: diag(i D / P) W,
    and from column K on sum g / P. wide: [C, K], float64, A, or None.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    sums = tl.zeros((BLOCK_C, BLOCK_K), tl.float64)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at, mask = offset(c, K)[:, None] + k[None, :], within(c, C, k, K)
        sums += load_wide(weight + at, mask) * load_wide(product + at, mask)
    d, sum_g = tl.sum(sums, axis=1), load_wide(total + c, inside)
    if suspect is not None:
        suspects = tl.load(suspect + c, mask=inside, other=0) != 0
        directly, _ = merge_direct(direct, suspects, T, rows, last, P, C, c, False, BLOCK_T, BLOCK_C)
        d = tl.where(suspects, directly, d)
        dbias = tl.zeros((BLOCK_C,), tl.float64)
    else:
        d -= sum_g * load_row(vectors, MEAN, C, c).to(tl.float64)
        dbias = load_row(vectors, SCALE, C, c).to(tl.float64) * sum_g
    invstd = load_row(vectors, INVSTD, C, c).to(tl.float64)
    d *= invstd
    if shares is not None:
        share, constant = invstd * d / P, sum_g / P
        for first in range(0, L, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            at, mask = offset(c, K)[:, None] + k[None, :], within(c, C, k, K)
            value = share[:, None] * load_wide(weight + at, mask)
            value = tl.where((k < K)[None, :], value, constant[:, None])
            tl.store(shares + offset(c, L)[:, None] + k[None, :], value, mask=within(c, C, k, L))
            if wide is not None:
                tl.store(wide + at, load_wide(scaled + at, mask), mask=mask)
    dscale = d
    if gamma is not None:
        dscale = load_wide(gamma + c, inside) * d
    if beta is not None:
        dscale += load_wide(beta + c, inside) * sum_g
    if residual_scale is not None:
        a = tl.load(residual_scale).to(tl.float64)
        d, sum_g = a * d, a * sum_g
    store_vectors(coefficients, (d, sum_g, dscale, dbias), C, c)


@triton.jit
def pointwise_tail_backward_finalize_kernel(
    product, weighted, vectors, form, dweight, quadratic, constant, P, C, K, L, BLOCK: tl.constexpr
):
    """dW = diag(s) (M - P U) with U = diag(i D / P) W G; B and b, which lie side by side, each in its own dtype.

    product, M: [C, K], float64. weighted, U: [C, K], float64, or None for 0. vectors: [5, C], float32. form: [K, L], float64: B,
    and in column K b. dweight: [C, K]. quadratic, B: [K, K], constant, b: [K], float32; form, B and b may be None.
    """
    first, split = tl.program_id(0), tl.cdiv(C * K, BLOCK)
    if first < split:
        e = offset(first, BLOCK) + tl.arange(0, BLOCK)
        c, inside = e // K, e // K < C
        value = load_wide(product + e, inside)
        if weighted is not None:
            value -= P * load_wide(weighted + e, inside)
        value *= load_wide(vectors + 3 * C + c, inside)
        tl.store(dweight + e, value.to(tl.float32).to(dweight.dtype.element_ty), mask=inside)
    elif form is not None:
        e = offset(first - split, BLOCK) + tl.arange(0, BLOCK)
        j, k = e // K, e % K
        inside = j < K
        value = load_wide(form + j * L + k, inside)
        tl.store(quadratic + e, value.to(tl.float32).to(quadratic.dtype.element_ty), mask=inside)
        ends = inside & (k == 0)
        tl.store(constant + j, load_wide(form + j * L + K, ends).to(tl.float32), mask=ends)


def pointwise_tail_backward_finalize(
    sums: Any,
    found: Any,
    branch: Any,
    scaled: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual_scale: Tensor | None,
    dout: Tensor,
    signs: Tensor,
    suspect: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Contract: fused_res/primitives/pointwise_tail_backward.py. U, and B beside b, are the library's products."""
    z, weight, vectors, live = branch.z, branch.weight.flatten(1).contiguous(), branch.vectors, found is not None
    (channels, inner), pixels, device = weight.shape, branch.z.pixels, weight.device
    direct, mean, shares, wide = (None, 1, 1, 1, pixels), None, None, None
    # An even number of columns keeps the rows of float64 aligned to 16 bytes.
    columns = 2 * (inner // 2 + 1)
    flows = live and scaled is not None
    if live:
        if suspect is None:
            _, suspect = row_statistics(found, weight, torch.mm(weight.double(), found[1]))
        direct = direct_partials(z, weight, suspect, incoming(dout, signs, pixels), signs, vectors[0])
        shares = torch.empty(channels, columns, dtype=torch.float64, device=device)
        wide = torch.empty(channels, inner, dtype=torch.float64, device=device) if flows else None
    coefficients = torch.empty(4, channels, dtype=torch.float32, device=device)
    launch(
        pointwise_tail_backward_finalize_rows_kernel,
        cdiv(channels, 4),
        *(sums[0], sums[1], weight, scaled if flows else None, vectors, suspect if live else None, direct[0]),
        *(gamma, beta, residual_scale, coefficients, shares, wide, *direct[1:], channels, inner, columns),
        BLOCK_T=32,
        BLOCK_C=4,
        BLOCK_K=128,
        warps=4,
    )
    weighted = form = quadratic = constant = None
    if live:
        weighted = torch.mm(shares[:, :inner], found[1])
    if flows:
        form, mean = torch.mm(wide.t(), shares), found[0]
        quadratic = torch.empty(inner, inner, dtype=scaled.dtype, device=device)
        constant = torch.empty(inner, dtype=torch.float32, device=device)
    dweight, block = torch.empty_like(weight), 1024
    launch(
        pointwise_tail_backward_finalize_kernel,
        cdiv(channels * inner, block) + (cdiv(inner * inner, block) if flows else 0),
        *(sums[1], weighted, vectors, form, dweight, quadratic, constant, pixels, channels, inner, columns),
        BLOCK=block,
        warps=4,
    )
    return dweight.view(branch.weight.shape), *coefficients.unbind(), mean, quadratic, constant


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    # n, K, C, size, stride
    for n, k, c, size, stride in ((32, 64, 256, 56, 1), (8, 512, 2048, 7, 1), (32, 256, 512, 28, 2), (4, 20, 36, 9, 1)):
        z, weight = meta_activation(n, k, size, size, dtype, stride, activated=stride == 1), meta_image(c, k, 1, 1, dtype=dtype)
        dout, signs = meta_image(n, c, size, size, dtype=dtype), meta(n * size * size, -(-c // 8), dtype=torch.uint8)
        sums = meta(c, dtype=torch.float64), meta(c, k, dtype=torch.float64)
        found = meta(k, dtype=torch.float64), meta(k, k, dtype=torch.float64)
        branch, scaled, suspect = (
            SimpleNamespace(z=z, weight=weight, vectors=meta(5, c)),
            meta(c, k, dtype=dtype),
            meta(c, dtype=torch.bool),
        )
        at = f"{n}x{k}x{size}x{size}/{stride} {c}"
        yield variant(f"scaled {c}x{k}", scaled_weight, branch)
        for name, moments, a in (("live", found, scaled), ("live, parameters only", found, None), ("frozen", None, scaled)):
            arguments = sums, moments, branch, a, meta(c), meta(c), meta(), dout, signs, None if moments is None else suspect
            first = 0 if moments is None else 1  # after the direct pass
            yield variant(f"rows, {name} {at}", pointwise_tail_backward_finalize, *arguments, launched=first, sample=k == 64)
            yield variant(f"{name} {at}", pointwise_tail_backward_finalize, *arguments, launched=first + 1)
