"""Triton kernel of `conv_dgrad`."""

from collections.abc import Iterator
from math import gcd
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, meta_image, variant
from fused_res.kernels.arguments import check_dense, check_image, geometry, gradient, sign_word, taps_first
from fused_res.kernels.conv_cases import meta_activated, meta_cases, meta_gradient, meta_tiles
from fused_res.kernels.conv_tiling import Config, configurations, constants, fitting
from fused_res.kernels.device import aligned, first_row, load_rows, store_gradient
from fused_res.kernels.implicit_gemm import decode, implicit_gemm, load_signs
from fused_res.kernels.launching import launch
from fused_res.kernels.tiling import cdiv
from fused_res.spec import ConvBN


class Addition(NamedTuple):
    """An `Addend` as the kernel takes it."""

    image: Tensor | None
    signs: Tensor | None


@triton.jit
def _first_tap(phase, padding, dilation, stride, TAPS: tl.constexpr):
    """The first of the taps under which pixels of this phase lie on the output's grid; TAPS where none does."""
    first = phase * 0 + TAPS
    for i in tl.static_range(TAPS):
        first = tl.where((phase + padding - (TAPS - 1 - i) * dilation) % stride == 0, TAPS - 1 - i, first)
    return first


@triton.jit
def conv_dgrad_kernel(
    weight,
    dy,
    dx,
    addend,
    y,
    vectors,
    partials,
    g,
    step_h,
    step_w,
    P,
    C,
    K,
    LIVE: tl.constexpr,
    WORD: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    ADDEND_WORD: tl.constexpr,
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
    """dx = the gradient dy through the weight, plus `addend`; with `partials` masked by the ReLU below, and summed for its BN.

    weight: [K, R, S, C]. dy: a `Source`, whose images are [N, H', W', K], vectors [5, K], coefficients [7, K], float32, and signs
    [N * H' * W', ceil(K / 8)], uint8. dx, y: [N, H, W, C]. addend: an `Addition` to every DOWN-th line's every RIGHT-th pixel, its
    image [N, h, w, C], its signs [N * h * w, ceil(C / 8)], uint8. vectors: [5, C], partials: [T, 2, C], float32; y, vectors and
    partials may be None together. P: pixels of one phase, padded to whole strides. step_h, step_w: from one tap of a phase to the
    next. EVEN, FULL: as `conv_tiling.constants` says.
    """
    C, K = aligned(C, ALIGN_C), aligned(K, ALIGN_K)
    across = tl.cdiv(C, BLOCK_C)
    t, first = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK_C
    c, p = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)

    # Pixel h of the input has met pixel i of the output under tap r where i * stride = h + padding - r * dilation. All pixels of
    # a tile are of one phase, h = phase + i * stride, which every step-th tap belongs to: nothing is multiplied by 0.
    phases = g.stride_h * g.stride_w
    phase_h, phase_w = t % phases // g.stride_w, t % phases % g.stride_w
    tap_h = _first_tap(phase_h, g.padding_h, g.dilation_h, g.stride_h, R)
    tap_w = _first_tap(phase_w, g.padding_w, g.dilation_w, g.stride_w, S)
    taps_h, taps_w = tl.cdiv(R - tap_h, step_h), tl.cdiv(S - tap_w, step_w)
    row = first_row(t // phases, BLOCK_P)
    valid = p < P - row
    SCATTERED: tl.constexpr = DOWN != 1 or RIGHT != 1
    if POINTWISE:
        place, n, h, w = row + p, 0, 0, 0
        origin, source, i, j = row, p, 0, 0
        if SCATTERED:
            n, h, w = decode(row, g.height, g.width, p)
    else:
        n, i, j = decode(row, tl.cdiv(g.height, g.stride_h), tl.cdiv(g.width, g.stride_w), p)
        h, w = phase_h + i * g.stride_h, phase_w + j * g.stride_w
        valid = valid & (h < g.height) & (w < g.width)
        place = (n * g.height + h) * g.width + w
        i += (phase_h + g.padding_h - tap_h * g.dilation_h) // g.stride_h
        j += (phase_w + g.padding_w - tap_w * g.dilation_w) // g.stride_w
        origin, source = 0, (n * g.out_height + i) * g.out_width + j
    acc = implicit_gemm(
        dy,
        (origin, source, i, j, valid),
        (g.out_height, g.out_width, K),
        (taps_h * taps_w, taps_w, -(step_h * g.dilation_h // g.stride_h), -(step_w * g.dilation_w // g.stride_w)),
        (weight, tap_h * S + tap_w, step_h * S, step_w, C, R * S * C, 1, first, C),
        LIVE,
        WORD,
        False,
        POINTWISE,
        EVEN,
        FULL,
        PRECISION,
        BLOCK_P,
        BLOCK_K,
        BLOCK_C,
        STAGES,
    )

    at, mask, met, where = (place * C)[:, None] + c[None, :], None, None, place
    if not EVEN:
        mask, met = valid[:, None] & (c < C)[None, :], valid
    if addend.image is not None:
        wanted = mask
        if SCATTERED:
            h, w = h.to(tl.uint32), w.to(tl.uint32)
            hit = (h % DOWN == 0) & (w % RIGHT == 0)
            met = hit if EVEN else valid & hit
            wanted = met[:, None] & (c < C)[None, :]
            where = (n * tl.cdiv(g.height, DOWN) + h // DOWN) * tl.cdiv(g.width, RIGHT) + w // RIGHT
        more = load_rows(addend.image, (where * C)[:, None] + c[None, :], wanted)
        if addend.signs is not None:
            more = tl.where(load_signs(addend.signs, 0, where, first, met, C, ADDEND_WORD, BLOCK_P, BLOCK_C, FULL), more, 0.0)
        acc += more
    store_gradient(dx, acc, at, mask, y, vectors, partials, t, C, c)


def conv_dgrad(
    dy: Any, like: Tensor, unit: ConvBN, inner: Any, add: Any, *, config: tuple | None = None
) -> tuple[Tensor, Tensor | None, bool]:
    """Contract: fused_res/primitives/conv_dgrad.py. config: the fields of a `Config`; by default chosen by shape and GPU."""
    weight, (n, _, height, width) = unit.weight, like.shape
    channels = weight.shape[1]
    if like.shape[1] != channels:
        raise ValueError(f"like: expected {channels} channels, as the weight has, got {like.shape[1]}")
    g = geometry(height, width, unit)
    source = gradient(dy, (n, weight.shape[0], g.out_height, g.out_width), weight)
    dx = torch.empty(like.shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    pixels = n * cdiv(height, g.stride_h) * cdiv(width, g.stride_w)
    if config is None:
        plain = source.coefficients is None and inner is None and not unit.is_strided()
        light = weight.element_size() == 2 and unit.is_pointwise() and not unit.is_strided()
        area = 128 * 128 if plain else 128 * 64 if light else 64 * 64
        able = configurations("dgrad", weight.dtype, pixels * g.stride_h * g.stride_w, weight.shape, area=area)
        config = next(fitting("dgrad", able, weight, dy))
    config = Config(*config)
    tiles = cdiv(pixels, config.block_p) * g.stride_h * g.stride_w
    y, vectors, partials = None, None, None
    if inner is not None:
        y = check_image("inner", inner.image, like.shape, weight)
        vectors = check_dense("inner.vectors", inner.vectors, (5, channels), torch.float32, weight)
        fresh = torch.empty if tiles else torch.zeros
        partials = fresh(max(1, tiles), 2, channels, dtype=torch.float32, device=weight.device)
    addend = Addition(None, None) if add is None else _checked(add, like, weight)
    down, right = (1, 1) if add is None else add.stride
    launch(
        conv_dgrad_kernel,
        tiles * cdiv(channels, config.block_c),
        *(taps_first(weight), source, dx, addend, y, vectors, partials, g),
        *(step // gcd(step, dilation) for step, dilation in zip(unit.stride, unit.dilation, strict=True)),
        *(pixels, channels, weight.shape[0]),
        LIVE=source.coefficients is not None and dy.training,
        WORD=sign_word(source.signs, weight.shape[0], config.block_k),
        DOWN=down,
        RIGHT=right,
        ADDEND_WORD=sign_word(addend.signs, channels, config.block_c),
        **constants(config, unit, pixels),
    )
    return dx, partials, inner is not None


def _checked(add: Any, like: Tensor, weight: Tensor) -> Addition:
    """An `Addend` for a gradient of the shape of `like`."""
    down, right = add.stride
    n, c, h, w = *like.shape[:2], cdiv(like.shape[2], down), cdiv(like.shape[3], right)
    signs = add.signs
    if signs is not None:
        signs = check_dense("add.signs", signs, (n * h * w, cdiv(c, 8)), torch.uint8, weight)
    return Addition(check_image("add", add.image, (n, c, h, w), weight), signs)


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for case in meta_cases(dtype):
        n, c, h, w = case.x.shape
        inner = meta_activated(case)
        addend = SimpleNamespace(image=case.x, signs=meta(n * h * w, cdiv(c, 8), dtype=torch.uint8), stride=(1, 1))
        half = meta_image(n, c, cdiv(h, 2), cdiv(w, 2), dtype=dtype)

        def dgrad(name, mask, *epilogue, sample=False, case=case):
            arguments = (meta_gradient(case.dy, mask), case.x, case.unit, *epilogue)
            wide = {"loads": case.wide, "stores": case.wide}
            return variant(f"{name} {case.at}", conv_dgrad, *arguments, **wide, matrix=True, sample=sample)

        yield dgrad("masked, inner", "applied", inner, None, sample=case.main and case.unit.stride == (2, 2))
        yield dgrad("masked, addend", "applied", None, addend)
        if case.main:
            yield dgrad("outer, inner", "signs", inner, None, sample=case.unit.weight.shape[2] == 1)
            yield dgrad("open by y, inner", "y", inner, None)
            yield dgrad("plain", "none", None, None)
            yield dgrad("plain, inner", "none", inner, None)
            yield dgrad("masked, strided addend", "applied", None, SimpleNamespace(image=half, signs=None, stride=(2, 2)))


def aot_tiles(dtype: torch.dtype) -> Iterator[Variant]:
    """The variant that needs the most registers, with every tile that tuning tries."""
    for case, (dy,), config, name in meta_tiles("dgrad", dtype, lambda case: (meta_gradient(case.dy, "signs"),)):
        inner = meta_activated(case)
        yield variant(name, conv_dgrad, dy, case.x, case.unit, inner, None, config=config, loads=True, stores=True, matrix=True)
