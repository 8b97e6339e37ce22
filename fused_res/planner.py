"""Which backend and which level of fusion a block runs at: what the user forced, or the automatic choice."""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import backends, environment, plans, settings, shipped
from fused_res.backends import AUTO, resolve
from fused_res.block.levels import LEVELS, Level
from fused_res.geometry import Geometry, is_fixed, numbers_of
from fused_res.internals import constant_result, is_exporting
from fused_res.spec import FORMS, POST_ACTIVATION, Block

__all__ = ["EAGER", "LEVELS", "Plan", "forced", "is_eager_forced", "plan", "resolve", "use_backend"]

FORCED, MEASURED, SHIPPED, MODEL, RULE = "forced", "measured", "shipped", "model", "rule"
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


def plan(x: Tensor, block: Block, dtype: torch.dtype | None = None, *, compiled: bool = False, level: str | None = None) -> Plan:
    """How a call of the block with x runs.

    Args:
        x: [N, C, H, W].
        block: its parts; weights may be symbolic, then the level is the first.
        dtype: what the block computes in, x's if None.
        compiled: whether to tell how it runs in a graph of torch.compile, which need not trace now.
        level: that of `fuse`, which stands where `use_backend` names none.

    Returns:
        The backend as it was asked for, so that an exported program may run on another device than it was traced on, and a level
        that means something for the block. It is the same at every call with the same sizes. Where torch.compile or torch.export
        leave a size open, it follows from the block alone.
    """
    asked, dtype = forced() or Forced(AUTO, None), dtype or x.dtype
    level, numbers = asked.level or level, numbers_of(x, block)
    if level is None:
        level = LEVELS[0] if numbers is None else _level_of(asked.backend, x, dtype, numbers, compiled)
    elif not torch.compiler.is_compiling() and numbers is not None and numbers[-1] is not None and settings.tune():
        _tune_at(level, asked.backend, x.device, dtype, numbers)
    return Plan(asked.backend, Level.of(level, block).name)


def _level_of(backend: str, x: Tensor, dtype: torch.dtype, numbers: tuple, compiled: bool) -> str:
    if torch.compiler.is_compiling():
        if is_exporting():
            return _level_untried(backend, x.device, dtype, numbers)
        return _level_in_graph(backend, x, dtype, numbers)
    if compiled:
        graphs = _graphs(backend, x.device, dtype, numbers)
        found = graphs.get(numbers[-1]) or graphs.get(None)
        if found is not None:
            return found
    return _level(backend, x.device, dtype, numbers)


def _level_in_graph(backend: str, x: Tensor, dtype: torch.dtype, numbers: tuple) -> str:
    """The level in a graph of torch.compile, such that no two graphs run a block on the same sizes at different levels.

    The recompute of a checkpoint may run in another graph than its forward: after a call with another batch size, in one that
    leaves the size open. So that one has guards against the sizes that a graph of their own runs at another level.
    """
    level = _note(backend, x.device, dtype, numbers)
    if numbers[-1] is None:
        for sizes, other in _fixed(backend, x.device, dtype, numbers):
            if other != level and _has_sizes(x, sizes):
                return other
    return level


def _has_sizes(x: Tensor, sizes: tuple[int, int, int]) -> bool:
    """Whether N, H and W of x are these, by one guard where any is open."""
    found = list(zip((x.shape[0], x.shape[2], x.shape[3]), sizes, strict=True))
    if not all(size == expected for size, expected in found if is_fixed(size)):
        return False
    same = True
    for size, expected in found:
        if not is_fixed(size):
            same = (size == expected) & same
    return bool(same)


def evaluation_level(block: Block, dtype: torch.dtype, backend: str, level: str | None = None) -> str | None:
    """The level of evaluation without gradients, if the block's convolutions are prepared for it; it is not tuned.

    Args:
        dtype: what the block computes in.
        backend: the one that runs, or `AUTO`.
        level: that of `fuse`. `"bn_act"` and, where it means something, `"moment"` are ways without prepared convolutions.

    Returns:
        None where a BN takes the batch's statistics, for pre-activation blocks, and where it runs as `plan` says.
    """
    if FORMS[block.form].preactivated or any(unit.training for unit in block.units()):
        return None
    usual = _evaluation(backend, block.main[0].weight.device, dtype)
    if usual is None:
        return None
    depth = Level.of((forced() or Forced(AUTO, None)).level or level or usual, block)
    return depth.name if depth.epilogues and not depth.moment_main else None


