"""Tiles of the convolutions' kernels: those worth measuring, what shared memory they take, and which fit a GPU."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res.kernels.tiling import ProductTile, alignment, cdiv, dot_precision, limits, next_power_of_2
from fused_res.spec import ConvBN


class Config(NamedTuple):
    """What a program takes at once: pixels, output and input channels of the convolution; its warps, and its loop's stages."""

    block_p: int
    block_k: int
    block_c: int
    warps: int
    stages: int


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
        key = tile.rows * tile.columns > area, wide, -min(programs, PROGRAMS)
        # What a larger tile comes to, of few channels, may be one of the table itself, and is judged as that; but for wgrad, where
        # larger tiles compute less of what they read.
        known = fitted.get(config, key)
        fitted[config] = known if direction == "wgrad" else min(key, known)
    return sorted(fitted, key=fitted.get)


def _side(operand: Any, rows: int, columns: int, itemsize: int, stages: int) -> int:
    """Shared memory of one side of the product, of which a step takes [rows, columns]: an operand, or None for the weight.

    What it follows from is copied ahead, for every step but the one at work. What is computed from that passes through shared
    memory once more, unless nothing is masked.
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
    if direction == "dgrad" and weight.dtype == torch.float32 and weight.shape[2] * weight.shape[3] > 1:
        # On the way through taps, IEEE sums and what becomes of them leave registers for no more.
        results = min(results, 32) if dot_precision(weight) == "ieee" else results

    def fits(config: Config) -> bool:
        p, k, c, warps, _ = config
        rows, columns = {"fprop": (p, k), "dgrad": (p, c), "wgrad": (k, c)}[direction]
        enough = rows * columns <= 32 * warps * results
        return enough and shared_bytes(direction, config, weight.element_size(), *operands) <= shared

    return filter(fits, configs)


def constants(config: Config, unit: ConvBN, pixels: int) -> dict[str, Any]:
    """What the kernels of this convolution are compiled for; pixels: those that are cut into blocks.

    FULL: channels fill their blocks. EVEN: pixels do so, too, of a product of the input as it lies: nothing has to be masked.
    """
    k, c, r, s = unit.weight.shape
    pointwise, full = unit.is_pointwise() and not unit.is_strided(), k % config.block_k == c % config.block_c == 0
    return {
        "R": r,
        "S": s,
        "POINTWISE": pointwise,
        "EVEN": pointwise and full and pixels % config.block_p == 0,
        "FULL": full,
        "ALIGN_C": alignment(c),
        "ALIGN_K": alignment(k),
        "PRECISION": dot_precision(unit.weight),
        "BLOCK_P": config.block_p,
        "BLOCK_K": config.block_k,
        "BLOCK_C": config.block_c,
        "STAGES": config.stages,
        "warps": config.warps,
    }
