"""`tune`: have what a call of a model needs measured here and now, and kept."""

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from fused_res import console, planner, plans
from fused_res.block.casting import with_dtype
from fused_res.block.validate import compute_dtype
from fused_res.explain import visit
from fused_res.fusible import Fusible
from fused_res.geometry import Geometry, numbers_of


@dataclass(frozen=True)
class Tuned:
    """A kind of block that the model calls: the names of those that are alike, and what was found for them.

    before: the level that the rules gave. level: the one that stands now. speedup: the time of the first level over its time, where
    the levels were measured now. tried, left: trials that were made now, and that time or memory did not allow. note: why nothing
    was tried.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    backend: str
    before: str
    level: str
    speedup: float | None
    tried: int
    left: int
    note: str = ""


@dataclass(frozen=True)
class Tuning:
    """Rows in the order of the calls; `str()` gives a table."""

    rows: tuple[Tuned, ...]
    seconds: float

    def __str__(self) -> str:
        head = ("blocks", "input", "dtype", "backend", "level", "was", "speedup", "tried", "left", "note")
        lines = []
        for row in self.rows:
            names = row.names[0] + (f" and {len(row.names) - 1} more" if len(row.names) > 1 else "")
            speedup = "-" if row.speedup is None else f"{row.speedup:.2f}"
            what = (names or "(self)", "x".join(map(str, row.shape)), row.dtype, row.backend, row.level, row.before)
            lines.append((*what, speedup, str(row.tried), str(row.left), row.note))
        text = console.table(head, lines)
        return f"{text}\n\nTrials: {sum(row.tried for row in self.rows)}, in {self.seconds:.0f} s"


@dataclass
class _Job:
    """A kind of block: what a plan for it depends on, the names of those that are alike, and what became of it."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    numbers: tuple
    forced: str | None
    shape: tuple[int, ...]
    before: str
    names: list[str]
    tried: int = 0
    left: int = 0
    note: str = ""

    @property
    def what(self) -> tuple[str, torch.device, torch.dtype, Geometry]:
        return self.backend, self.device, self.dtype, Geometry.from_numbers(self.numbers)


def tune(model: nn.Module, *inputs: object, time_limit: float | None = None, **keywords: object) -> Tuning:
    """Measure what one call of the model needs, and keep it: from then on its blocks run as was found, here and in later processes.

    Of every fused block that the call runs, for these sizes, dtypes and this mode (training, with a backward, or evaluation), the
    convolutions are tried as the library's and as kernels of our own with every tile, then the levels of fusion;
    docs/environment.md says what candidates must be and how they are timed. What has been measured before is not tried again. A
    bar on stderr shows how far it is, where that is a terminal.

    Call it between steps, not between a forward and its backward or recompute: what was decided in this process before is decided
    anew. The model's parameters, buffers and gradients, and torch's random state, stay as they are. Nothing else ever tunes but
    FUSED_RES_TUNE=1.

    Args:
        model: any module with fused blocks, or one of them.
        inputs, keywords: what the model takes.
        time_limit: seconds after which no further trial begins; the rules decide what is left. None: no limit.

    Returns:
        A row for every kind of block: which level stands, which stood before, and how much faster it is than the first.

    Raises:
        ValueError: time_limit is negative.
        RuntimeError: the model calls no fused block.
    """
    if time_limit is not None and time_limit < 0:
        raise ValueError(f"time_limit: expected at least 0 seconds, got {time_limit}")
    tuner = _tuner()
    begin = time.monotonic()
    jobs = _jobs(model, inputs, keywords)
    if not jobs:
        raise RuntimeError("model: expected one that calls a fused block: fused_res.fuse(model) fuses them")
    plans.forget()
    trials = []
    for job in jobs:
        if not tuner.can_try(*job.what[1:]):
            job.note = "float64 is not tuned" if job.dtype == torch.float64 else "cannot be tried here"
            continue
        convolutions, levels = tuner.pieces(*job.what, job.forced)
        trials += [(job, piece, False) for piece in convolutions] + ([] if levels is None else [(job, levels, True)])
        if not convolutions and levels is None:
            job.note = "known before"
    with console.progress(len(trials), "Tuning") as advance:
        for job, piece, is_last in trials:
            advance(f"{job.names[0] or 'block'}: {piece.label}")
            late = time_limit is not None and time.monotonic() - begin >= time_limit
            # The levels are measured with the choices of their convolutions, or not at all.
            if late or (is_last and job.left) or not piece.work():
                job.left += 1
                job.note = "time is over" if late else job.note or "too little memory"
            else:
                job.tried += 1
    plans.forget()
    return Tuning(tuple(_row(job) for job in jobs), time.monotonic() - begin)


def _tuner() -> ModuleType:
    """Imported where something is tuned: it brings half of the package."""
    return importlib.import_module("fused_res.tuning.tuner")


def _jobs(model: nn.Module, inputs: tuple, keywords: dict) -> list[_Job]:
    """The kinds of blocks that the call runs fused, in the order of the calls."""
    found: dict[tuple, _Job] = {}

    def saw(name: str, block: nn.Module, x: Tensor, compiled: bool) -> None:
        if not isinstance(block, Fusible) or block.unfused_reason(x) is not None:
            return
        dtype = compute_dtype(x)
        x, parts = x.to(dtype), with_dtype(block.parts(), dtype)
        numbers, request = numbers_of(x, parts), planner.forced()
        asked, level = planner.plan(x, parts, level=block._fused_res_level)
        backend = planner.resolve(asked, x.device, dtype)
        forced = block._fused_res_level if request is None or request.level is None else request.level
        if numbers is None or numbers[-1] is None:
            return
        key = backend, x.device, dtype, numbers, forced
        found.setdefault(key, _Job(*key, tuple(x.shape), level, [])).names.append(name)

    with _untuned():
        visit(model, inputs, keywords, saw)
    return list(found.values())


@contextmanager
def _untuned() -> Iterator[None]:
    """The rules' plans stand inside, and are forgotten after it: the call that shows what there is to tune tunes nothing."""
    with plans.afresh():
        yield


def _row(job: _Job) -> Tuned:
    tuner, (_, device, dtype, geometry) = _tuner(), job.what
    level, speedup = job.forced, None
    if level is None and tuner.can_try(device, dtype, geometry):
        level = tuner.recalled(*job.what)
        times = tuner.times(*job.what) if job.tried else None
        if times and level in times:
            speedup = times[planner.LEVELS[0]] / times[level]
    shown = tuple(dict.fromkeys(job.names)), job.shape, str(dtype).removeprefix("torch."), job.backend
    return Tuned(*shown, job.before, level or job.before, speedup, job.tried, job.left, job.note)
