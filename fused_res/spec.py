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

    In a pre-activation block the BN is that in front of the convolution: its tensors are [C].
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


class Form(NamedTuple):
    """What a block computes of its parts.

    preactivated: BN and ReLU come before each convolution, not behind it. relu: whether a ReLU ends the block. skip: whether there
    is a shortcut to be added.
    """

    preactivated: bool
    relu: bool
    skip: bool


POST_ACTIVATION = "post-activation"
PRE_ACTIVATION = "pre-activation"
LINEAR = "linear"
CHAIN = "chain"
LINEAR_CHAIN = "linear chain"
FORMS = {
    POST_ACTIVATION: Form(preactivated=False, relu=True, skip=True),
    PRE_ACTIVATION: Form(preactivated=True, relu=False, skip=True),
    LINEAR: Form(preactivated=False, relu=False, skip=True),
    CHAIN: Form(preactivated=False, relu=True, skip=False),
    LINEAR_CHAIN: Form(preactivated=False, relu=False, skip=False),
}
"""The forms of a block; each one's number in the operator's `spec` is its place here.

post-activation: `relu(a * main(x) + shortcut(x))`, main being conv-BN-ReLU-…-conv-BN. linear: the same without the last ReLU.
pre-activation: `a * main(x) + shortcut(x)`, main being BN-ReLU-conv-…-BN-ReLU-conv, where a projection is a convolution alone and
reads what the first one reads. chain and linear chain: `relu(main(x))` and `main(x)`, without a shortcut.
"""


class Block(NamedTuple):
    """The parts of one block: `main` in order, and the shortcut.

    The shortcut is `projection`, with `pool` in front of it if there is one; or, if `given`, a tensor that the caller made; or
    else the identity; there is none where `form`, one of `FORMS`, has none.
    """

    main: Sequence[ConvBN]
    projection: ConvBN | None = None
    pool: AvgPool | None = None
    given: bool = False
    form: str = POST_ACTIVATION

    def units(self) -> list[ConvBN]:
        """All of them, the projection last. No property: torch.compile of torch 2.10 follows none of a named tuple."""
        return [*self.main, self.projection] if self.projection is not None else list(self.main)

    def norms(self) -> list[ConvBN]:
        """For every BN, in the order of `units`, the unit whose BN it would be if all BNs came behind their convolutions."""
        if not FORMS[self.form].preactivated:
            return self.units()
        head, behind = regrouped(self)
        return [head, *behind.main[:-1]]


_CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups")


def _convolved(conv: ConvBN, bn: ConvBN | None) -> ConvBN:
    """The convolution of one unit with the BN of another, or with none."""
    if bn is None:
        return ConvBN(**{name: getattr(conv, name) for name in _CONVOLUTION}, training=False)
    return bn._replace(**{name: getattr(conv, name) for name in _CONVOLUTION})


def regrouped(block: Block) -> tuple[ConvBN | None, Block]:
    """A block as its schedules see it: BNs behind their convolutions, and the BN in front of all.

    A pre-activation block's last convolution, and its projection, have no BN then. Of other forms the block itself, and None.
    """
    if not FORMS[block.form].preactivated:
        return None, block
    units, projection = block.main, block.projection
    behind = [_convolved(conv, bn) for conv, bn in zip(units, [*units[1:], None], strict=True)]
    side = None if projection is None else _convolved(projection, None)
    return units[0]._replace(weight=None, bias=None), block._replace(main=behind, projection=side)


def in_front(head: ConvBN, block: Block) -> Block:
    """Inverse of `regrouped`, of gradients say."""
    bns = [head, *block.main[:-1]]
    return block._replace(main=[_convolved(conv, bn) for conv, bn in zip(block.main, bns, strict=True)])


# The tensors of a unit that reach the operator, in this order. A live BN's running statistics do not: they are written after
# the call, so keeping them for backward would let the next forward invalidate it.
_TENSORS = ConvBN._fields[:6]
_HEAD = 5  # main units, projections, pools, given shortcuts, the form
_PLACES = {form: i for i, form in enumerate(FORMS)}
_NUMBERS = 8  # stride, padding, dilation (2 each), groups, training; then one presence flag for each of _TENSORS
_ROW = _NUMBERS + len(_TENSORS)
_POOL = 8  # kernel, stride, padding (2 each), ceil_mode, count_include_pad


def tensors_of(unit: ConvBN) -> tuple[Tensor | None, ...]:
    """The fields of `_TENSORS` that reach the operator."""
    running = (None, None) if unit.training else (unit.running_mean, unit.running_var)
    return (unit.weight, unit.bias, unit.gamma, unit.beta, *running)


def pack(block: Block) -> tuple[list[Tensor], list[int], list[float]]:
    """Tensors, integers and epsilons from which `unpack` restores the block.

    Integers: number of main units; 1 if there is a projection; 1 if there is a pool; 1 if the shortcut is given; the place of the
    form in `FORMS`; the rows of all units; the pool's row.
    """
    tensors: list[Tensor] = []
    numbers = [len(block.main), int(block.projection is not None), int(block.pool is not None), int(block.given)]
    numbers.append(_PLACES[block.form])
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
    form: str
    kept: tuple[int, ...]
    kept_integers: tuple[int, ...]


@functools.cache
def _layout(numbers: tuple[int, ...]) -> _Layout:
    if len(numbers) < _HEAD:
        raise ValueError(f"spec: expected at least {_HEAD} integers, got {len(numbers)}")
    count, projected, pooled, given, form = numbers[:_HEAD]
    if form not in range(len(FORMS)):
        raise ValueError(f"spec: expected a form of 0 to {len(FORMS) - 1}, got {form}")
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
        list(FORMS)[form],
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
    return Block(units[:count], units[count] if len(units) > count else None, layout.pool, layout.given, layout.form)


def form_of(numbers: Sequence[int]) -> Form:
    """That of the integers of `pack`."""
    return FORMS[_layout(tuple(numbers)).form]


def tensor_fields(numbers: Sequence[int]) -> Sequence[tuple[int, str]]:
    """For each tensor of `pack`, in order: the index of its unit, and its field there."""
    return _layout(tuple(numbers)).fields


def without_running_statistics(numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Which of the tensors of `pack` are not running statistics, and the integers of `pack` for these alone."""
    layout = _layout(tuple(numbers))
    return layout.kept, layout.kept_integers
