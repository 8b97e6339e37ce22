"""What the CUDA C++ kernels that multiply do for a 1x1 convolution: the bytes that they move, their blocks, and the steps of these.

The sizes of tiles and of parts are those of csrc/cuda/.
"""

from typing import NamedTuple

DEPTH = 64
"""Bytes of each line that a step of a loop takes; where sums go over pixels, so many bytes of a column."""


class Layer(NamedTuple):
    """A 1x1 convolution at batch 256: pixels, input channels, those of a projection, output channels."""

    pixels: int
    depth: int
    depth2: int
    channels: int


STAGES = (Layer(256 * 56 * 56, 64, 64, 256), Layer(256 * 28 * 28, 128, 256, 512))
"""The last ones of ResNet-50's stages 1 and 2."""


class Work(NamedTuple):
    """bytes: each tensor once, the weights none, which stay in the cache. steps: of each loop that multiplies, in their order."""

    bytes: float
    blocks: int
    steps: tuple[int, ...]


def _over(size: int, step: int) -> int:
    return -(-size // step)


def _parts(pixels: int, blocks: int, least: int, most: int) -> int:
    """Pixels of a part, where `blocks` blocks share each and about 256 are wanted."""
    return min(max(_over(pixels * blocks, 256), least), most) // 32 * 32


def _fprop(layer: Layer, size: int, rows: int, columns: int) -> Work:
    blocks = _over(layer.pixels, rows) * _over(layer.channels, columns)
    moved = size * layer.pixels * (layer.depth + layer.channels)
    return Work(moved, blocks, (_over(layer.depth * size, DEPTH),))


def _tail(layer: Layer, size: int, rows: int, columns: int) -> Work:
    found = _fprop(layer, size, rows, columns)
    return found._replace(bytes=found.bytes + layer.pixels * layer.channels * (size + 1 / 8))


def _tail_projection(layer: Layer, size: int, rows: int, columns: int) -> Work:
    found = _fprop(layer, size, rows, columns)
    moved = found.bytes + layer.pixels * (layer.channels / 8 + size * layer.depth2)
    return Work(moved, found.blocks, (*found.steps, _over(layer.depth2 * size, DEPTH)))


def _moments(layer: Layer, size: int, rows: int, columns: int) -> Work | None:
    if rows != (64 if layer.depth <= 64 else 128):
        return None
    across = _over(layer.depth, columns)
    pairs = across * (across + 1) // 2
    part = _parts(layer.pixels, pairs, 256, 1024)
    parts = _over(layer.pixels, part)
    moved = size * layer.pixels * layer.depth + 4 * parts * (2 * layer.depth + layer.depth**2)
    return Work(moved, parts * pairs, (_over(part * size, 2 * DEPTH),))


def _reduce(layer: Layer, size: int, rows: int, columns: int) -> Work | None:
    taken = (64, 64) if layer.channels <= 64 else (128, 64 if layer.depth <= 64 else 128)
    if (rows, columns) != taken:
        return None
    across = _over(layer.depth, columns)
    part = _parts(layer.pixels, _over(layer.channels, 128) * _over(layer.depth, 128), 128, 2048)
    parts = _over(layer.pixels, part)
    moved = layer.pixels * (size * (layer.depth + layer.channels) + layer.channels / 8)
    moved += 4 * parts * (layer.depth + layer.channels * (2 + layer.depth))
    return Work(moved, parts * _over(layer.channels, rows) * across, (_over(part * size, DEPTH),))


def _apply(layer: Layer, size: int, rows: int, columns: int) -> Work | None:
    if columns != (64 if layer.depth <= 64 else 128):
        return None
    blocks = _over(layer.pixels, rows) * _over(layer.depth, columns)
    moved = layer.pixels * (size * (layer.channels + 2 * layer.depth) + layer.channels / 8)
    return Work(moved, blocks, (_over(layer.channels * size, DEPTH), _over(layer.depth * size, DEPTH)))


_KINDS = {
    "pointwise_fprop": _fprop,
    "pointwise_tail": _tail,
    "pointwise_tail, projection": _tail_projection,
    "moments": _moments,
    "pointwise_tail_backward_reduce": _reduce,
    "pointwise_tail_backward_apply": _apply,
}


def work(kernel: str, layer: Layer, size: int, tile: tuple[int, int]) -> Work | None:
    """What a kernel does with elements of `size` bytes and a tile of rows x columns, in training.

    None for kernels that do not multiply in tensor cores, and where another tile is taken.
    """
    kind = _KINDS.get(kernel)
    return None if kind is None else kind(layer, size, *tile)
