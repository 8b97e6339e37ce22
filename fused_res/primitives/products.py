"""Convolutions on a CPU as matrix products, by rules of their shapes: where the library's products beat its convolutions.

`pointwise`, `unfolded`, `unfolded_backward`, `folded` and `small` say where. Products accumulate in float32 (float64 for float64)
and round once, as convolutions do.
"""

import functools

import torch
from torch import Tensor

from fused_res import internals
from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives.im2col import col2im, im2col
from fused_res.primitives.run import Run
from fused_res.primitives.step import Step
from fused_res.spec import ConvBN

_WINDOWS = 16 * 2**20
"""Bytes of windows that are unfolded at a time."""


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


def _taps_last(unit: ConvBN) -> bool:
    """Whether the weight lies as products with windows read it."""
    return unit.groups == 1 and unit.weight.is_contiguous(memory_format=torch.channels_last)


def unfolded(x: Tensor, unit: ConvBN) -> bool:
    """Whether the convolution is taken as one product with the windows that it reads of x, and that runs here.

    Where there are no more pixels than output channels, and the weight lies as the product reads it. Not in 16 bits, where the
    library was faster in part.
    """
    height, width = unit.output_size(*x.shape[2:])
    few = x.shape[0] * height * width <= unit.weight.shape[0]
    return few and x.itemsize >= 4 and _taps_last(unit) and _available(x)


def unfolded_backward(dy: Tensor, x: Tensor, unit: ConvBN) -> bool:
    """Whether the gradient of the weight is taken as one product with the windows of x, and that runs here.

    Where the pixels are at most twice the output channels: then the windows are of the size of the weight, which the library
    passes over several times. And of every strided convolution in float32: for ResNet's at batch 1 to 32, on one thread, the
    library took 1.7 to 2.2 times as long with AVX2, and 0.97 to 14 times with AVX-512.
    """
    n, channels, height, width = dy.shape
    slow = unit.is_strided() and x.dtype == torch.float32
    return (slow or n * height * width <= 2 * channels) and unit.groups == 1 and _available(x)


def folded(dy: Tensor, unit: ConvBN) -> bool:
    """Whether the gradient of the input is one product that is then added up, window over window, and that runs here.

    Where there are no more pixels than output channels, and the weight lies as the product reads it. Not in 16 bits, where every
    summand would be rounded.
    """
    n, channels, height, width = dy.shape
    return dy.itemsize >= 4 and n * height * width <= channels and _taps_last(unit) and _available(dy)


def small(x: tuple[int, ...], unit: ConvBN) -> bool:
    """Whether a convolution of images of shape x is so small, up to 2^21 multiply-adds, that one product is over before the library
    has looked up its own: in evaluation, where that gets a weight in its order. And whether products run here."""
    height, width = unit.output_size(*x[2:])
    work = x[0] * height * width * unit.weight.numel()
    return work <= 2**21 and unit.groups == 1 and unit.weight.dtype == torch.float32 and _available(unit.weight)


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


def _by_tap(weight: Tensor) -> Tensor:
    """[K, C, R, S] as [K, R*S*C]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def unfolded_fprop(x: Tensor, unit: ConvBN, run: Run) -> Tensor:
    """`conv_fprop` of any ungrouped convolution."""
    own = run.find_joined("unfolded_fprop", x.device)
    if own is None:
        y = torch.mm(im2col(x, unit, run=run), _by_tap(unit.weight).t())
    else:
        y = own(x, nhwc(unit.weight), *unit.stride, *unit.padding, *unit.dilation)
    return to_image(y, x.shape[0], *unit.output_size(*x.shape[2:]))


def conv_bn_act(unit: ConvBN, shift: Tensor, relu: bool, run: Run) -> Step:
    """`conv_bn_act` of any ungrouped convolution whose weight has the scale inside."""
    matrix, read = _by_tap(unit.weight).t(), _sampled if unit.is_pointwise() else functools.partial(im2col, run=run)

    def step(x: Tensor, skip: Tensor | None) -> Tensor:
        y = torch.addmm(shift, read(x, unit), matrix)
        if skip is not None:
            y += to_rows(skip)
        return to_image(y.relu_() if relu else y, x.shape[0], *unit.output_size(*x.shape[2:]))

    return Step(step, (shift, matrix))


def folded_dgrad(dy: Tensor, like: Tensor, unit: ConvBN, run: Run) -> Tensor:
    """`conv_dgrad` of any ungrouped convolution, not in 16 bits."""
    own = run.find_joined("folded_dgrad", dy.device)
    if own is None:
        return col2im(torch.mm(to_rows(dy), _by_tap(unit.weight)), like.shape[2:], unit, run=run)
    dx = own(nhwc(dy), nhwc(unit.weight), *like.shape[2:], *unit.stride, *unit.padding, *unit.dilation)
    return dx.permute(0, 3, 1, 2)


def unfolded_wgrad(dy: Tensor, x: Tensor, unit: ConvBN, run: Run) -> Tensor:
    """`conv_wgrad` of any ungrouped convolution; the result is channels_last. As many images at a time as `_WINDOWS` holds."""
    out, channels, *kernel = unit.weight.shape
    own = run.find_joined("unfolded_wgrad", dy.device)
    if own is not None:
        return own(nhwc(dy), x, *kernel, *unit.stride, *unit.padding, *unit.dilation, _WINDOWS).permute(0, 3, 1, 2)
    pixels, rows = dy.shape[2] * dy.shape[3], to_rows(dy)
    images = max(1, _WINDOWS // (pixels * unit.weight[0].numel() * x.itemsize))
    dweight = None
    for first in range(0, max(1, x.shape[0]), images):
        some = slice(first * pixels, (first + images) * pixels)
        factors = rows[some].t(), im2col(x[first : first + images], unit, run=run)
        dweight = torch.mm(*factors) if dweight is None else dweight.addmm_(*factors)
    return dweight.view(out, *kernel, channels).permute(0, 3, 1, 2)
