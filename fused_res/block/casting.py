"""A block's tensors in the dtype that it computes in."""

import torch
from torch import Tensor

from fused_res.block.packing import tensors_of
from fused_res.spec import Block, ConvBN


def as_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in this dtype. Nothing is left of the cast in exported graphs where it does nothing."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def with_dtype(block: Block, dtype: torch.dtype) -> Block:
    """The block with its convolutions' tensors cast; BN's keep their dtype."""

    def cast(unit: ConvBN | None) -> ConvBN | None:
        if unit is None or (unit.weight.dtype == dtype and (unit.bias is None or unit.bias.dtype == dtype)):
            return unit
        return unit._replace(weight=as_dtype(unit.weight, dtype), bias=as_dtype(unit.bias, dtype))

    return block._replace(main=[cast(unit) for unit in block.main], projection=cast(block.projection))


def present(block: Block) -> list[Tensor]:
    """The tensors of its units that reach the operator, as `fused_res.block.packing.pack` lists them."""
    return [tensor for unit in block.units() for tensor in tensors_of(unit) if tensor is not None]
