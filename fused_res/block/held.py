"""The biases of a block, which its backward holds but does not save: an optimizer may step them between two backwards.

Autograd refuses a backward once a saved tensor has been written to, and eager saves no bias of a convolution or a BN. Nor are their
values needed: only the gradient of a residual scale takes the last BN's, and that from a copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.spec import tensor_fields


class Held(NamedTuple):
    """For each tensor of `fused_res.spec.pack` itself if it is a bias, with a copy where its values matter; else None."""

    biases: tuple[tuple[Tensor, Tensor | None] | None, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], spec: Sequence[int], scaled: bool) -> "Held":
        """`scaled`: whether there is a residual scale."""
        biases, last = [], spec[0] - 1
        for tensor, (u, name) in zip(tensors, tensor_fields(spec), strict=True):
            matters = scaled and u == last and name == "beta"
            biases.append((tensor, tensor.detach().clone() if matters else None) if name in ("bias", "beta") else None)
        return cls(tuple(biases))

    def others(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors to save."""
        return [tensor for tensor, held in zip(tensors, self.biases, strict=True) if held is None]

    def restore(self, saved: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """All tensors in their order, from the saved ones; and what was saved behind them."""
        rest = iter(saved)
        return [next(rest) if held is None else _restored(*held) for held in self.biases], list(rest)


def _restored(bias: Tensor, copy: Tensor | None) -> Tensor:
    if copy is None:
        return bias
    with torch.enable_grad():
        return valued(bias, copy)


def valued(tensor: Tensor, value: Tensor) -> Tensor:
    """What depends on the tensor as it does on itself, at a value of its own: the forward's, whatever has been written since."""
    return tensor + (value - tensor.detach()) if tensor.requires_grad else value
