"""The biases of a block, which its backward holds but does not save: an optimizer may step them between two backwards.

Autograd refuses a backward once a saved tensor has been written to, and eager saves no bias of a convolution or a BN. Nor are their
values needed: only the gradient of a residual scale takes the last one, and that from a copy.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.block.packing import form_of, tensor_fields, without_running_statistics


class Kept(NamedTuple):
    """What the backward keeps of the tensors of `pack`, running statistics apart: those it saves, then the biases.

    indices: which of the tensors are kept; spec: the integers of `pack` for these alone. saved, biases: their places among all
    tensors. order: for each that is kept its place in saved and biases together. copied: where among the kept ones the bias is
    whose values matter, if there is one.
    """

    indices: tuple[int, ...]
    spec: tuple[int, ...]
    saved: tuple[int, ...]
    biases: tuple[int, ...]
    order: tuple[int, ...]
    copied: int | None

    def tensors(self, rest: Sequence[Tensor], biases: Sequence[Tensor], copy: Tensor | None) -> list[Tensor]:
        """Those that are kept, in their order, from what starts with the saved ones."""
        pool = [*rest[: len(self.saved)], *biases]
        tensors = [pool[i] for i in self.order]
        if copy is not None:
            with torch.enable_grad():
                tensors[self.copied] = valued(tensors[self.copied], copy)
        return tensors


@functools.cache
def kept_of(spec: tuple[int, ...], scaled: bool) -> Kept:
    """For the integers of `pack`; `scaled`: whether there is a residual scale."""
    indices, kept_spec = without_running_statistics(spec)
    fields, last = tensor_fields(spec), spec[0] - 1
    saved = tuple(i for i in indices if fields[i][1] not in ("bias", "beta"))
    biases = tuple(i for i in indices if i not in saved)
    order = tuple((*saved, *biases).index(i) for i in indices)
    end = (last, "bias" if form_of(spec).preactivated else "beta")
    copied = indices.index(fields.index(end)) if scaled and end in fields else None
    return Kept(tuple(indices), tuple(kept_spec), saved, biases, order, copied)


def copy_of(kept: Kept, tensors: Sequence[Tensor]) -> Tensor | None:
    """A copy of the bias whose values matter."""
    return None if kept.copied is None else tensors[kept.indices[kept.copied]].detach().clone()


def valued(tensor: Tensor, value: Tensor) -> Tensor:
    """What depends on the tensor as it does on itself, at a value of its own: the forward's, whatever has been written since."""
    return tensor + (value - tensor.detach()) if tensor.requires_grad else value
