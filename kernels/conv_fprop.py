"""Triton kernel of `conv_fprop`."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.ahead import Variant, meta, variant
from fused_res.kernels.arguments import activation, check_dense, check_image, geometry, taps_first
from fused_res.kernels.conv_cases import meta_activated, meta_cases, meta_tiles
from fused_res.kernels.conv_tiling import Config, configurations, constants, fitting
from fused_res.kernels.device import (
    SCALE,
    SHIFT,
    add_shortcut,
    affine,
    aligned,
    apart,
    first_row,
    load_row,
    offset,
    relu,
    sum_rows,
    widen,
    within,
)
from fused_res.kernels.implicit_gemm import decode, implicit_gemm
from fused_res.kernels.launching import launch
from fused_res.kernels.tiling import cdiv
from fused_res.spec import ConvBN


@triton.jit
def _sum(v, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums over the rows of [1, BLOCK_P, BLOCK_K]. A thread that has a whole column makes eight sums of it first, which need not
    wait for each other.
    """
    return sum_rows(tl.reshape(v, (BLOCK_P // 8, 8, BLOCK_K)))


@triton.jit
def conv_fprop_kernel(
    weight,
    x,
    y,
    partials,
    after,
    skip,
    y2,
    vectors2,
    g,
    P,
    C,
    K,
    RELU: tl.constexpr,
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
    """y = x through the weight; with `partials` mean and centred squares of each tile, with `after`, skip or RELU on to the end.

    weight: [K, R, S, C]. x: a `Source`, its image [N, H, W, C], its vectors [5, C], float32, or None. y, and skip or y2 or neither:
    [N, H', W', K]. partials: [T, 2, K], after, vectors2: [5, K], float32, each or None. P: N * H' * W'.
    """
    C, K = aligned(C, ALIGN_C), aligned(K, ALIGN_K)
    across = tl.cdiv(K, BLOCK_K)
    t = tl.program_id(0) // across
    first = tl.program_id(0) % across * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    p, row = tl.arange(0, BLOCK_P), first_row(t, BLOCK_P)
    left = tl.minimum(P - row, BLOCK_P).to(tl.int32)
    origin, place, h, w = row, p, 0, 0
    if not POINTWISE:
        n, h, w = decode(row, g.out_height, g.out_width, p)
        h, w = h * g.stride_h - g.padding_h, w * g.stride_w - g.padding_w
        origin, place = 0, (n * g.height + h) * g.width + w
    acc = implicit_gemm(
        x,
        (origin, place, h, w, p < left),
        (g.height, g.width, C),
        (R * S, S, g.dilation_h, g.dilation_w),
        (weight, 0, S, 1, C, 1, R * S * C, first, K),
        False,
        8,
        True,
        POINTWISE,
        EVEN,
        FULL,
        PRECISION,
        BLOCK_P,
        BLOCK_C,
        BLOCK_K,
        STAGES,
    )

    start, at, mask = offset(row, K), p[:, None] * K + k[None, :], None
    if not EVEN:
        mask = within(p, left, k, K)
    if after is not None:
        acc = affine(acc, load_row(after, SCALE, K, k)[None, :], load_row(after, SHIFT, K, k)[None, :])
    acc = add_shortcut(acc, skip, y2, vectors2, start, at, mask, K, k)
    if RELU:
        acc = relu(acc)
    stored = acc.to(y.dtype.element_ty)
    if partials is None:
        tl.store(y + start + at, stored, mask=mask)
    else:
        # Of the values as they are stored.
        stored = apart(stored)
        v = widen(stored)
        if EVEN:
            tl.store(y + start + apart(at), stored)
            mean = _sum(v, BLOCK_P, BLOCK_K) * (1 / BLOCK_P)
            v -= mean[None, None, :]
        else:
            mask = apart(mask)
            tl.store(y + start + apart(at), stored, mask=mask)
            mean = _sum(tl.where(mask, v, 0.0), BLOCK_P, BLOCK_K) / left
            v = tl.where(mask, v - mean[None, None, :], 0.0)
        start = partials + offset(t * 2, K)
        tl.store(start + k, mean, mask=k < K)
        tl.store(start + K + k, _sum(v * v, BLOCK_P, BLOCK_K), mask=k < K)


def _checked(output: Any, shape: tuple[int, ...], weight: Tensor) -> tuple[Tensor | None, ...]:
    """The fields of an `Output` for a convolution's output of this shape."""
    skip, y2 = output.skip, output.y2
    vectors = output.vectors
    if vectors is not None:
        check_dense("output.vectors", vectors, (5, shape[1]), torch.float32, weight)
    elif output.relu or skip is None:
        raise ValueError("output.vectors: expected a tensor with a ReLU, and where there is no skip")
    if skip is not None and y2 is not None:
        raise ValueError("output.skip: expected either skip or y2, got both")
    if skip is not None:
        return vectors, check_image("output.skip", skip, shape, weight), None, None
    if y2 is None:
        return vectors, None, None, None
    vectors2 = check_dense("output.vectors2", output.vectors2, (5, shape[1]), torch.float32, weight)
    return vectors, None, check_image("output.y2", y2, shape, weight), vectors2


def conv_fprop(
    x: Any, unit: ConvBN, statistics: bool, output: Any, *, config: tuple | None = None
) -> tuple[Tensor, Tensor | None, int]:
    """Contract: fused_res/primitives/conv_fprop.py. config: the fields of a `Config`; by default chosen by shape and GPU."""
    weight, source = unit.weight, activation(x, unit.weight)
    (channels_out, channels), (n, _, height, width) = weight.shape[:2], source.image.shape
    g = geometry(height, width, unit)
    pixels = n * g.out_height * g.out_width
    if config is None:
        sampled = source.vectors is not None and (g.stride_h, g.stride_w) != (1, 1)
        area = 64 * 64 if output is not None and output.y2 is not None else 128 * 64 if sampled else 128 * 128
        config = next(fitting("fprop", configurations("fprop", weight.dtype, pixels, weight.shape, area=area), weight, x))
    config = Config(*config)
    tiles = cdiv(pixels, config.block_p)
    shape = (n, channels_out, g.out_height, g.out_width)
    y = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    partials = None
    if statistics:
        if not pixels:
            raise ValueError("y: expected at least one row, got none")
        partials = torch.empty(tiles, 2, channels_out, dtype=torch.float32, device=weight.device)
    after = (None, None, None, None) if output is None else _checked(output, shape, weight)
    ends = output is not None and output.relu
    launch(
        conv_fprop_kernel,
        tiles * cdiv(channels_out, config.block_k),
        *(taps_first(weight), source, y, partials, *after, g, pixels, channels, channels_out),
        RELU=ends,
        **constants(config, unit, pixels),
    )
    return y, partials, config.block_p if statistics else 0


def _output(
    vectors: Tensor | None,
    skip: Tensor | None = None,
    y2: Tensor | None = None,
    vectors2: Tensor | None = None,
    relu: bool = True,
) -> Any:
    return SimpleNamespace(vectors=vectors, skip=skip, y2=y2, vectors2=vectors2, relu=relu)


def aot_variants(dtype: torch.dtype) -> Iterator[Variant]:
    for case in meta_cases(dtype):
        k = case.dy.shape[1]
        plain, activated = SimpleNamespace(image=case.x, vectors=None), meta_activated(case)

        def fprop(name, *arguments, sample=False, case=case):
            wide = {"loads": case.wide, "stores": case.wide}
            return variant(f"{name} {case.at}", conv_fprop, *arguments, **wide, matrix=True, sample=sample)

        yield fprop("activated, statistics", activated, case.unit, True, None, sample=case.main and case.unit.stride != (2, 2))
        yield fprop("evaluation, second", plain, case.unit, False, _output(meta(5, k), y2=case.dy, vectors2=meta(5, k)))
        if case.main:
            yield fprop("plain", plain, case.unit, False, None)
            yield fprop("statistics", plain, case.unit, True, None)
            yield fprop("evaluation, skip", plain, case.unit, False, _output(meta(5, k), skip=case.dy))
            yield fprop("activated, sum", activated, case.unit, False, _output(None, skip=case.dy, relu=False))


def aot_tiles(dtype: torch.dtype) -> Iterator[Variant]:
    """The variant that needs the most registers, with every tile that tuning tries."""
    for case, (x,), config, name in meta_tiles("fprop", dtype, lambda case: (meta_activated(case),)):
        yield variant(name, conv_fprop, x, case.unit, True, None, config=config, loads=True, stores=True, matrix=True)
