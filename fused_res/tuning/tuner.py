"""Tuning: at the first call of a block, with FUSED_RES_TUNE=1, its convolutions and its levels are tried, and the fastest stand.

Each convolution that some level asks for is tried as the library's and as the backend's own, with every tile; then the levels are,
with those choices. Candidates run on random data of the block's shapes and have to be right before they are timed
(`fused_res.tuning.trials`). What is found is kept between processes (`fused_res.tuning.files`).

Nothing is tried while torch.compile or torch.export trace, on tensors without data, or while a CUDA graph is captured: what
stands then is what was found before, or the default. A recompute finds what its forward found.
"""

import functools
import hashlib
import logging
import threading
from collections.abc import Callable

import torch

from fused_res import backends, environment, plans, settings
from fused_res.backends import native
from fused_res.block.dry_run import convolutions
from fused_res.block.levels import LEVELS
from fused_res.geometry import Geometry
from fused_res.internals import has_dispatch_modes
from fused_res.primitives.choice import Call, Choice, own_kernel, switches
from fused_res.tuning import synthetic, trials
from fused_res.tuning.convolutions import try_convolution, variants
from fused_res.tuning.files import PlanFiles, warn_once
from fused_res.tuning.levels import try_levels

measure: trials.Measure = trials.measure
"""What candidates are timed with."""

_logger = logging.getLogger("fused_res")
_lock = threading.RLock()
_known: dict[tuple[PlanFiles, str], object] = {}


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
    """Try the convolutions of a level that was asked for."""
    plans.remember_by(recall)
    with _lock:
        if can_try(device, dtype, geometry):
            _guarded(lambda: _tune_convolutions([level], backend, device, dtype, geometry), device)


def can_try(device: torch.device, dtype: torch.dtype, geometry: Geometry) -> bool:
    """Whether candidates can be run here and now, and judged: for float64 there is no truth in a wider dtype."""
    if dtype == torch.float64 or geometry.images is None:
        return False
    if torch.compiler.is_compiling() or has_dispatch_modes():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def recall(key: tuple) -> Choice | None:
    """The choice that was found for a convolution before, by its `Call.key()`."""
    files, text = _files(key[2]), _text(key)
    value = _value(files, text)
    try:
        if value is None:
            return None
        own, config = value["own"], value["config"]
        if not isinstance(own, bool):
            raise TypeError(f"own is {own!r}")
        return Choice(own, None if config is None else backends.load(key[1]).tile(*config), "measured")
    except (KeyError, TypeError, AttributeError) as error:
        warn_once(f"ignored {files.path(text)}: {type(error).__name__}: {error}")
        return None


def _recall_level(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str | None:
    found = _value(_files(device), _level_text(backend, device, dtype, geometry))
    return found if found in LEVELS else None


def _tune(backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str | None:
    def work() -> str:
        _tune_convolutions(LEVELS[1:], backend, device, dtype, geometry)
        found, verdict = try_levels(geometry, backend, dtype, device, measure)
        for images in (geometry.images, None):
            text = _level_text(backend, device, dtype, geometry._replace(images=images))
            _keep(_files(device), text, found, verdict)
        return found

    return _guarded(work, device)


def _tune_convolutions(
    levels: list[str] | tuple[str, ...], backend: str, device: torch.device, dtype: torch.dtype, geometry: Geometry
) -> None:
    if settings.convolutions() != "auto":
        return
    block, x = synthetic.block(geometry, dtype, device, 0)
    asked = [c.call for name in levels for c in convolutions(x, None, block, name, backend, geometry.training)]
    calls: dict[tuple, Call] = {}
    for call in asked:
        for variant in variants(call):
            calls.setdefault(variant.key(), variant)
    del block, x
    for key, call in calls.items():
        if own_kernel(call)[0] is None or plans.decided(key) is not None or recall(key) is not None:
            continue
        choice, verdict = try_convolution(call, device, measure)
        plans.decide(key, choice)
        value = {"own": choice.own, "config": None if choice.config is None else list(choice.config)}
        _keep(_files(device), _text(key), value, verdict)


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
