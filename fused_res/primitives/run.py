"""Who carries out the primitives: an object that each of them is given, and that alone says which kernel runs."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fused_res import backends
from fused_res.primitives.choice import Call, Choice, StepCall, lent_step, own_kernel, settled, settled_step
from fused_res.spec import ConvBN


class Run:
    """By the kernels of one backend, and by plain formulas where it has none."""

    def __init__(self, backend: str) -> None:
        """Raises ValueError for an unknown name, as soon as a kernel is looked up."""
        self.backend = backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.backend!r})"

    def find(self, primitive: str, device: torch.device) -> Callable | None:
        """The backend's implementation of the primitive on this device, or None where the plain formula runs."""
        # Nobody is asked for those that have none: torch.compile cannot follow that.
        return None if self.backend == backends.LIBRARY else backends.load(self.backend).find(primitive, device)

    def find_joined(self, primitive: str, device: torch.device) -> Callable | None:
        """As `find`, of a primitive that does in one call what others do in several, which run where it has none."""
        return self.find(primitive, device)

    def convolution(self, primitive: str, unit: ConvBN, *operands: object) -> Callable | None:
        """The backend's own kernel, or one that is lent, to be called with the operands (the unit comes second), or None where the
        library runs.

        Args:
            operands: the arguments of the kernel's launcher but the unit.
        """
        if self.backend == backends.LIBRARY:
            return None
        call = Call(primitive, self.backend, unit, operands)
        kernel, _ = own_kernel(call)
        choice = None if kernel is None else self._choice(call)
        if choice is None or not choice.own:
            return None
        if choice.lender:
            kernel, why = own_kernel(call._replace(backend=choice.lender))
            if kernel is None:
                raise RuntimeError(f"{primitive}: was to be run by backend {choice.lender!r}, which has {why}")
        return kernel if choice.config is None else functools.partial(kernel, config=choice.config)

    def step(self, primitive: str, image: Tensor, *operands: object) -> Callable | None:
        """As `find`, of one of `fused_res.primitives.choice.STEPS`, which another backend may have been measured to be faster at.

        Args:
            image: what the step reads.
            operands: the arguments of the kernel's launcher.
        """
        own = self.find(primitive, image.device)
        if own is None:
            return None
        call = StepCall(primitive, self.backend, image.device, image.dtype, operands)
        lender = self._choice_of_step(call).lender
        if not lender:
            return own
        kernel = lent_step(call, lender)
        if kernel is None:
            raise RuntimeError(f"{primitive}: was to be run by backend {lender!r}, which has no kernel")
        return kernel

    def library(self) -> "Run":
        """The same with the library's convolutions."""
        return _with_library(self.backend)

    def _choice(self, call: Call) -> Choice:
        return settled(call)

    def _choice_of_step(self, call: StepCall) -> Choice:
        return settled_step(call)


of = functools.cache(Run)
"""The run by a backend of this name: one and the same object each time."""

PLAIN = of(backends.LIBRARY)
"""By plain formulas alone, and the library's convolutions."""


class _Library(Run):
    """By the backend's kernels, but for convolutions, which are the library's."""

    def convolution(self, primitive: str, unit: ConvBN, *operands: object) -> None:
        return None

    def library(self) -> "Run":
        return self


_with_library = functools.cache(_Library)


class Fixed(Run):
    """One choice for every convolution, and every step that is lent, that the backend's own kernel can run: what is being tried."""

    def __init__(self, backend: str, choice: Choice) -> None:
        super().__init__(backend)
        self._fixed = choice

    def _choice(self, call: Call) -> Choice:
        return self._fixed

    def _choice_of_step(self, call: StepCall) -> Choice:
        return self._fixed


class Recording(Run):
    """By plain formulas, so that tensors without data will do; what is asked for is noted.

    `calls` are the convolutions, `steps` the names of the other primitives, those inside of plain formulas too, in order, and
    `step_calls` those of them that backends lend each other.
    """

    def __init__(self, backend: str, like: "Recording | None" = None) -> None:
        """like: one whose lists this one goes on with."""
        super().__init__(backend)
        self.calls: list[Call] = [] if like is None else like.calls
        self.steps: list[str] = [] if like is None else like.steps
        self.step_calls: list[StepCall] = [] if like is None else like.step_calls

    def find(self, primitive: str, device: torch.device) -> None:
        self.steps.append(primitive)

    def find_joined(self, primitive: str, device: torch.device) -> None:
        return None

    def convolution(self, primitive: str, unit: ConvBN, *operands: object) -> None:
        self.calls.append(Call(primitive, self.backend, unit, operands))

    def step(self, primitive: str, image: Tensor, *operands: object) -> None:
        self.find(primitive, image.device)
        self.step_calls.append(StepCall(primitive, self.backend, image.device, image.dtype, operands))

    def library(self) -> "Recording":
        return Recording(backends.LIBRARY, self)
