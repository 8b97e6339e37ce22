"""The backends of the primitives, one module each: adding a backend is adding a file here.

A backend module has four functions:

- `supports(device, dtype) -> str | None`: the reason why it cannot run there, or None where it can;
- `preference(device) -> int`: the automatic choice takes the highest of those that can run; 0 is never chosen unasked;
- `level(device, dtype, geometry) -> str`: at which level it runs a block (`fused_res.geometry.Geometry`) where neither
  `use_backend` nor a measurement says;
- `find(primitive, device) -> Callable | None`: its implementation of a primitive of `fused_res.primitives` on this device, or None
  where it has none and the primitive's plain formula runs (for the convolutions that is the library: cuDNN, oneDNN).

It may have nine more. `evaluation(device, dtype) -> str | None`: the level of evaluation without gradients, where its `find`
has `conv_bn_act`, whose weights are prepared; None for `level`'s. `watching(call) -> AbstractContextManager`: inside, a launch
of a kernel that is none of torch's operators is handed to `call`, with what launches it again. `observed() -> bool`: whether
somebody is told of such launches, who would miss those that the compiled library makes. `declined(primitive, unit,
pixels) -> str | None`: why its convolution of that kind does not run this unit over so many pixels, in a few words for
`explain`, or None where it does; without it, all of them run. `formula(primitive, device, dtype) -> str | None`: likewise why a
step beside convolutions runs by its plain formula; without it, `explain` says nothing of them. `pays(primitive, unit, pixels) ->
bool`: whether, with something fused into it, it is faster than the library's and the passes that it leaves; without it, it is
taken to be. `tiles(primitive, weight, pixels, operands)`: the tiles of its convolution that are worth trying and that the
weight's device can run, and `tile(*numbers)`: one of them from its numbers. `lends(device) -> bool`: whether its convolutions and
its steps of the moment form that multiply, which must then be torch operators, are tried beside another backend's when that one's
are tuned; without it, they are not.
"""

import functools
import importlib
import pkgutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from fused_res.internals import is_profiled


def names() -> list[str]:
    """Names of all backends, whether they can run here or not."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


NAMES = tuple(names())
LIBRARY = "reference"
"""The backend that has no convolutions of its own: the library's run."""
AUTO = "auto"
"""The name that stands for the preferred one of the backends that can run."""


@functools.cache
def load(name: str) -> ModuleType:
    """The backend's module. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def watched(name: str, call: Callable) -> AbstractContextManager:
    """Inside, `call` gets the launches of this backend's kernels that are none of torch's operators."""
    watching = getattr(load(name), "watching", None)
    return nullcontext() if watching is None else watching(call)


def observed(name: str) -> Callable[[], bool]:
    """Asks whether somebody looks on who would miss what the compiled library calls."""
    told = getattr(load(name), "observed", None)
    return is_profiled if told is None else lambda: is_profiled() or told()


def compiled(name: str) -> bool:
    """Whether the compiled library is there, and to run what was recorded of this backend's calls: of all but the formulas."""
    return name != LIBRARY and load("native").loads()


def supports(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot run on this device with this dtype, or None where it can."""
    return load(name).supports(device, dtype)


def lenders(name: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends whose convolutions and steps are tried beside those of this one."""
    lending = [other for other in NAMES if other != name and getattr(load(other), "lends", lambda device: False)(device)]
    return [other for other in lending if supports(other, device, dtype) is None]


@functools.cache
def _tell_of_formulas(device_type: str) -> None:
    """Warn, once for each type of device, where only the plain formulas can run, unless somebody asked for that."""
    device = torch.device(device_type)
    preferred = [name for name in NAMES if load(name).preference(device) > load(LIBRARY).preference(device)]
    reasons = {name: supports(name, device, torch.float32) for name in preferred}
    if None not in reasons.values() and not any("FUSED_RES_NATIVE=0" in reason for reason in reasons.values()):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        message = f"fused_res: blocks on {device_type} run on the plain formulas (backend {LIBRARY!r}), more slowly. {why}"
        warnings.warn(message, stacklevel=3)


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: the named one, or the preferred one of those that can run for `AUTO`.

    Warns, once, where for `AUTO` nothing but the plain formulas can run, with the reasons.

    Raises:
        RuntimeError: if the named backend cannot run on this device with this dtype, with the reason.
    """
    if name == AUTO:
        by_preference = sorted(NAMES, key=lambda name: load(name).preference(device), reverse=True)
        found = next(name for name in by_preference if supports(name, device, dtype) is None)
        if found == LIBRARY and device.type != "meta":
            _tell_of_formulas(device.type)
        return found
    reason = supports(name, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this block: {reason}")
    return name
