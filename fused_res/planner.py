"""Which backend and which level of fusion a block runs at: what the user forced, or the automatic choice."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fused_res import backends
from fused_res.block.levels import LEVELS

__all__ = ["EAGER", "LEVELS", "forced", "is_eager_forced", "request", "resolve", "use_backend"]

EAGER = "eager"
"""The name under which `use_backend` runs blocks unfused, in ordinary autograd (`fused_res.reference`)."""

_AUTO = "auto"


class Forced(NamedTuple):
    """What `use_backend` asks for; `level` None leaves the level to the planner."""

    backend: str
    level: str | None


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
        name: `"triton"`, `"reference"` (the plain formulas under the same schedules), or `"eager"` (unfused, in ordinary
            autograd).
        level: one of `fused_res.planner.LEVELS`, or None for the planner's choice. `"eager"` has none.

    Raises:
        ValueError: for an unknown name or level, here. A backend that cannot run a block raises RuntimeError with the reason
            when the block is called; nothing falls back silently.
    """
    if name != EAGER and name not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join((*backends.NAMES, EAGER))}, got {name!r}")
    if level is not None and (level not in LEVELS or name == EAGER):
        raise ValueError(f"level: expected one of {', '.join(LEVELS)} and a fused backend, got {level!r} with {name!r}")
    before = forced()
    _local.forced = Forced(name, level)
    try:
        yield
    finally:
        _local.forced = before


def is_eager_forced() -> bool:
    """Whether `use_backend("eager")` is in force."""
    request = forced()
    return request is not None and request.backend == EAGER


def request() -> tuple[str, str]:
    """Backend (or "auto") and level for a block call. Reads no device property, so it is safe while torch.compile traces."""
    asked = forced()
    backend = _AUTO if asked is None else asked.backend
    level = LEVELS[0] if asked is None or asked.level is None else asked.level
    return backend, level


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: the named one, or the preferred one of those that can run for "auto".

    Raises:
        RuntimeError: if the named backend cannot run on this device with this dtype, with the reason.
    """
    if backend == _AUTO:
        able = [name for name in backends.NAMES if backends.supports(name, device, dtype) is None]
        return max(able, key=lambda name: backends.load(name).preference(device))
    reason = backends.supports(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run this block: {reason}")
    return backend
