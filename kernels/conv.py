"""What the convolution kernels share: where pixels lie, what operands become on their way in, and tile configurations.

All three directions are one implicit matrix product over NHWC images: rows are pixels, columns are channels, and what is summed
over runs through the taps of the filter and the channels of the other side (fprop, dgrad) or through the pixels (wgrad).
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_res.kernels.common import (
    ProductTile,
    activate,
    affine,
    alignment,
    cdiv,
    dot_precision,
    is_open,
    limits,
    load_row,
    load_rows,
    meta,
    narrow,
    next_power_of_2,
    through_bn,
)
from fused_res.spec import ConvBN


class Source(NamedTuple):
    """An image [N, C, H, W] that a convolution reads, and what becomes of it on the way.

    Without `coefficients` an `Activation`: `relu(scale * image + shift)` with `vectors`, the image without. With them a `Gradient`:
    the ReLU's signs are the bits of `signs`, or those of `scale * y + shift` with `vectors`; without either the image is
    masked already.
    """

    image: Tensor
    y: Tensor | None
    vectors: Tensor | None
    coefficients: Tensor | None
    signs: Tensor | None


class Geometry(NamedTuple):
    """Sizes and steps of a convolution, height first."""

    height: int
    width: int
    out_height: int
    out_width: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int


@triton.jit
def decode(first, H, W, BLOCK_P: tl.constexpr):
    """Image, row and column of BLOCK_P pixels of H x W images, from pixel `first` on; the image in 64 bits."""
    n = first // (H * W)
    q = (first - n * (H * W)).to(tl.int32) + tl.arange(0, BLOCK_P)
    return n + q // (H * W), q % (H * W) // W, q % W


@triton.jit
def load_signs(signs, place, first, inside, C, WORD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sign bits [BLOCK_P, BLOCK_C] as booleans, of pixels `place` and channels from `first` on, in words of WORD bits."""
    words = signs
    if WORD == 32:  # wide enough for asynchronous copies
        words = signs.to(tl.pointer_type(tl.uint32))
    S = (C + WORD - 1) // WORD
    b = first // WORD + tl.arange(0, BLOCK_C // WORD)
    bits = tl.load(words + place[:, None] * S + b[None, :], mask=inside[:, None] & (b < S)[None, :], other=0)
    grouped = (bits.to(tl.uint32)[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1
    return tl.reshape(grouped, (BLOCK_P, BLOCK_C)) != 0


@triton.jit
def read(
    source,
    place,
    base,
    inside,
    first,
    C,
    LIVE: tl.constexpr,
    WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The source [BLOCK_P, BLOCK_C] at pixels `place`, whose first channels lie at `base`, and at channels from `first` on.

    0 where not inside: padding comes after the ReLU, and behind the last pixel there is nothing. LIVE: the gradient's BN used
    the batch's statistics; where not, y only gives signs.
    """
    c = first + tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (c < C)[None, :]
    at = base[:, None] + c[None, :]
    value = tl.load(source.image + at, mask=mask, other=0.0)
    if source.coefficients is not None:
        g = value.to(tl.float32)
        v = g
        if LIVE or source.vectors is not None:
            v = load_rows(source.y, at, mask)
        if source.signs is not None:
            g = tl.where(load_signs(source.signs, place, first, inside, C, WORD, BLOCK_P, BLOCK_C), g, 0.0)
        elif source.vectors is not None:
            scale, shift = load_row(source.vectors, 3, C, c), load_row(source.vectors, 4, C, c)
            g = tl.where(is_open(affine(v, scale[None, :], shift[None, :])), g, 0.0)
        value = tl.where(inside[:, None], through_bn(g, v, source.coefficients, C, c, LIVE), 0.0)
    elif source.vectors is not None:
        v = activate(value.to(tl.float32), source.vectors, C, c)
        value = tl.where(inside[:, None], v, 0.0)
    return narrow(value, source.image.dtype.element_ty, PRECISION)


@triton.jit
def implicit_gemm(
    source,
    pixels,
    size,
    taps,
    filters,
    LIVE: tl.constexpr,
    WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`sum over taps and d of source[pixel moved by the tap, d] * weight[tap, d, j]`, [BLOCK_P, BLOCK_J] in float32.

    pixels: numbers, rows and columns of the source's pixels under the first tap, and which of them count.
    size: height, width and channels of the source.
    taps: how many, how many to a row, and how far down and right from one to the next.
    filters: the weight, its first tap, how many taps on the next one down and right lie, and the strides of taps and of d and j;
    then j and its end.
    """
    place, h, w, valid = pixels
    H, W, D = size
    count, across, down, right = taps
    weight, first, step_down, step_right, stride_tap, stride_d, stride_j, j, J = filters
    wide = tl.cast(D, tl.int64)  # a size of 1 is a constant
    base = place * wide
    # Where no tap belongs to these pixels the loop does not run, but what precedes it may divide.
    taps_in_all, taps_in_a_row = tl.maximum(count, 1), tl.maximum(across, 1)
    columns = weight + j.to(tl.int64) * stride_j
    acc = tl.zeros((BLOCK_P, BLOCK_J), tl.float32)
    for i in tl.range(0, count * tl.cdiv(D, BLOCK_D), num_stages=STAGES):
        block, tap = i // taps_in_all * BLOCK_D, i % taps_in_all
        a, b = tap // taps_in_a_row, tap % taps_in_a_row
        inside = valid & ((h + a * down).to(tl.uint32) < H) & ((w + b * right).to(tl.uint32) < W)  # below 0 is far above
        move = a * down * W + b * right
        rows = read(source, place + move, base + move * wide, inside, block, D, LIVE, WORD, PRECISION, BLOCK_P, BLOCK_D)
        d = block + tl.arange(0, BLOCK_D)
        filter = (first + a * step_down + b * step_right) * stride_tap
        at = (d.to(tl.int64) * stride_d + filter)[:, None] + columns[None, :]
        factors = tl.load(at, mask=(d < D)[:, None] & (j < J)[None, :], other=0.0)
        acc = tl.dot(rows, narrow(factors, weight.dtype.element_ty, PRECISION), acc, input_precision=PRECISION)
    return acc


# Pixels of an image, padding included: places within an image, and from there on within a part of all, take 32 bits.
_PIXELS = 2**30 - 1024


class Config(NamedTuple):
    """What a program takes at once: pixels, output and input channels of the convolution; its warps, and its loop's stages."""

    block_p: int
    block_k: int
    block_c: int
    warps: int
    stages: int


def check_image(name: str, image: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The image in channels_last, copied where it is not; raises unless it has this shape, and the dtype and device of `like`."""
    if tuple(image.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(image.shape)}")
    if image.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, as the weight has, got {image.dtype}")
    if image.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {image.device}")
    return image.contiguous(memory_format=torch.channels_last)


def check_dense(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """The tensor itself; raises unless it is contiguous, of this shape and dtype, and on the device of `like`."""
    if tensor is None:
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got None")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != like.device or not tensor.is_contiguous():
        got = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"{name}: expected a contiguous {dtype} {shape} on {like.device}, got {got}")
    return tensor


def activation(x: Any, weight: Tensor) -> Source:
    """The kernels' view of an `Activation` in front of this weight."""
    shape = (x.image.shape[0], weight.shape[1], *x.image.shape[2:])
    vectors = None if x.vectors is None else check_dense("x.vectors", x.vectors, (5, weight.shape[1]), torch.float32, weight)
    return Source(check_image("x", x.image, shape, weight), None, vectors, None, None)


def gradient(dy: Any, shape: tuple[int, ...], weight: Tensor) -> Source:
    """The kernels' view of a `Gradient` of this shape."""
    image = check_image("dy", dy.image, shape, weight)
    if dy.coefficients is None:
        return Source(image, None, None, None, None)
    n, k, h, w = shape
    y, vectors, signs = None, None, None
    if not dy.masked and dy.signs is not None:
        signs = check_dense("dy.signs", dy.signs, (n * h * w, cdiv(k, 8)), torch.uint8, weight)
    elif not dy.masked:
        vectors = check_dense("dy.vectors", dy.vectors, (5, k), torch.float32, weight)
    if dy.training or vectors is not None:
        if dy.y is None:
            raise ValueError(f"dy.y: expected an image of shape {tuple(shape)}, got None")
        y = check_image("dy.y", dy.y, shape, weight)
    coefficients = check_dense("dy.coefficients", dy.coefficients, (7, k), torch.float32, weight)
    return Source(image, y, vectors, coefficients, signs)


def sign_word(signs: Tensor | None, channels: int, block: int) -> int:
    """In how many bits the kernels read sign bits at a time: 32 where rows and blocks consist of such words, 8 elsewhere."""
    return 32 if signs is not None and channels % 32 == 0 and block % 32 == 0 and signs.data_ptr() % 4 == 0 else 8


def geometry(height: int, width: int, unit: ConvBN) -> Geometry:
    """Sizes and steps of the unit's convolution over images of this size."""
    out = unit.output_size(height, width)
    if min(out) < 1:
        raise ValueError(f"x: expected images no smaller than the filter, got {height} x {width}")
    padded = height + 2 * unit.padding[0], width + 2 * unit.padding[1]
    for h, w in (padded, out):
        if h * w > _PIXELS:
            raise ValueError(f"x: expected images of less than 2^30 pixels, got {h} x {w}")
    return Geometry(height, width, *out, *unit.stride, *unit.padding, *unit.dilation)


def taps_first(weight: Tensor) -> Tensor:
    """The weight [K, C, R, S] as [K, R, S, C], which a channels_last weight is already."""
    return weight.permute(0, 2, 3, 1).contiguous()


# By preference, for 2-byte and 4-byte activations; 1x1 of 2 bytes as measured on an H200 (benchmarks.tiles). Filters with several
# taps keep to 4 warps: with 8, Triton has been seen to miscompile loops that run through taps and channels together
# (https://github.com/pytorch/pytorch/issues/173068).
_POINTWISE = {
    2: (
        ProductTile(128, 128, 64, 4, 3),
        ProductTile(64, 128, 32, 4, 4),
        ProductTile(128, 64, 64, 4, 3),
        ProductTile(64, 128, 64, 4, 3),
        ProductTile(64, 64, 64, 4, 3),
        ProductTile(128, 128, 64, 8, 3),
    ),
    4: (ProductTile(128, 128, 32, 8, 3), ProductTile(128, 64, 32, 4, 3), ProductTile(64, 64, 32, 4, 3)),
}
_TAPS = {
    2: (ProductTile(128, 64, 32, 4, 4), ProductTile(64, 64, 32, 4, 4), ProductTile(64, 64, 64, 4, 3)),
    4: (ProductTile(64, 64, 32, 4, 3), ProductTile(128, 64, 16, 4, 4)),
}
# Programs that occupy the largest GPUs, about.
PROGRAMS = 264


def configurations(
    direction: str, dtype: torch.dtype, pixels: int, weight_shape: tuple[int, ...], *, area: int = 128 * 128
) -> list[Config]:
    """The tiles worth measuring for a convolution in this direction ("fprop", "dgrad" or "wgrad"); the first that is `fitting` is
    the default.

    pixels: of the result; for wgrad, of the output. weight_shape: [K, C, R, S]. area: tiles of at most this many results come
    first, for kernels that need many registers beside them; then tiles with no more columns than there are channels.
    """
    k, c = (max(16, next_power_of_2(channels)) for channels in weight_shape[:2])
    table = _POINTWISE if tuple(weight_shape[2:]) == (1, 1) else _TAPS
    fitted: dict[Config, tuple[bool, bool, int]] = {}
    for tile in table[dtype.itemsize]:
        if direction == "fprop":
            config = Config(tile.rows, min(tile.columns, k), min(tile.depth, c), *tile[3:])
            programs, wide = cdiv(pixels, config.block_p) * cdiv(k, config.block_k), tile.columns > k
        elif direction == "dgrad":
            config = Config(tile.rows, min(tile.depth, k), min(tile.columns, c), *tile[3:])
            programs, wide = cdiv(pixels, config.block_p) * cdiv(c, config.block_c), tile.columns > c
        elif tile.columns > tile.rows:  # spills in float16 on compute capability 9.0, where both operands are computed
            continue
        else:  # parts of the pixels make up for few blocks
            config = Config(tile.depth, min(tile.rows, k), min(tile.columns, c), *tile[3:])
            programs, wide = PROGRAMS, tile.rows > k or tile.columns > c
        fitted.setdefault(config, (tile.rows * tile.columns > area, wide, -min(programs, PROGRAMS)))
    return sorted(fitted, key=fitted.get)


def _side(operand: Any, rows: int, columns: int, itemsize: int, stages: int) -> int:
    """Shared memory of one side of the product, of which a step takes [rows, columns]: an operand, or None for the weight.

    What it follows from is copied ahead, for every step but the one at work. What is computed from that passes through shared
    memory once more.
    """
    images, bits, vectors = 1, 0, 0
    if getattr(operand, "coefficients", None) is not None:
        by_y = not operand.masked and operand.signs is None
        images, bits = 1 + (operand.training or by_y), int(not operand.masked and not by_y)
        vectors = 5 if by_y else 3
    elif getattr(operand, "vectors", None) is not None:
        vectors = 2
    block = rows * columns * itemsize
    ahead = images * block + bits * rows * columns // 8 + vectors * columns * 4
    return (stages - 1) * ahead + (block if vectors else 0)


def shared_bytes(direction: str, config: Config, itemsize: int, *operands: Any) -> int:
    """Shared memory that a block of a convolution's kernel takes at most, on GPUs that multiply in `mma` instructions.

    Those with `wgmma` or `tcgen05` keep up to one step more on each side, and have the room.
    """
    p, k, c, _, stages = config
    if direction == "wgrad":
        dy, x = operands
        return _side(dy, p, k, itemsize, stages) + _side(x, p, c, itemsize, stages)
    depth, columns = (c, k) if direction == "fprop" else (k, c)
    return _side(operands[0], p, depth, itemsize, stages) + _side(None, depth, columns, itemsize, stages)


def fitting(direction: str, configs: list[Config], weight: Tensor, *operands: Any) -> Iterator[Config]:
    """Those of the tiles for which the weight's GPU has enough shared memory and registers, with these operands: x, dy, or dy
    and x.
    """
    shared, results = limits(weight.device)

    def fits(config: Config) -> bool:
        p, k, c, warps, _ = config
        rows, columns = {"fprop": (p, k), "dgrad": (p, c), "wgrad": (k, c)}[direction]
        enough = rows * columns <= 32 * warps * results
        return enough and shared_bytes(direction, config, weight.element_size(), *operands) <= shared

    return filter(fits, configs)


def constants(config: Config, unit: ConvBN) -> dict[str, Any]:
    """What the kernels of this convolution are compiled for."""
    k, c, r, s = unit.weight.shape
    return {
        "R": r,
        "S": s,
        "POINTWISE": (r, s) == (1, 1) and tuple(unit.stride) == (1, 1) and tuple(unit.padding) == (0, 0),
        "ALIGN_C": alignment(c),
        "ALIGN_K": alignment(k),
        "PRECISION": dot_precision(unit.weight),
        "BLOCK_P": config.block_p,
        "BLOCK_K": config.block_k,
        "BLOCK_C": config.block_c,
        "STAGES": config.stages,
        "warps": config.warps,
    }


class MetaCase(NamedTuple):
    """A convolution without data to compile ahead of time; of the `main` ones, all variants.

    wide: whether vectors of 16 bytes never cross a row's end. at: the shape, for the variant's name.
    """

    unit: ConvBN
    x: Tensor
    dy: Tensor
    at: str
    wide: bool
    main: bool


def meta_image(*shape: int, dtype: torch.dtype) -> Tensor:
    """A channels_last image without data."""
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)


def meta_cases(dtype: torch.dtype) -> Iterator[MetaCase]:
    """Convolutions of ResNets, and ragged ones."""
    for n, c, k, size, r, stride, main in (
        (32, 256, 64, 56, 1, 1, True),
        (32, 64, 64, 56, 3, 1, True),
        (32, 128, 128, 56, 3, 2, True),
        (32, 256, 512, 56, 1, 2, False),
        (2, 512, 512, 7, 3, 1, False),
        (8, 20, 13, 9, 3, 2, False),
        (1, 3, 5, 7, 7, 2, False),
        (1, 1, 1, 1, 3, 1, False),
    ):
        weight = meta_image(k, c, r, r, dtype=dtype)
        unit = ConvBN(weight, stride=(stride, stride), padding=(r // 2, r // 2))
        dy = meta_image(n, k, *unit.output_size(size, size), dtype=dtype)
        at = f"{n}x{c}x{size}x{size} {k}x{r}x{r}/{stride}"
        yield MetaCase(unit, meta_image(n, c, size, size, dtype=dtype), dy, at, c % 16 == 0, main)


def meta_tiles(
    direction: str, dtype: torch.dtype, operands: Callable[[MetaCase], tuple]
) -> Iterator[tuple[MetaCase, tuple, Config, str]]:
    """The `main` cases, what `operands` makes of each, every tile worth measuring for that, and a variant's name."""
    for case in meta_cases(dtype):
        if case.main:
            made, weight, image = operands(case), case.unit.weight, case.x if direction == "dgrad" else case.dy
            configs = configurations(direction, dtype, image.numel() // image.shape[1], weight.shape)
            for config in fitting(direction, configs, weight, *made):
                yield case, made, config, f"{' '.join(map(str, config))} {case.at}"


def meta_activated(case: MetaCase) -> Any:
    """The case's x without data, with BN and ReLU still to be applied."""
    return SimpleNamespace(image=case.x, vectors=meta(5, case.x.shape[1]))


def meta_gradient(dy: Tensor, mask: str) -> Any:
    """A `Gradient` without data, whose mask is "signs", "y", "applied" already, or, with nothing to apply at all, "none"."""
    n, k, h, w = dy.shape
    fields: dict[str, Any] = {"y": dy, "vectors": None, "coefficients": meta(7, k), "signs": None}
    if mask == "none":
        fields |= {"y": None, "coefficients": None}
    elif mask == "signs":
        fields["signs"] = meta(n * h * w, cdiv(k, 8), dtype=torch.uint8)
    elif mask == "y":
        fields["vectors"] = meta(5, k)
    return SimpleNamespace(image=dy, **fields, masked=mask == "applied", training=True)
