"""Which backend and which level of fusion a block runs at: what the user forced, or the automatic choice."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_res import backends, plans, settings
from fused_res.backends import AUTO, resolve
from fused_res.block.levels import LEVELS, Level
from fused_res.geometry import Geometry, numbers_of
from fused_res.spec import Block
from fused_res.tuning import tuner

__all__ = ["EAGER", "LEVELS", "Plan", "forced", "is_eager_forced", "plan", "resolve", "use_backend"]

T = TypeVar("T")

EAGER = "eager"
"""The name under which `use_backend` runs blocks unfused, in ordinary autograd (`fused_res.reference`)."""


class Forced(NamedTuple):
    """What `use_backend` asks for; `level` None leaves the level to the planner."""

    backend: str
    level: str | None


class Plan(NamedTuple):
    """How a block runs: a backend's name or `fused_res.backends.AUTO`, and the level."""

    backend: str
    level: str


class _Local(threading.local):
    def __init__(self) -> None:
        self.forced: Forced | None = None


_local = _Local()


def forced() -> Forced | None:
    """What the innermost `use_backend` of this thread asks for, or None outside of one."""
    return _local.forced


@contextmanager
def use_backend(name: str, level: str | None = None) -> Iterator[None]:
    """Run the blocks called inside, in this thread, on one backend and at one level.

    Args:
        name: `"triton"`, `"native"`, `"reference"` (the plain formulas under the same schedules), or `"eager"` (unfused, in
            ordinary autograd).
        level: one of `fused_res.planner.LEVELS`, or None for the planner's choice. `"eager"` has none. A block for which the
            level means nothing runs at the highest one before it that does: a BasicBlock at `"prologue"` instead of `"moment"`.

    Raises:
        ValueError: for an unknown name or level, here. A backend that cannot run a block raises RuntimeError with the reason
            when the block is called; nothing falls back silently.
    """
    if name != EAGER and name not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join((*backends.NAMES, EAGER))}, got {name!r}")
    if level is not None and (level not in LEVELS or name == EAGER):
        raise ValueError(f"level: expected one of {', '.join(LEVELS)} and a fused backend, got {level!r} with {name!r}")
    with under(Forced(name, level)):
        yield


@contextmanager
def under(request: Forced | None) -> Iterator[None]:
    """Inside, this is what `use_backend` asks for."""
    before = forced()
    _local.forced = request
    try:
        yield
    finally:
        _local.forced = before


def is_eager_forced() -> bool:
    """Whether `use_backend("eager")` is in force."""
    request = forced()
    return request is not None and request.backend == EAGER


def plan(x: Tensor, block: Block, dtype: torch.dtype | None = None, *, sized: bool = True, level: str | None = None) -> Plan:
    """How a call of the block with x runs.

    Args:
        x: [N, C, H, W].
        block: its parts; weights may be symbolic, then the level is the first.
        dtype: what the block computes in, x's if None.
        sized: whether the plan may depend on N, H and W; it does not where torch.compile or torch.export trace.
        level: that of `fuse`, which stands where `use_backend` names none.

    Returns:
        The backend as it was asked for, so that an exported program may run on another device than it was traced on, and a level
        that means something for the block. It is the same at every call with the same sizes, and needs no guard on N, H or W
        where torch.compile or torch.export trace.
    """
    asked, dtype = forced() or Forced(AUTO, None), dtype or x.dtype
    level, numbers = asked.level or level, numbers_of(x, block, sized)
    if level is None:
        level = LEVELS[0] if numbers is None else _level(asked.backend, x.device, dtype, numbers)
    elif numbers is not None and numbers[-1] is not None and settings.tune():
        _tune_at(level, asked.backend, x.device, dtype, numbers)
    return Plan(asked.backend, Level.of(level, block).name)


def _constant(function: Callable[..., T]) -> Callable[..., T]:
    """`torch.compiler.assume_constant_result`, which would import all of torch._dynamo, and Triton with it."""
    function._dynamo_marked_constant = True
    return function


def is_measured(x: Tensor, block: Block, *, sized: bool = True, level: str | None = None) -> bool:
    """Whether tuning found the level that `plan` gave, not a rule, `use_backend` or `fuse`."""
    asked, numbers = forced() or Forced(AUTO, None), numbers_of(x, block, sized)
    return (asked.level or level) is None and plans.decided(
        ("measured", *_key(asked.backend, x.device, x.dtype, numbers))
    ) is not None


def _key(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple | None) -> tuple:
    return "level", backend, device, dtype, numbers


@_constant
def _level(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> str:
    key = _key(backend, device, dtype, numbers)
    level = plans.decided(key)
    if level is not None:
        return level
    name = resolve(backend, device, dtype) if backend == AUTO else backend
    geometry = Geometry.from_numbers(numbers)
    found = tuner.level(name, device, dtype, geometry) if settings.tune() and _runs(name, device, dtype) else None
    level = plans.decide(key, found or backends.load(name).level(device, dtype, geometry))
    if level == found:
        plans.decide(("measured", *key), True)
    return level


def _tune_at(level: str, backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> None:
    """Have the convolutions of a forced level tried, once."""
    key = ("convolutions", level, backend, device, dtype, numbers)
    if plans.decided(key) is None and _runs(backend, device, dtype):
        tuner.convolutions_at(level, backend, device, dtype, Geometry.from_numbers(numbers))
        plans.decide(key, True)


def _runs(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the backend can run; where it was forced and cannot, the operator says why."""
    return backends.supports(backend, device, dtype) is None
