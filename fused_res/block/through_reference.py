"""The gradients of a block in ordinary autograd, from what its forward saved: of any order, for batched and dual tensors too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res import reference
from fused_res.block.forward import Saved
from fused_res.block.held import valued
from fused_res.block.packing import tensor_fields, unpack
from fused_res.layout import in_layout, is_channels_last
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.bn_finalize import Vectors
from fused_res.spec import FORMS, Block, ConvBN


class _Leaves:
    """The block's tensors under new names: gradients of these stop there, however the tensors themselves depend on each other.

    They hang on the tensors that they stand for, so that further derivatives can be taken.
    """

    def __init__(self, x: Tensor, residual_scale: Tensor | None, tensors: Sequence[Tensor], saved, spec, eps, level) -> None:
        self.x, self.residual_scale = _alias(x), None if residual_scale is None else _alias(residual_scale)
        block = unpack(tensors, spec, eps)
        state = Saved.from_list(saved, block, level)
        last, preactivated = len(block.main) - 1, FORMS[block.form].preactivated
        self.tensors = []
        for (u, name), tensor in zip(tensor_fields(spec), tensors, strict=True):
            # Whose values a residual scale multiplies are there as they were.
            scaled = u == last and residual_scale is not None and name == ("bias" if preactivated else "beta")
            if name == "bias" and not scaled:
                self.tensors.append(valued(tensor, torch.zeros_like(tensor, requires_grad=False)))
            elif name == "beta" and not scaled:
                v = Vectors(*state.vectors[u])
                self.tensors.append(valued(tensor, (v.shift + v.scale * v.mean).to(tensor.dtype)))
            else:
                self.tensors.append(_alias(tensor))
        self.block = _with_running_statistics(unpack(self.tensors, spec, eps), state.vectors, preactivated)
        self.signs = state.signs

    def out(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output where the shortcut is no given tensor, or its main branch's; and where the outer ReLU is open.

        The saved signs stand in for the ReLU, so that a given shortcut's value need not be kept; without a ReLU all is open.
        """
        n, channels, h, w = dout.shape
        if self.signs is None:
            open_ = torch.ones((), dtype=torch.bool, device=dout.device)
        else:
            # In the gradient's own layout: a mask in another one makes autograd's batched gradients wrong (torch 2.13, one image).
            open_ = in_layout(unpack_signs(self.signs, channels).view(n, h, w, -1).permute(0, 3, 1, 2), is_channels_last(self.x))
        block = self.block
        skip = torch.zeros((), dtype=dout.dtype, device=dout.device).expand(dout.shape) if block.given else block.projection
        out = reference.residual_block(
            self.x,
            block.main,
            skip,
            pool=block.pool,
            residual_scale=self.residual_scale,
            form=block.form,
            last_activation=None if self.signs is None else lambda total: torch.where(open_, total, 0),
        )
        return out, open_


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor


def _with_running_statistics(block: Block, vectors: Sequence[Tensor], preactivated: bool) -> Block:
    """The block with the statistics that the forward normalised by, where those were running ones: its biases are zero here.

    A bias that is not, that of a last convolution without a BN, stands behind all of them.
    """

    def restore(unit: ConvBN, rows: Tensor) -> ConvBN:
        if unit.training:
            return unit
        dtype = unit.weight.dtype if unit.gamma is None else unit.gamma.dtype
        v = Vectors(*rows)
        return unit._replace(running_mean=v.mean.to(dtype), running_var=v.var.to(dtype))

    if preactivated:  # whose projection has no BN
        return block._replace(main=[restore(unit, rows) for unit, rows in zip(block.main, vectors, strict=True)])
    units = [restore(unit, rows) for unit, rows in zip(block.units(), vectors, strict=True)]
    count = len(block.main)
    return block._replace(main=units[:count], projection=units[count] if block.projection is not None else None)


def _first(dout: Tensor, leaves: _Leaves, needs: Sequence[bool], create_graph: bool) -> list[Tensor | None]:
    """The gradients asked for, in the order of `needs`: x, skip, residual scale, tensors."""
    out, open_ = leaves.out(dout)
    asked = [leaves.x, None, leaves.residual_scale, *leaves.tensors]
    of = [leaf for leaf, needed in zip(asked, needs, strict=True) if needed and leaf is not None]
    found = iter(torch.autograd.grad(out, of, dout, create_graph=create_graph, allow_unused=True) if of else ())
    return [torch.where(open_, dout, 0) if leaf is None else next(found) for leaf, n in zip(asked, needs, strict=True) if n]


def reference_gradients(dout, x, residual_scale, tensors, saved, spec, eps, needs, level) -> list[Tensor]:
    """As the operator `block_backward`."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaves = _Leaves(x, residual_scale, tensors, saved, spec, eps, level)
        return _first(dout, leaves, needs, create_graph=False)


def second_gradients(incoming, dout, x, residual_scale, tensors, saved, spec, eps, needs, level):
    """The gradients of dout, x, the residual scale and the list of those of the tensors, for those of block_backward's outputs.

    They can be differentiated again where gradients are enabled.
    """
    further = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaves = _Leaves(x, residual_scale, tensors, saved, spec, eps, level)
        dout = _alias(dout)
        first = _first(dout, leaves, needs, create_graph=True)
        pairs = [(f, i) for f, i in zip(first, incoming, strict=True) if f is not None and f.requires_grad and i is not None]
        inputs = [dout, leaves.x, leaves.residual_scale, *leaves.tensors]
        of = [leaf for leaf in inputs if leaf is not None and leaf.requires_grad]
        second = [None] * len(of)
        if pairs and of:
            ours, theirs = zip(*pairs, strict=True)
            second = torch.autograd.grad(ours, of, theirs, create_graph=further, allow_unused=True)
    found = iter(second)
    of_dout, of_x, of_scale, *of_tensors = (next(found) if leaf is not None and leaf.requires_grad else None for leaf in inputs)
    return of_dout, of_x, of_scale, of_tensors
