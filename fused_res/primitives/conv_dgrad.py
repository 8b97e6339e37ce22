"""`conv_dgrad`: the gradient of a convolution's input. The plain formula is the library's."""

import torch
from torch import Tensor

from fused_res.primitives.common import select
from fused_res.spec import ConvBN


def plain(dy: Tensor, like: Tensor, unit: ConvBN) -> Tensor:
    geometry = (unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)
    return torch.ops.aten.convolution_backward(dy, like, unit.weight, None, *geometry, (True, False, False))[0]


def conv_dgrad(dy: Tensor, like: Tensor, unit: ConvBN, *, backend: str) -> Tensor:
    """dx = dy * weight^T.

    Args:
        dy: gradient of the output, [N, K, H', W'], channels_last.
        like: any tensor of the input's shape [N, C, H, W], dtype and layout (channels_last); its values are not read.
        unit: as in `conv_fprop`.

    Returns:
        dx, a fresh tensor of the shape of `like`, channels_last.
    """
    dx = select("conv_dgrad", backend, plain)(dy, like, unit)
    return dx.contiguous(memory_format=torch.channels_last)
