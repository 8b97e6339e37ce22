"""Calls of a block that look like an earlier one, which go the same way without anything being looked up.

`fused_res.call` and `fused_res.block.program` find what was worked out for a call by the looks of its tensors: shapes, dtypes,
strides and more, of all of them. To put those together takes as long as many a kernel. Of a block whose modules are as they were
(`fused_res.standing`) torch is asked instead, in one question, whether all tensors look as they did.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import internals, planner, plans
from fused_res.block import program
from fused_res.block.prepared import Prepared

_MOST = 4
"""Calls of one block that are kept: as many as there are sizes of images, modes and layouts that take turns."""


class _Back(NamedTuple):
    """A program of the backward. order: for each of the operator's arguments which of the results is its gradient; -1: none."""

    alike: Callable[..., bool]
    beside: tuple
    program: Callable
    order: tuple[int, ...]


class Again:
    """What an earlier call needed.

    call: what `fused_res.call.prepare` found. save: whether it kept what the backward needs. program: of its forward, with the
    buffers that this writes to, where that is to be replayed as a whole.
    """

    def __init__(self, call: Prepared, save: bool, program: Callable | None, buffers: Sequence[Tensor]) -> None:
        self.call, self.save, self.program, self.buffers = call, save, program, buffers
        self._backs: dict[tuple[bool, ...], _Back] = {}

    def looks_for(self, tensors: Sequence[Tensor], level: str | None) -> "Again":
        """The same, to be found by the looks of these tensors and the level that the block asks for."""
        self._ways, self._alike, self._places = ways(tensors[0], level), internals.alike(tensors), _places(tensors)
        return self

    def fits(self, tensors: Sequence[Tensor], ways: tuple) -> bool:
        return self._ways == ways and self._alike(*tensors) and self._places == _places(tensors)

    def forward(
        self, x: Tensor, skip: Tensor | None, residual_scale: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The block's output and what its backward needs, below autograd."""
        out, saved = program.replay(self.program, (x, skip, residual_scale, *tensors, *self.buffers))
        if self.buffers:
            torch.autograd.graph.increment_version(self.buffers)
        return out, saved

    def backward(self, needs: tuple[bool, ...], inputs: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """The gradients of the operator's arguments, None where not needed; or None where nothing like it has been kept.

        Args:
            needs: of every argument of the operator whether it needs one.
            inputs: the program's; dout first, x second.
        """
        back = self._backs.get(needs)
        if back is None:
            return None
        tensors = [tensor for tensor in inputs if tensor is not None]
        if back.beside != _beside(tensors) or not back.alike(*tensors):
            return None
        with internals.below_autograd():
            found = [*program.replay(back.program, inputs), None]
        return [found[i] for i in back.order]

    def keep_backward(
        self, needs: tuple[bool, ...], inputs: Sequence[Tensor | None], found: Callable, gradients: Sequence[Tensor | None]
    ) -> None:
        """Keep the program `found`, which makes these gradients of such inputs."""
        order, made = [], 0
        for gradient in gradients:
            order.append(-1 if gradient is None else made)
            made += gradient is not None
        tensors = [tensor for tensor in inputs if tensor is not None]
        self._backs[needs] = _Back(internals.alike(tensors), _beside(tensors), found, tuple(order))


def _places(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """What Triton compiles anew for: where on a GPU they lie."""
    return tuple([tensor.data_ptr() % 16 for tensor in tensors]) if tensors[0].is_cuda else ()


def _beside(tensors: Sequence[Tensor]) -> tuple:
    """What the way back depends on beside the looks. How kernels read sign bits, which come last, depends on where they lie."""
    return tensors[-1].data_ptr() % 16, program.switches(tensors[0].device.type), _places(tensors)


def ways(x: Tensor, level: str | None) -> tuple:
    """What the way forward depends on beside the looks."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return level, planner.forced(), plans.age(), torch.is_grad_enabled(), autocast, program.switches(kind)


def find(seen: Sequence[Again], tensors: Sequence[Tensor], level: str | None) -> Again | None:
    """The earlier call that these tensors look like, the first of which is x; None if there is none.

    Args:
        seen: those of one block.
        tensors: all that its modules have, too.
        level: that of `fuse`.
    """
    if not seen:
        return None
    now = ways(tensors[0], level)
    for known in seen:
        if known.fits(tensors, now):
            return known
    return None


def keep(seen: list[Again], again: Again) -> None:
    """Keep one more, and let go of the oldest."""
    seen[:] = [*seen[1 - _MOST :], again]
