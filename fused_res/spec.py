"""What a residual block is made of, and how that travels through an operator's schema.

The operator takes tensors and plain numbers only. `pack` turns a list of `ConvBN` into the tensors that are present, one row of
integers per unit and one epsilon per unit; `unpack` is its inverse.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """What `torch.nn.functional.conv2d` takes for two numbers, as a pair: one number, or a sequence of one or two.

    Raises:
        TypeError: anything but integers.
        RuntimeError: a sequence of another length.
    """
    if not isinstance(value, (tuple, list)):
        value = (value,)
    if len(value) not in (1, 2):
        raise RuntimeError(f"expected {name} to be a single integer value or a list of 2 values, got {value!r}")
    return tuple(_integer(v, name) for v in (value if len(value) == 2 else value * 2))


def _integer(value: int, name: str) -> int:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected integers, got {type(value).__name__}")
    return operator.index(value)


class ConvBN(NamedTuple):
    """A 2-D convolution followed by batch normalisation, as tensors and numbers.

    `training=True` normalises with the batch's statistics and updates `running_mean`/`running_var` where they are given, as
    `torch.nn.functional.batch_norm` does; `training=False` normalises with the running statistics, which must then be given.
    `momentum=None` is the cumulative average of `nn.BatchNorm2d` and needs `num_batches_tracked`, which is incremented where
    it is given and `training` is set.

    Shapes: `weight` [K, C / groups, R, S]; every other tensor [K], but `num_batches_tracked`, a scalar of dtype int64.
    """

    weight: Tensor
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the convolution's output for an input of this height and width."""
        _, _, r, s = self.weight.shape
        (down, right), (top, left), (dr, ds) = self.stride, self.padding, self.dilation
        return (height + 2 * top - dr * (r - 1) - 1) // down + 1, (width + 2 * left - ds * (s - 1) - 1) // right + 1


class AvgPool(NamedTuple):
    """Average pooling in front of a projection (ResNet-D, https://arxiv.org/abs/1812.01187), with `nn.AvgPool2d`'s meaning."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after pooling; with `ceil_mode` no window starts in the padding on the far side."""
        sizes = []
        for size, kernel, stride, padding in zip((height, width), self.kernel_size, self.stride, self.padding, strict=True):
            out = (size + 2 * padding - kernel + (stride - 1 if self.ceil_mode else 0)) // stride + 1
            sizes.append(out - 1 if self.ceil_mode and (out - 1) * stride >= size + padding else out)
        return tuple(sizes)


class Block(NamedTuple):
    """The parts of one block: `main` in order, and the shortcut.

    The shortcut is `projection`, with `pool` in front of it if there is one; or, if `given`, a tensor that the caller made; or
    else the identity.
    """

    main: Sequence[ConvBN]
    projection: ConvBN | None = None
    pool: AvgPool | None = None
    given: bool = False

    def units(self) -> list[ConvBN]:
        """All of them, the projection last. No property: torch.compile of torch 2.10 follows none of a named tuple."""
        return [*self.main, self.projection] if self.projection is not None else list(self.main)


# The tensors of a unit that reach the operator, in this order. A live BN's running statistics do not: they are written after
# the call, so keeping them for backward would let the next forward invalidate it.
_TENSORS = ConvBN._fields[:6]
_HEAD = 4  # main units, projections, pools, given shortcuts
_NUMBERS = 8  # stride, padding, dilation (2 each), groups, training; then one presence flag for each of _TENSORS
_ROW = _NUMBERS + len(_TENSORS)
_POOL = 8  # kernel, stride, padding (2 each), ceil_mode, count_include_pad


def tensors_of(unit: ConvBN) -> tuple[Tensor | None, ...]:
    """The fields of `_TENSORS` that reach the operator."""
    running = (None, None) if unit.training else (unit.running_mean, unit.running_var)
    return (unit.weight, unit.bias, unit.gamma, unit.beta, *running)


