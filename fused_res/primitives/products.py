"""Convolutions on a CPU as matrix products, by rules of their shapes: where the library's products beat its convolutions.

`pointwise`, `unfolded` and `folded` say where. Products accumulate in float32 (float64 for float64) and round once, as
convolutions do.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_res import internals
from fused_res.layout import to_image, to_rows
from fused_res.spec import ConvBN


@functools.cache
def _supported(dtype: torch.dtype) -> bool:
    """Whether this build and CPU multiply matrices of this dtype with a library made for it."""
    if dtype in (torch.float32, torch.float64):
        return torch.backends.mkl.is_available()
    return internals.has_mkldnn(dtype)


def _available(tensor: Tensor) -> bool:
    """Whether products of such tensors are as fast as they are precise.

    float32 products and convolutions each have a switch that lets them round their operands; products stand in only where
    theirs is off.
    """
    if tensor.device.type != "cpu" or not _supported(tensor.dtype):
        return False
    return tensor.dtype != torch.float32 or torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def pointwise(x: Tensor, unit: ConvBN) -> bool:
    """Whether the convolution is one product over (a sample of) the pixels of x, and that runs here: forward and backward.

    The library's convolution is as fast on large images at best; on small ones, it spends as long on reordering.
    """
    return unit.is_pointwise() and _available(x)


def unfolded(dy: Tensor, x: Tensor, unit: ConvBN) -> bool:
    """Whether the gradient of the weight is taken as one product with the unfolded input, and that runs here.

    Where the pixels are at most twice the output channels: then the unfolded input is of the size of the weight, which the
    library passes over several times.
    """
    n, channels, height, width = dy.shape
    return n * height * width <= 2 * channels and unit.groups == 1 and _available(x)


def folded(dy: Tensor, unit: ConvBN) -> bool:
    """Whether the gradient of the input is one product that is then added up, window over window, and that runs here.

    Where there are no more pixels than output channels, and the weight lies as the product reads it. Not in 16 bits, where every
    summand would be rounded.
    """
    n, channels, height, width = dy.shape
    if dy.itemsize < 4 or n * height * width > channels or unit.groups != 1:
        return False
    return unit.weight.is_contiguous(memory_format=torch.channels_last) and _available(dy)


def _sampled(x: Tensor, unit: ConvBN) -> Tensor:
    """The pixels of x that a pointwise convolution reads, as a matrix."""
    down, right = unit.stride
    return to_rows(x[:, :, ::down, ::right])


def fprop(x: Tensor, unit: ConvBN) -> Tensor:
    """`conv_fprop` of a pointwise convolution."""
    y = torch.mm(_sampled(x, unit), unit.weight.flatten(1).t())
    return to_image(y, x.shape[0], *unit.output_size(*x.shape[2:]))


def dgrad(dy: Tensor, like: Tensor, unit: ConvBN) -> Tensor:
    """`conv_dgrad` of a pointwise convolution."""
    n, _, h, w = dy.shape
    dx = to_image(torch.mm(to_rows(dy), unit.weight.flatten(1)), n, h, w)
    if not unit.is_strided():
        return dx
    down, right = unit.stride
    spread = torch.zeros_like(like, memory_format=torch.channels_last)
    spread[:, :, ::down, ::right] = dx
    return spread


def wgrad(dy: Tensor, x: Tensor, unit: ConvBN) -> Tensor:
    """`conv_wgrad` of a pointwise convolution."""
    return torch.mm(to_rows(dy).t(), _sampled(x, unit)).view_as(unit.weight)


def folded_dgrad(dy: Tensor, like: Tensor, unit: ConvBN) -> Tensor:
    """`conv_dgrad` of any ungrouped convolution."""
    (n, _, *size), (_, channels, *kernel) = dy.shape, unit.weight.shape
    windows = torch.mm(to_rows(dy), unit.weight.permute(0, 2, 3, 1).flatten(1)).view(n, *size, *kernel, channels)
    (height, width), (pad_down, pad_right) = like.shape[2:], unit.padding
    padded = dy.new_zeros((n, height + 2 * pad_down, width + 2 * pad_right, channels))
    reads = [
        [slice(d * tap, d * tap + s * (count - 1) + 1, s) for tap in range(taps)]
        for d, s, count, taps in zip(unit.dilation, unit.stride, size, kernel, strict=True)
    ]
    for i, down in enumerate(reads[0]):
        for j, right in enumerate(reads[1]):
            padded[:, down, right] += windows[:, :, :, i, j]
    return padded[:, pad_down : pad_down + height, pad_right : pad_right + width].permute(0, 3, 1, 2)


def unfolded_wgrad(dy: Tensor, x: Tensor, unit: ConvBN) -> Tensor:
    """`conv_wgrad` of any ungrouped convolution; the result is channels_last."""
    out, channels, *kernel = unit.weight.shape
    (n, _, *size), (pad_down, pad_right) = dy.shape, unit.padding
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad_right, pad_right, pad_down, pad_down))
    image, *pixel, _ = padded.stride()
    steps = [s * p for s, p in zip(unit.stride, pixel, strict=True)]
    taps = [d * p for d, p in zip(unit.dilation, pixel, strict=True)]
    windows = padded.as_strided((n, *size, *kernel, channels), (image, *steps, *taps, 1))
    dweight = torch.mm(to_rows(dy).t(), windows.flatten(0, 2).flatten(1))
    return dweight.view(out, *kernel, channels).permute(0, 3, 1, 2)
