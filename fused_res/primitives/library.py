"""The library's convolutions: cuDNN's on a GPU, oneDNN's on a CPU."""

import torch
from torch import Tensor

from fused_res.spec import ConvBN


def _few_pixels(x: Tensor, pixels: int, unit: ConvBN) -> bool:
    """Whether oneDNN is faster on NCHW images, copies included: where the weight by far outweighs the images.

    Measured for 3x3 convolutions of 128 to 512 channels, float32 and bfloat16.
    """
    unstrided = tuple(unit.stride) == (1, 1)
    return x.is_cpu and unstrided and unit.groups == 1 and 4 * pixels <= x.itemsize * min(unit.weight.shape[:2])


def fprop(x: Tensor, unit: ConvBN) -> Tensor:
    """`conv_fprop`, in any layout."""
    height, width = unit.output_size(*x.shape[2:])
    if _few_pixels(x, x.shape[0] * height * width, unit):
        x = x.contiguous()
    return torch.convolution(x, unit.weight, None, unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)


def _backward(dy: Tensor, x: Tensor, unit: ConvBN, of_x: bool) -> Tensor:
    geometry = (unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)
    found = torch.ops.aten.convolution_backward(dy, x, unit.weight, None, *geometry, (of_x, not of_x, False))
    return found[0 if of_x else 1]


def dgrad(dy: Tensor, like: Tensor, unit: ConvBN) -> Tensor:
    """`conv_dgrad`, in any layout."""
    if _few_pixels(dy, dy.numel() // dy.shape[1], unit):
        dy, like = dy.contiguous(), torch.empty_like(like, memory_format=torch.contiguous_format)
    return _backward(dy, like, unit, of_x=True)


def wgrad(dy: Tensor, x: Tensor, unit: ConvBN) -> Tensor:
    """`conv_wgrad`."""
    return _backward(dy, x, unit, of_x=False)
