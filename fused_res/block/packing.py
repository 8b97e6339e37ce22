"""How a block travels through the operator's schema, which takes tensors and plain numbers only.

`pack` turns a `Block` into the tensors that are present, one row of integers per unit and one epsilon per unit; `unpack` is its
inverse.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fused_res.spec import FORMS, AvgPool, Block, ConvBN, Form

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
