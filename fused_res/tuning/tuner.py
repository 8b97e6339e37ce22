"""Tuning: at the first call of a block, with FUSED_RES_TUNE=1, its convolutions and its levels are tried, and the fastest stand.

Each convolution that some level asks for is tried as the library's, as the backend's own, with every tile, and as other backends
lend it, and each step of the moment form that multiplies as the backend's own and as others lend it; then the levels are, with
those choices. Candidates run on random data of the block's shapes and have to be right before they are timed
(`fused_res.tuning.trials`). What is found is kept between processes (`fused_res.tuning.files`).

Nothing is tried while torch.compile or torch.export trace, on tensors without data, or while a CUDA graph is captured: what
stands then is what was found before, or the default. A recompute finds what its forward found.
"""

import functools
import hashlib
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from fused_res import backends, environment, plans, settings
from fused_res.backends import native
from fused_res.block import dry_run
from fused_res.block.levels import LEVELS, Level
from fused_res.geometry import Geometry
from fused_res.internals import has_dispatch_modes
from fused_res.primitives.choice import STEPS, Call, Choice, StepCall, lent_steps, own_kernel, switches
from fused_res.tuning import convolutions, steps, synthetic, trials
from fused_res.tuning.files import PlanFiles, any_kept, warn_once
from fused_res.tuning.levels import try_levels

measure: trials.Measure = trials.measure
"""What candidates are timed with."""

_logger = logging.getLogger("fused_res")
_lock = threading.RLock()
_known: dict[tuple[PlanFiles, str], object] = {}
_times: dict[tuple[PlanFiles, str], dict[str, float]] = {}


def level(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry, *, tries: bool = True) -> str | None:
    """The level that was measured to be the fastest, now or before; None where that is not known and cannot be found out now.

    Without `geometry.images`, and unless `tries` where nothing was found for these, the one that was found for the last sizes.
    """
    plans.remember_by(recall)
    with _lock:
        found = _recall_level(backend, device, dtype, geometry)
        if not tries:
            return found or _recall_level(backend, device, dtype, geometry._replace(images=None))
        if found is None and can_try(device, dtype, geometry):
            found = _tune(backend, device, dtype, geometry)
        return found


