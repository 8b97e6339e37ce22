"""Who runs a convolution: the library (cuDNN; oneDNN or MKL on a CPU), or the backend's own kernel, with which tile.

The backend's own kernel runs what has something fused into it, where the backend says that this pays, and the library the rest.
What was tuned stands: the own kernel runs what it was measured to be right and faster at, as `fused_res.plans` knows, and under
FUSED_RES_TUNE=1 nothing else. FUSED_RES_CONVOLUTIONS=library leaves all to the library, FUSED_RES_CONVOLUTIONS=own leaves to the
kernel whatever has something fused into it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import backends, plans, settings
from fused_res.primitives.operands import Activation, Addend, Gradient, Output
from fused_res.spec import ConvBN


class Choice(NamedTuple):
    """own: the backend's kernel, with the tile `config` (None: the kernel's default); or else the library. why: for `explain`."""

    own: bool
    config: tuple | None = None
    why: str = ""


class Call(NamedTuple):
    """A convolution that a backend is asked for: `operands` are the arguments of its kernel's launcher, less the unit."""

    primitive: str
    backend: str
    unit: ConvBN
    operands: tuple

    @property
    def fused(self) -> tuple[str | bool, ...]:
        """What each operand makes the kernel compute beside the convolution, whatever its sizes; empty or false for nothing."""
        return tuple(_kind(operand) for operand in self.operands)

    def key(self) -> tuple:
        """What a choice depends on: geometry, dtype, what is fused into the convolution, and torch's own switches."""
        unit, weight = self.unit, self.unit.weight
        shapes = tuple(_shape(operand) for operand in self.operands[:2])
        steps = (tuple(unit.stride), tuple(unit.padding), tuple(unit.dilation), unit.groups)
        where = (weight.device, weight.dtype, *switches(weight.device))
        return (self.primitive, self.backend, *where, tuple(weight.shape), *shapes, *steps, self.fused)


def switches(device: torch.device) -> tuple:
    """torch's switches that change what its convolutions do, or how long they take."""
    library = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    return library.conv.fp32_precision, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


def _shape(operand: object) -> tuple[int, ...]:
    image = operand if isinstance(operand, Tensor) else getattr(operand, "image", None)
    return () if image is None else tuple(image.shape)


def _kind(operand: object) -> str | bool:
    if isinstance(operand, Activation):
        return "" if operand.vectors is None else "bn relu"
    if isinstance(operand, Gradient):
        if operand.coefficients is None:
            return ""
        mask = "masked" if operand.masked else "signs" if operand.signs is not None else "relu"
        return f"{mask} bn{'' if operand.training else ', running statistics'}"
    if isinstance(operand, Output):
        shortcut = "y2" if operand.y2 is not None else "skip" if operand.skip is not None else "none"
        return f"output, {shortcut}{'' if operand.relu else ', no ReLU'}"
    if isinstance(operand, Addend):
        return f"{'plain' if operand.signs is None else 'masked'} addend, stride {operand.stride[0]} {operand.stride[1]}"
    return operand if isinstance(operand, bool) else ""


_imposed: ContextVar[Choice | None] = ContextVar("imposed", default=None)


@contextmanager
def imposing(choice: Choice) -> Iterator[None]:
    """Inside, this is the choice for every convolution that the backend's own kernel could run."""
    token = _imposed.set(choice)
    try:
        yield
    finally:
        _imposed.reset(token)


def own_kernel(call: Call) -> tuple[Callable | None, str]:
    """The backend's own kernel for the convolution, or None and the reason."""
    if call.backend == backends.LIBRARY:
        return None, ""
    if call.unit.groups != 1:
        return None, "grouped"
    backend = backends.load(call.backend)
    takes = getattr(backend, "takes", None)
    taken = takes is None or takes(call.primitive, call.unit, call.operands[0].pixels)
    kernel = backend.find(call.primitive, call.unit.weight.device) if taken else None
    return kernel, "" if kernel is not None else "no kernel"


def choose(call: Call) -> Choice:
    """The choice that holds for this convolution."""
    kernel, why = own_kernel(call)
    return Choice(False, why=why) if kernel is None else _choose(call)


def _choose(call: Call) -> Choice:
    """The choice for a convolution that the backend's own kernel can run."""
    imposed = _imposed.get()
    if imposed is not None:
        return imposed
    asked = settings.convolutions()
    if asked == "library":
        return Choice(False, why="FUSED_RES_CONVOLUTIONS=library")
    if plans.remembers():
        return plans.ask(call.key(), Choice(False, why="not measured") if settings.tune() else _by_rule(call, asked))
    return _by_rule(call, asked)


def _by_rule(call: Call, asked: str) -> Choice:
    if not any(call.fused):
        return Choice(False, why="nothing fused")
    pays = getattr(backends.load(call.backend), "pays", None)
    if asked != "own" and pays is not None and not pays(call.primitive, call.unit, call.operands[0].pixels):
        return Choice(False, why="faster at this size")
    return Choice(True)


def convolution(primitive: str, backend: str, unit: ConvBN, *operands: object) -> Callable | None:
    """The backend's own kernel, to be called with the operands (the unit comes second), or None where the library runs.

    Args:
        operands: the arguments of the kernel's launcher but the unit.
    """
    calls = plans.recorder()
    if calls is None and backend == backends.LIBRARY:
        return None
    call = Call(primitive, backend, unit, operands)
    if calls is not None:
        calls.append(call)
        return None
    kernel, _ = own_kernel(call)
    choice = None if kernel is None else _choose(call)
    if choice is None or not choice.own:
        return None
    return kernel if choice.config is None else functools.partial(kernel, config=choice.config)
