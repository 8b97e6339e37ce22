"""Who runs a convolution: the library (cuDNN; oneDNN or MKL on a CPU), or the backend's own kernel, with which tile; or, where that
was measured to be the fastest, one that another backend lends. Likewise who runs a step of the moment form that multiplies.

The backend's own kernel runs what has something fused into it, where the backend says that this pays, and the library the rest.
What was tuned stands: the own kernel runs what it was measured to be right and faster at, as `fused_res.plans` knows, and under
FUSED_RES_TUNE=1 nothing else. FUSED_RES_CONVOLUTIONS=library leaves all to the library, FUSED_RES_CONVOLUTIONS=own leaves to the
kernel whatever has something fused into it. A step of the moment form is the backend's own unless another one's was measured to be
right and faster.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import backends, plans, settings
from fused_res.spec import ConvBN


class Choice(NamedTuple):
    """own: the backend's kernel, with the tile `config` (None: the kernel's default); or else the library. why: for `explain`.

    lender: the backend whose kernel runs in place of the own one, "" for none.
    """

    own: bool
    config: tuple | None = None
    why: str = ""
    lender: str = ""


class Call(NamedTuple):
    """A convolution that a backend is asked for: `operands` are the arguments of its kernel's launcher, less the unit."""

    primitive: str
    backend: str
    unit: ConvBN
    operands: tuple

    @property
    def fused(self) -> tuple[str | bool, ...]:
        """What each operand makes the kernel compute beside the convolution, whatever its sizes; empty or false for nothing."""
        return tuple(operand if isinstance(operand, bool) else getattr(operand, "kind", "") for operand in self.operands)

    def key(self) -> tuple:
        """What a choice depends on: geometry, dtype, what is fused into the convolution, and torch's own switches."""
        unit, weight = self.unit, self.unit.weight
        shapes = tuple(_shape(operand) for operand in self.operands[:2])
        steps = (tuple(unit.stride), tuple(unit.padding), tuple(unit.dilation), unit.groups)
        where = (weight.device, weight.dtype, *switches(weight.device))
        return (self.primitive, self.backend, *where, tuple(weight.shape), *shapes, *steps, self.fused)


STEPS = ("moments", "pointwise_tail", "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply")
"""The steps of the moment form that multiply, which backends lend each other as they do convolutions."""


class StepCall(NamedTuple):
    """One of `STEPS` that a backend is asked for: `operands` are the arguments of its kernel's launcher, `device` and `dtype` those
    of the image that it reads.
    """

    primitive: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    operands: tuple

    def key(self) -> tuple:
        """What a choice depends on: shapes, dtype, what there is of operands, and torch's own switches."""
        operands = list(self.operands)
        if self.primitive == "pointwise_tail_backward_apply":
            operands[4] = None  # g A, which is there or not as whoever ran the step before has kernels for it
        where = self.device, self.dtype, *switches(self.device)
        return (self.primitive, self.backend, *where, *map(_described, operands))


def _described(operand: object) -> object:
    """Shapes and numbers in place of tensors."""
    if isinstance(operand, Tensor):
        return tuple(operand.shape)
    if hasattr(operand, "image"):
        return tuple(operand.image.shape), operand.kind, tuple(operand.stride)
    return tuple(map(_described, operand)) if isinstance(operand, tuple) else operand


def switches(device: torch.device) -> tuple:
    """torch's switches that change what its convolutions do, or how long they take."""
    library = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    return library.conv.fp32_precision, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


def _shape(operand: object) -> tuple[int, ...]:
    image = operand if isinstance(operand, Tensor) else getattr(operand, "image", None)
    return () if image is None else tuple(image.shape)


def own_kernel(call: Call) -> tuple[Callable | None, str]:
    """The backend's own kernel for the convolution, or None and the reason."""
    if call.backend == backends.LIBRARY:
        return None, ""
    if call.unit.groups != 1:
        return None, "grouped"
    backend = backends.load(call.backend)
    declined = getattr(backend, "declined", None)
    why = None if declined is None else declined(call.primitive, call.unit, call.operands[0].pixels)
    kernel = backend.find(call.primitive, call.unit.weight.device) if why is None else None
    return kernel, "" if kernel is not None else why or "no kernel"


def lent_kernels(call: Call) -> dict[str, Callable]:
    """What other backends lend for the convolution, by their names; nothing where the backend has no kernel of its own."""
    if own_kernel(call)[0] is None:
        return {}
    weight = call.unit.weight
    lenders = backends.lenders(call.backend, weight.device, weight.dtype)
    lent = {name: own_kernel(call._replace(backend=name))[0] for name in lenders}
    return {name: kernel for name, kernel in lent.items() if kernel is not None}


def lent_step(call: StepCall, name: str) -> Callable | None:
    """The kernel of the backend `name` for the step, or None where it has none, or runs its plain formula."""
    backend = backends.load(name)
    formula = getattr(backend, "formula", None)
    declined = None if formula is None else formula(call.primitive, call.device, call.dtype)
    return backend.find(call.primitive, call.device) if declined is None else None


def has_step(call: StepCall) -> bool:
    """Whether the backend has a kernel of its own for the step."""
    return call.backend != backends.LIBRARY and backends.load(call.backend).find(call.primitive, call.device) is not None


def lent_steps(call: StepCall) -> list[str]:
    """The other backends that lend a kernel for the step; none where the backend has no kernel of its own."""
    if not has_step(call):
        return []
    return [name for name in backends.lenders(*call[1:4]) if lent_step(call, name) is not None]


def settled_step(call: StepCall) -> Choice:
    """The choice for a step that the backend's own kernel can run: that one, or a lender's."""
    return plans.ask(call.key(), Choice(True)) if plans.remembers() else Choice(True)


def choose(call: Call) -> Choice:
    """The choice that holds for this convolution."""
    kernel, why = own_kernel(call)
    return Choice(False, why=why) if kernel is None else settled(call)


def settled(call: Call) -> Choice:
    """The choice for a convolution that the backend's own kernel can run."""
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
