"""Triton kernels of `conv_wgrad`: partial sums over parts of the pixels, and their sum."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels import conv_tiling
from fused_res.kernels.ahead import Variant, variant
from fused_res.kernels.arguments import activation, geometry, gradient, sign_word
from fused_res.kernels.conv_cases import MetaCase, meta_activated, meta_cases, meta_gradient, meta_tiles
from fused_res.kernels.conv_tiling import Config, configurations, constants, fitting
from fused_res.kernels.device import aligned, first_row, offset
from fused_res.kernels.implicit_gemm import decode, read
from fused_res.kernels.launching import launch
from fused_res.kernels.tiling import cdiv, limits, next_power_of_2
from fused_res.spec import ConvBN


@triton.jit
def conv_wgrad_partial_kernel(
    partials,
    dy,
    x,
    g,
    rows,
    P,
    C,
    K,
    LIVE: tl.constexpr,
    WORD: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    POINTWISE: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """For every tap, dy^T x over parts of `rows` pixels.

    partials: [T, K, R, S, C], float32. dy: a `Source`, whose images are [N, H', W', K], vectors [5, K], coefficients [7, K],
    float32, and signs [N * H' * W', ceil(K / 8)], uint8. x: a `Source`, its image [N, H, W, C], its vectors [5, C], float32, or
    None. P: N * H' * W'. EVEN, FULL: as `conv_tiling.constants` says.
    """
    C, K = aligned(C, ALIGN_C), aligned(K, ALIGN_K)
    blocks_c, blocks_k = tl.cdiv(C, BLOCK_C), tl.cdiv(K, BLOCK_K)
    first_c = tl.program_id(0) % blocks_c * BLOCK_C
    rest = tl.program_id(0) // blocks_c
    tap = rest % (R * S)
    first_k = rest // (R * S) % blocks_k * BLOCK_K
    t = rest // (R * S) // blocks_k

    row, p = first_row(t, rows), tl.arange(0, BLOCK_P)
    left = tl.minimum(P - row, rows).to(tl.int32)
    image = row // (g.out_height * g.out_width)
    start = (row - image * (g.out_height * g.out_width)).to(tl.int32)
    top, side = tap // S * g.dilation_h - g.padding_h, tap % S * g.dilation_w - g.padding_w
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for i in tl.range(0, tl.cdiv(left, BLOCK_P), num_stages=STAGES):
        first = i * BLOCK_P
        valid, at = None, p
        if not EVEN:
            valid = first + p < left
            at = tl.where(valid, p, 0)
        inside, origin, source = valid, row + first, at
        if not POINTWISE:
            images, h, w = decode(start + first, g.out_height, g.out_width, p)
            h, w = h * g.stride_h + top, w * g.stride_w + side
            inside = valid & (h.to(tl.uint32) < g.height) & (w.to(tl.uint32) < g.width)  # below 0 is far above
            origin, source = 0, tl.where(inside, ((image + images) * g.height + h) * g.width + w, 0)
        rows_k = read(dy, row + first, at, valid, first_k, K, False, LIVE, WORD, FULL, PRECISION, BLOCK_P, BLOCK_K)
        rows_c = read(x, origin, source, inside, first_c, C, False, False, 8, FULL, PRECISION, BLOCK_P, BLOCK_C)
        acc = tl.dot(tl.trans(rows_k), rows_c, acc, input_precision=PRECISION)

    k, c = first_k + tl.arange(0, BLOCK_K), first_c + tl.arange(0, BLOCK_C)
    at = ((offset(t, K) + k) * (R * S) + tap) * C
    tl.store(partials + at[:, None] + c[None, :], acc, mask=(k < K)[:, None] & (c < C)[None, :])


@triton.jit
def conv_wgrad_sum_kernel(
    partials,
    dweight,
    T,
    E,
    C,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sum of T partial results of E = K * R * S * C elements, in a fixed order.

    partials: [T, K, R, S, C], float32. dweight: [K, C, R, S] with these strides.
    """
    e = first_row(tl.program_id(0), BLOCK_E) + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        total += tl.load(partials + offset(t, E)[:, None] + e[None, :], mask=(t < T)[:, None] & (e < E)[None, :], other=0.0)
    tap, c = e // C % (R * S), e % C
    at = e // C // (R * S) * stride_k + tap // S * stride_r + tap % S * stride_s + c * stride_c
    tl.store(dweight + at, tl.sum(total, axis=0).to(dweight.dtype.element_ty), mask=e < E)