def pack(block: Block) -> tuple[list[Tensor], list[int], list[float]]:
    """Tensors, integers and epsilons from which `unpack` restores the block.

    Integers: number of main units; 1 if there is a projection; 1 if there is a pool; 1 if the shortcut is given; the rows of
    all units; the pool's row.
    """
    tensors: list[Tensor] = []
    numbers = [len(block.main), int(block.projection is not None), int(block.pool is not None), int(block.given)]
    for unit in block.units():
        candidates = tensors_of(unit)
        tensors += [t for t in candidates if t is not None]
        numbers += [*unit.stride, *unit.padding, *unit.dilation, unit.groups, int(unit.training)]
        numbers += [int(t is not None) for t in candidates]
    if block.pool is not None:
        kernel_size, stride, padding, ceil_mode, count_include_pad = block.pool
        numbers += [*kernel_size, *stride, *padding, int(ceil_mode), int(count_include_pad)]
    return tensors, numbers, [unit.eps for unit in block.units()]


class _Layout(NamedTuple):
    """What the integers of `pack` say.

    fields: for each tensor the index of its unit, and its field there. places: for each unit the index among the tensors of each
    of `_TENSORS`, or None. numbers: for each unit the fields of `ConvBN` from `stride` to `training`. kept: which of the tensors
    are not running statistics, and kept_integers: the integers of `pack` for these alone.
    """

    fields: tuple[tuple[int, str], ...]
    places: tuple[tuple[int | None, ...], ...]
    numbers: tuple[tuple, ...]
    main: int
    pool: AvgPool | None
    given: bool
    kept: tuple[int, ...]
    kept_integers: tuple[int, ...]


@functools.cache
def _layout(numbers: tuple[int, ...]) -> _Layout:
    if len(numbers) < _HEAD:
        raise ValueError(f"spec: expected at least {_HEAD} integers, got {len(numbers)}")
    count, projected, pooled, given = numbers[:_HEAD]
    units = count + projected
    expected = _HEAD + units * _ROW + pooled * _POOL
    if count < 1 or {projected, pooled, given} - {0, 1} or len(numbers) != expected:
        raise ValueError(f"spec: expected {expected} integers for {units} units, got {len(numbers)}")
    rows = [numbers[_HEAD + u * _ROW : _HEAD + (u + 1) * _ROW] for u in range(units)]
    fields = [(u, name) for u, at in enumerate(rows) for name, here in zip(_TENSORS, at[_NUMBERS:], strict=True) if here]
    for u in range(units):
        if (u, "weight") not in fields:
            raise ValueError(f"spec: unit {u} has no weight")
    where = {field: i for i, field in enumerate(fields)}
    pool = None
    if pooled:
        p = numbers[-_POOL:]
        pool = AvgPool((p[0], p[1]), (p[2], p[3]), (p[4], p[5]), bool(p[6]), bool(p[7]))
    cleared = list(numbers)
    for end in range(_HEAD + _ROW, _HEAD + units * _ROW + 1, _ROW):
        cleared[end - 2 : end] = [0, 0]
    return _Layout(
        tuple(fields),
        tuple(tuple(where.get((u, name)) for name in _TENSORS) for u in range(units)),
        tuple((at[0:2], at[2:4], at[4:6], at[6], bool(at[7])) for at in rows),
        count,
        pool,
        bool(given),
        tuple(i for i, (_, name) in enumerate(fields) if not name.startswith("running")),
        tuple(cleared),
    )


def unpack(tensors: Sequence, numbers: Sequence[int], epsilons: Sequence[float]) -> Block:
    """Inverse of `pack`. `tensors` may be any sequence of as many objects, gradients or requests for them, say."""
    layout = _layout(tuple(numbers))
    if len(epsilons) != len(layout.places):
        raise ValueError(f"eps: expected {len(layout.places)} values, got {len(epsilons)}")
    if len(tensors) != len(layout.fields):
        raise ValueError(f"tensors: the spec names {len(layout.fields)}, got {len(tensors)}")
    units = [
        ConvBN(*[None if i is None else tensors[i] for i in places], None, *rest, eps=eps)
        for places, rest, eps in zip(layout.places, layout.numbers, epsilons, strict=True)
    ]
    count = layout.main
    return Block(units[:count], units[count] if len(units) > count else None, layout.pool, layout.given)


def tensor_fields(numbers: Sequence[int]) -> Sequence[tuple[int, str]]:
    """For each tensor of `pack`, in order: the index of its unit, and its field there."""
    return _layout(tuple(numbers)).fields


def without_running_statistics(numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Which of the tensors of `pack` are not running statistics, and the integers of `pack` for these alone."""
    layout = _layout(tuple(numbers))
    return layout.kept, layout.kept_integers
