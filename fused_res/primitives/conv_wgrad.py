"""`conv_wgrad`: the gradient of a convolution's weight. The plain formula is the library's."""

import torch
from torch import Tensor

from fused_res.primitives.common import select
from fused_res.spec import ConvBN


def plain(dy: Tensor, x: Tensor, unit: ConvBN) -> Tensor:
    geometry = (unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)
    return torch.ops.aten.convolution_backward(dy, x, unit.weight, None, *geometry, (False, True, False))[1]


def conv_wgrad(dy: Tensor, x: Tensor, unit: ConvBN, *, backend: str) -> Tensor:
    """dweight = sum over the pixels of dy x.

    Args:
        dy: gradient of the output, [N, K, H', W'], channels_last.
        x: the convolution's input, [N, C, H, W], channels_last.
        unit: as in `conv_fprop`.

    Returns:
        dweight [K, C / groups, R, S] in the weight's dtype.
    """
    return select("conv_wgrad", backend, plain)(dy, x, unit)