def split(pixels: int, programs: int, block_p: int) -> tuple[int, int]:
    """Into how many parts the pixels are cut, and the pixels of each but the last, where one part makes this many programs.

    By the shape alone, so that results repeat; at least one part, and none of a few blocks only if that can be helped.
    """
    parts = max(1, min(conv_tiling.PROGRAMS // programs, pixels // (4 * block_p)))
    parts = max(parts, cdiv(pixels, 2**30))  # places within a part take 32 bits
    rows = block_p * max(1, cdiv(cdiv(pixels, parts), block_p))
    return max(1, cdiv(pixels, rows)), rows


def conv_wgrad(dy: Any, x: Any, unit: ConvBN, *, config: tuple | None = None) -> Tensor:
    """Contract: fused_res/primitives/conv_wgrad.py. config: the fields of a `Config`; by default chosen by shape and GPU."""
    weight, right = unit.weight, activation(x, unit.weight)
    (k, c, r, s), (n, _, height, width) = weight.shape, right.image.shape
    g = geometry(height, width, unit)
    left = gradient(dy, (n, k, g.out_height, g.out_width), weight)
    pixels = n * g.out_height * g.out_width
    if config is None:
        # What `mma` reads takes registers, too, and what is computed takes them twice: it spills on compute capability 12.0.
        twice = right.vectors is not None and weight.element_size() == 2 and limits(weight.device).results < 128
        area = 128 * 64 if left.coefficients is not None or twice else 128 * 128
        sampled = (r, s) == (1, 1) and (g.out_height, g.out_width) != (height, width)
        if left.coefficients is not None and right.vectors is not None and sampled:
            area = 64 * 64  # two operands to compute, and their places
        config = next(fitting("wgrad", configurations("wgrad", weight.dtype, pixels, weight.shape, area=area), weight, dy, x))
    config = Config(*config)
    programs = cdiv(k, config.block_k) * cdiv(c, config.block_c) * r * s
    parts, rows = split(pixels, programs, config.block_p)
    partials = torch.empty(parts, weight.numel(), dtype=torch.float32, device=weight.device)
    launch(
        conv_wgrad_partial_kernel,
        parts * programs,
        *(partials, left, right, g, rows, pixels, c, k),
        LIVE=left.coefficients is not None and dy.training,
        WORD=sign_word(left.signs, k, config.block_k),
        **constants(config, unit, pixels),
    )
    dweight = torch.empty_like(weight)
    block_t = min(64, next_power_of_2(parts))
    block_e = 2048 // block_t
    launch(
        conv_wgrad_sum_kernel,
        cdiv(weight.numel(), block_e),
        *(partials, dweight, parts, weight.numel(), c, *dweight.stride()),
        R=r,
        S=s,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        warps=4,
    )
    return dweight


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for case in meta_cases(dtype):
        raw, activated = SimpleNamespace(image=case.x, vectors=None), meta_activated(case)

        def wgrad(name, mask, x, sample=False, case=case):
            arguments, wide = (meta_gradient(case.dy, mask), x, case.unit), {"loads": case.wide, "stores": case.wide}
            return variant(f"{name} {case.at}", conv_wgrad, *arguments, **wide, matrix=True, sample=sample)

        yield wgrad("masked, activated", "applied", activated, sample=case.main and case.unit.stride == (2, 2))
        if case.main:
            yield wgrad("outer, activated", "signs", activated, sample=case.unit.weight.shape[2] == 1)
            yield wgrad("open by y, activated", "y", activated)
            yield wgrad("masked", "applied", raw)
            yield wgrad("plain, activated", "none", activated)
            yield wgrad("plain", "none", raw)
        yield variant(case.at, conv_wgrad, meta_gradient(case.dy, "none"), raw, case.unit, launched=1)


def aot_tiles(dtype: torch.dtype) -> Iterator[Variant]:
    """The variant that needs the most registers, with every tile that tuning tries."""

    def operands(case: MetaCase) -> tuple:
        return meta_gradient(case.dy, "signs"), meta_activated(case)

    for case, made, config, name in meta_tiles("wgrad", dtype, operands):
        yield variant(name, conv_wgrad, *made, case.unit, config=config, loads=True, stores=True, matrix=True)