def convolutions_at(level: str, backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> None:
    """Try the convolutions and steps of a level that was asked for."""
    plans.remember_by(recall)
    with _lock:
        if can_try(device, dtype, geometry):
            for piece in pieces(backend, device, dtype, geometry, level)[0]:
                piece.work()


def can_try(device: torch.device, dtype: torch.dtype, geometry: Geometry) -> bool:
    """Whether candidates can be run here and now, and judged: for float64 there is no truth in a wider dtype."""
    if dtype == torch.float64 or geometry.images is None:
        return False
    if torch.compiler.is_compiling() or has_dispatch_modes():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def recall(key: tuple) -> Choice | None:
    """The choice that was found for a convolution or a step before, by its key."""
    files, text = _files(key[2]), _text(key)
    value = _value(files, text)
    try:
        if value is None:
            return None
        own, config, lender = value["own"], value["config"], value.get("lender", "")
        if not isinstance(own, bool) or (key[0] in STEPS and not own):
            raise TypeError(f"own is {own!r}")
        if lender and lender not in backends.lenders(key[1], key[2], key[3]):
            raise ValueError(f"{lender!r} lends no kernels here")
        return Choice(own, None if config is None else backends.load(lender or key[1]).tile(*config), "measured", lender)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        warn_once(f"ignored {files.path(text)}: {type(error).__name__}: {error}")
        return None


def _recall_level(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str | None:
    found = _value(_files(device), _level_text(backend, device, dtype, geometry))
    return found if found in LEVELS else None


def recalled(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str | None:
    """The level that was measured to be the fastest before, by this process or another of the same user; nothing is tried."""
    if not _known and not any_kept():
        return None
    return level(backend, device, dtype, geometry, tries=False)


def times(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> dict[str, float] | None:
    """Seconds of a block's levels, where this process has measured them."""
    return _times.get((_files(device), _level_text(backend, device, dtype, geometry)))


class Piece(NamedTuple):
    """A trial that is still to be made. work: makes it, and keeps what it finds; False where memory does not suffice."""

    label: str
    work: Callable[[], bool]


def pieces(
    backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry, level: str | None = None
) -> tuple[list[Piece], Piece | None]:
    """The trials of a block's convolutions and steps that nobody has made, at one level or at all, and that of its levels.

    The latter means something once the former have been made; there is none where a level is given. `can_try` must hold.
    """
    plans.remember_by(recall)
    levels = LEVELS[1:] if level is None else [level]
    found = _guarded(lambda: _product_pieces(levels, backend, device, dtype, geometry), device) or []

    def work() -> bool:
        return _guarded(lambda: _try_levels(backend, device, dtype, geometry), device) is not None

    known = level is not None or _recall_level(backend, device, dtype, geometry) is not None
    return found, None if known else Piece("levels", work)


def _tune(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str | None:
    def work() -> str:
        for piece in _product_pieces(LEVELS[1:], backend, device, dtype, geometry):
            piece.work()
        return _try_levels(backend, device, dtype, geometry)

    return _guarded(work, device)


def _try_levels(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str:
    found, verdict = try_levels(geometry, backend, dtype, device, measure)
    for images in (geometry.images, None):
        text = _level_text(backend, device, dtype, geometry._replace(images=images))
        _keep(_files(device), text, found, verdict)
        _times[_files(device), text] = verdict.seconds
    return found


def _product_pieces(
    levels: list[str] | tuple[str, ...], backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry
) -> list[Piece]:
    """Those of all that multiplies: convolutions and steps of the moment form."""
    block, x = synthetic.block(geometry, dtype, device, 0)
    groups: dict[tuple, Group] = {}
    for name in levels:
        arguments = x, None, block, name, backend, geometry.training
        if settings.convolutions() == "auto":
            _join(groups, [c.call for c in dry_run.convolutions(*arguments)], convolutions.shares, convolutions.variants)
        if Level.of(name, block).moment_main:
            _join(groups, dry_run.steps(*arguments), steps.shares, lambda call: [call])
    del block, x
    found, settled = [], set()
    for keys, group in groups.items():
        if all(_is_open(call, key) and key not in settled for call, key in zip(group, keys, strict=True)):
            found.append(_piece(group, keys, device))
        else:  # what one of two shares with the other cannot be saved where the other is settled
            pairs = zip(group, keys, strict=True)
            found += [_piece((call,), (key,), device) for call, key in pairs if _is_open(call, key) and key not in settled]
        settled.update(keys)
    return found


Group = tuple[Call, ...] | tuple[StepCall, ...]
"""What is tried together: one call, or two in the order in which they run."""


def _join(groups: dict[tuple, Group], asked: list, shares: Callable, variants: Callable) -> None:
    """Add calls, by their keys, those that share something in twos."""
    taken = False
    for call, following in zip(asked, [*asked[1:], None], strict=True):
        group = (call, following) if shares(call, following) else (call,)
        if not taken:
            for alike in zip(*map(variants, group), strict=True):
                groups.setdefault(tuple(one.key() for one in alike), alike)
        taken = len(group) == 2


def _is_open(call: Call | StepCall, key: tuple) -> bool:
    able = bool(lent_steps(call)) if isinstance(call, StepCall) else own_kernel(call)[0] is not None
    return able and plans.decided(key) is None and recall(key) is None


def _piece(group: Group, keys: tuple[tuple, ...], device: torch.device) -> Piece:
    of_steps = isinstance(group[0], StepCall)

    def trial() -> list[tuple[Choice, trials.Verdict]]:
        if len(group) == 2:
            return (steps if of_steps else convolutions).try_both(*group, device, measure)
        return [(steps.try_step if of_steps else convolutions.try_convolution)(group[0], device, measure)]

    def keep() -> bool:
        for key, (choice, verdict) in zip(keys, trial(), strict=True):
            plans.decide(key, choice)
            config = None if choice.config is None else list(choice.config)
            value = {"own": choice.own, "config": config, "lender": choice.lender}
            _keep(_files(device), _text(key), value, verdict)
        return True

    names = " and ".join(call.primitive for call in group)
    label = names if of_steps else f"{names} of {'x'.join(map(str, group[0].unit.weight.shape))}"
    return Piece(label, lambda: _guarded(keep, device) is not None)


def _guarded(work: Callable, device: torch.device) -> object | None:
    """What the work gives; None, with a warning, where memory does not suffice."""
    index = device.index if device.type == "cuda" else None
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.cuda.device(-1 if index is None else index):
            return work()
    except torch.OutOfMemoryError as error:
        warn_once(f"a block is not tuned: {error}")
        return None


def _keep(files: PlanFiles, text: str, value: object, verdict: trials.Verdict) -> None:
    _known[files, text] = value
    _logger.info("tuned %s: %s of %s, rejected %s", text, verdict.winner, verdict.seconds, verdict.rejected)
    files.save(text, value, winner=verdict.winner, seconds=verdict.seconds, rejected=verdict.rejected)


def _value(files: PlanFiles, text: str) -> object | None:
    found = _known.get((files, text))
    if found is None:
        found = files.load(text)
        if found is not None:
            _known[files, text] = found
    return found


def _text(key: tuple) -> str:
    """A key as it is kept: which of several equal GPUs it was does not matter."""
    return repr(tuple(part.type if isinstance(part, torch.device) else part for part in key))


def _level_text(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str:
    return _text(("level", backend, device, dtype, *switches(device), settings.convolutions(), geometry))


def _files(device: torch.device) -> PlanFiles:
    return _files_of(device, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _files_of(device: torch.device, threads: int) -> PlanFiles:
    return PlanFiles(identity(device) | {"threads": threads})


@functools.cache
def identity(device: torch.device) -> dict:
    """What a measurement holds for: the device, its driver, the versions of what runs, and our own sources."""
    library = native.FILE
    found = environment.versions() | {
        "source": environment.fingerprint(),
        "library": hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library.is_file() else None,
    }
    if device.type != "cuda":
        capability = settings.cpu_capability() or torch.backends.cpu.get_cpu_capability()
        return found | {"device": environment.cpu_model(), "capability": capability}
    gpu = environment.gpu(torch.cuda.current_device() if device.index is None else device.index)
    return found | {name: gpu.get(name) for name in ("name", "capability", "memory_bytes", "multiprocessors", "driver_version")}
