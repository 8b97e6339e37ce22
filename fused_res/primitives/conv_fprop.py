"""`conv_fprop`: a convolution's output. The plain formula is the library's convolution (cuDNN on a GPU, oneDNN on a CPU)."""

import torch
from torch import Tensor

from fused_res.primitives.common import select
from fused_res.spec import ConvBN


def plain(x: Tensor, unit: ConvBN) -> Tensor:
    return torch.convolution(x, unit.weight, None, unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)


def conv_fprop(x: Tensor, unit: ConvBN, *, backend: str) -> Tensor:
    """y = x * weight, without the bias: BN takes it into account where it matters.

    Args:
        x: [N, C, H, W], channels_last.
        unit: weight [K, C / groups, R, S] of x's dtype, stride, padding, dilation, groups.

    Returns:
        y [N, K, H', W'] in x's dtype, channels_last. Errors are the library's own (RuntimeError).
    """
    y = select("conv_fprop", backend, plain)(x, unit)
    return y.contiguous(memory_format=torch.channels_last)