@constant_result
def _evaluation(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """A backend's level of evaluation with prepared convolutions, None where it has none."""
    name = resolve(backend, device, dtype) if backend == AUTO else backend
    found = getattr(backends.load(name), "evaluation", None)
    return None if found is None or not _runs(name, device, dtype) else found(device, dtype)


def who_decided(x: Tensor, block: Block, *, level: str | None = None) -> str:
    """Who gave the level of `plan`: `FORCED`, by `use_backend` or `fuse`, `MEASURED`, `SHIPPED`, `MODEL` or `RULE`."""
    asked, numbers = forced() or Forced(AUTO, None), numbers_of(x, block)
    if asked.level or level:
        return FORCED
    return plans.decided(("who", *_key(asked.backend, x.device, x.dtype, numbers))) or RULE


def _key(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple | None) -> tuple:
    return "level", backend, device, dtype, numbers


def _graphs(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> dict[tuple | None, str]:
    """At which level graphs of torch.compile run the block, by N, H and W; under None, one that leaves any of them open."""
    return plans.decide(("graphs", *_key(backend, device, dtype, (*numbers[:-1], None))), {})


@constant_result
def _note(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> str:
    """The level in a graph for these sizes, noted: the first one stands."""
    return _graphs(backend, device, dtype, numbers).setdefault(numbers[-1], _level_untried(backend, device, dtype, numbers))


@constant_result
def _fixed(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> tuple[tuple[tuple[int, int, int], str], ...]:
    """The sizes for which there are graphs of their own, and their levels."""
    graphs = _graphs(backend, device, dtype, numbers)
    return tuple([(sizes, level) for sizes, level in list(graphs.items()) if sizes is not None])


@constant_result
def _level_untried(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> str:
    """The level that stands, or would by what is known, without trying any: it is left to a call that is not traced."""
    return plans.decided(_key(backend, device, dtype, numbers)) or _found(backend, device, dtype, numbers, tries=False)[0]


def _level(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> str:
    key = _key(backend, device, dtype, numbers)
    level = plans.decided(key)
    if level is not None:
        return level
    found, who = _found(backend, device, dtype, numbers, tries=True)
    level = plans.decide(key, found)
    if level == found:
        plans.decide(("who", *key), who)
    return level


def _found(backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple, tries: bool) -> tuple[str, str]:
    """The level, and who says so: what was measured here, a plan that came with the package, the model, or the backend's rule."""
    name = resolve(backend, device, dtype) if backend == AUTO else backend
    geometry = Geometry.from_numbers(numbers)
    if _runs(name, device, dtype):
        if settings.tune():
            level = _tuner().level(name, device, dtype, geometry, tries=tries)
        else:
            level = _recalled(name, device, dtype, geometry)
        if level is not None:
            return level, MEASURED
        if name == "triton" and device.type == "cuda" and geometry.images is not None:
            level = _shipped(device, dtype, numbers)
            if level is not None:
                return level, SHIPPED
            level = _modelled(device, dtype, geometry) if tries else None
            if level is not None:
                return level, MODEL
    return backends.load(name).level(device, dtype, geometry), RULE


def _recalled(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str | None:
    """What was tuned before, without importing all of tuning where nothing was."""
    files = importlib.import_module("fused_res.tuning.files")
    if "fused_res.tuning.tuner" not in sys.modules and not files.any_kept():
        return None
    return _tuner().recalled(backend, device, dtype, geometry)


def _shipped(device: torch.device, dtype: torch.dtype, numbers: tuple) -> str | None:
    gpu, versions = torch.cuda.get_device_name(device), environment.versions()
    return shipped.level(gpu, versions, str(dtype).removeprefix("torch."), numbers)


def _modelled(device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str | None:
    """By `fused_res.cost`, which knows one form of block, and runs its schedules without data: not while anybody traces."""
    if geometry.form != POST_ACTIVATION or not _tuner().can_try(device, dtype, geometry):
        return None
    predict = importlib.import_module("fused_res.cost.predict")  # brings the kernels
    gpu = predict.nearest(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return None if gpu is None else predict.level(geometry, dtype, gpu, geometry.training)


def _tune_at(level: str, backend: str, device: torch.device, dtype: torch.dtype, numbers: tuple) -> None:
    """Have the convolutions of a forced level tried, once."""
    key = ("convolutions", level, backend, device, dtype, numbers)
    if plans.decided(key) is None and _runs(backend, device, dtype):
        _tuner().convolutions_at(level, backend, device, dtype, Geometry.from_numbers(numbers))
        plans.decide(key, True)


def _tuner() -> ModuleType:
    """Imported where something is tuned: it brings half of the package."""
    return importlib.import_module("fused_res.tuning.tuner")


def _runs(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the backend can run; where it was forced and cannot, the operator says why."""
    return backends.supports(backend, device, dtype) is None
