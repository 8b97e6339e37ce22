"""The biases of a block, which its backward holds but does not save: an optimizer may step them between two backwards.

Autograd refuses a backward once a saved tensor has been written to, and eager saves no bias of a convolution or a BN. Nor are their
values needed: only the gradient of a residual scale takes the last BN's, and that from a copy.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.spec import tensor_fields


class _Places(NamedTuple):
    """Which of the tensors of `fused_res.spec.pack` are saved, and for each: its place among those, or None for a bias.

    `copied` is the bias whose values matter, if there is one.
    """

    saved: tuple[int, ...]
    places: tuple[int | None, ...]
    copied: int | None


@functools.cache
def _places(spec: tuple[int, ...], scaled: bool) -> _Places:
    fields, last = tensor_fields(spec), spec[0] - 1
    saved = tuple(i for i, (_, name) in enumerate(fields) if name not in ("bias", "beta"))
    places = tuple(saved.index(i) if i in saved else None for i in range(len(fields)))
    copied = next((i for i, (u, name) in enumerate(fields) if scaled and u == last and name == "beta"), None)
    return _Places(saved, places, copied)


class Held(NamedTuple):
    """The tensors of `fused_res.spec.pack`, and where they are."""

    where: _Places
    biases: tuple[Tensor | None, ...]
    """None in the place of those that are saved."""
    copy: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], spec: Sequence[int], scaled: bool) -> "Held":
        """`scaled`: whether there is a residual scale."""
        where = _places(tuple(spec), scaled)
        biases = tuple([t if place is None else None for t, place in zip(tensors, where.places, strict=True)])
        return cls(where, biases, None if where.copied is None else tensors[where.copied].detach().clone())

    def others(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors to save."""
        return [tensors[i] for i in self.where.saved]

    def restore(self, saved: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """All tensors in their order, from the saved ones; and what was saved behind them."""
        tensors = [bias if i is None else saved[i] for bias, i in zip(self.biases, self.where.places, strict=True)]
        if self.copy is not None:
            with torch.enable_grad():
                tensors[self.where.copied] = valued(tensors[self.where.copied], self.copy)
        return tensors, saved[len(self.where.saved) :]


def valued(tensor: Tensor, value: Tensor) -> Tensor:
    """What depends on the tensor as it does on itself, at a value of its own: the forward's, whatever has been written since."""
    return tensor + (value - tensor.detach()) if tensor.requires_grad else value
