"""What a residual block is made of, and how that travels through an operator's schema.

The operator takes tensors and plain numbers only. `pack` turns a list of `ConvBN` into the tensors that are present, one row of
integers per unit and one epsilon per unit; `unpack` is its inverse.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


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
        kernel = self.weight.shape[2:]
        return tuple(
            (size + 2 * self.padding[d] - self.dilation[d] * (kernel[d] - 1) - 1) // self.stride[d] + 1
            for d, size in enumerate((height, width))
        )


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

    @property
    def units(self) -> list[ConvBN]:
        return [*self.main, self.projection] if self.projection is not None else list(self.main)


# The tensors of a unit that reach the operator, in this order. A live BN's running statistics do not: they are written after
# the call, so keeping them for backward would let the next forward invalidate it.
_TENSORS = ("weight", "bias", "gamma", "beta", "running_mean", "running_var")
_HEAD = 4  # main units, projections, pools, given shortcuts
_NUMBERS = 8  # stride, padding, dilation (2 each), groups, training; then one presence flag for each of _TENSORS
_POOL = 8  # kernel, stride, padding (2 each), ceil_mode, count_include_pad


def _reaches_operator(unit: ConvBN, name: str) -> bool:
    if getattr(unit, name) is None:
        return False
    return not (unit.training and name.startswith("running"))


def pack(block: Block) -> tuple[list[Tensor], list[int], list[float]]:
    """Tensors, integers and epsilons from which `unpack` restores the block.

    Integers: number of main units; 1 if there is a projection; 1 if there is a pool; 1 if the shortcut is given; the rows of
    all units; the pool's row.
    """
    tensors: list[Tensor] = []
    numbers = [len(block.main), int(block.projection is not None), int(block.pool is not None), int(block.given)]
    for unit in block.units:
        present = [_reaches_operator(unit, name) for name in _TENSORS]
        tensors += [getattr(unit, name) for name, here in zip(_TENSORS, present, strict=True) if here]
        numbers += [*unit.stride, *unit.padding, *unit.dilation, unit.groups, int(unit.training)]
        numbers += [int(here) for here in present]
    if block.pool is not None:
        kernel_size, stride, padding, ceil_mode, count_include_pad = block.pool
        numbers += [*kernel_size, *stride, *padding, int(ceil_mode), int(count_include_pad)]
    return tensors, numbers, [unit.eps for unit in block.units]


def unpack(tensors: Sequence, numbers: Sequence[int], epsilons: Sequence[float]) -> Block:
    """Inverse of `pack`. `tensors` may be any sequence of as many objects, gradients or requests for them, say."""
    if len(numbers) < _HEAD:
        raise ValueError(f"spec: expected at least {_HEAD} integers, got {len(numbers)}")
    count, projected, pooled, given = numbers[:_HEAD]
    row = _NUMBERS + len(_TENSORS)
    units_count = count + projected
    expected = _HEAD + units_count * row + pooled * _POOL
    if count < 1 or {projected, pooled, given} - {0, 1} or len(numbers) != expected:
        raise ValueError(f"spec: expected {expected} integers for {units_count} units, got {len(numbers)}")
    if len(epsilons) != units_count:
        raise ValueError(f"eps: expected {units_count} values, got {len(epsilons)}")
    rows = [numbers[_HEAD + u * row : _HEAD + (u + 1) * row] for u in range(units_count)]
    present = sum(sum(at[_NUMBERS:]) for at in rows)
    if present != len(tensors):
        raise ValueError(f"tensors: the spec names {present}, got {len(tensors)}")
    remaining = iter(tensors)
    units = []
    for u, at in enumerate(rows):
        fields = {name: next(remaining) for name, here in zip(_TENSORS, at[_NUMBERS:], strict=True) if here}
        if "weight" not in fields:
            raise ValueError(f"spec: unit {u} has no weight")
        units.append(
            ConvBN(
                **fields,
                stride=(at[0], at[1]),
                padding=(at[2], at[3]),
                dilation=(at[4], at[5]),
                groups=at[6],
                training=bool(at[7]),
                eps=epsilons[u],
            )
        )
    pool = None
    if pooled:
        p = numbers[-_POOL:]
        pool = AvgPool((p[0], p[1]), (p[2], p[3]), (p[4], p[5]), bool(p[6]), bool(p[7]))
    return Block(units[:count], units[count] if projected else None, pool, bool(given))


def tensor_fields(numbers: Sequence[int]) -> list[tuple[int, str]]:
    """For each tensor of `pack`, in order: the index of its unit, and its field there."""
    row = _NUMBERS + len(_TENSORS)
    units = numbers[0] + numbers[1]
    flags = [numbers[_HEAD + u * row + _NUMBERS : _HEAD + (u + 1) * row] for u in range(units)]
    return [(u, name) for u in range(units) for name, here in zip(_TENSORS, flags[u], strict=True) if here]


def without_running_statistics(tensors: Sequence, numbers: Sequence[int]) -> tuple[list, list[int]]:
    """The tensors and integers of `pack` less the running statistics of every unit."""
    kept = [t for t, (_, name) in zip(tensors, tensor_fields(numbers), strict=True) if not name.startswith("running")]
    row = _NUMBERS + len(_TENSORS)
    cleared = list(numbers)
    for u in range(numbers[0] + numbers[1]):
        end = _HEAD + (u + 1) * row
        cleared[end - 2 : end] = [0, 0]
    return kept, cleared
