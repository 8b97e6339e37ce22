"""The library's convolutions: cuDNN's on a GPU, oneDNN's on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_res import internals
from fused_res.layout import nhwc
from fused_res.primitives.step import Step
from fused_res.spec import ConvBN


def _few_pixels(x: Tensor, pixels: int, unit: ConvBN) -> bool:
    """Whether oneDNN is faster on NCHW images, copies included: where the weight by far outweighs the images.

    Measured for 3x3 convolutions of 128 to 512 channels, float32 and bfloat16.
    """
    unstrided = not unit.is_strided()
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


_MINUS_INFINITY = {torch.bfloat16: -128, torch.float16: -1024}
"""The bits of it as a whole number. Those of the numbers below 0 are less, and those of every NaN with that sign are more."""


def _relu_(y: Tensor) -> Tensor:
    """ReLU in place; NaN stays NaN. In 16 bits by whole numbers: torch's own goes by float32 and took three times as long."""
    least = _MINUS_INFINITY.get(y.dtype)
    if least is None:
        return y.relu_()
    torch.threshold_(y.view(torch.int16), least, 0)
    return y


def fuses(dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution is here that adds a shift and a shortcut, and this CPU has what it needs for the dtype."""
    return internals.fused_convolution() is not None and (dtype == torch.float32 or internals.has_mkldnn(dtype))


def fused(unit: ConvBN, vectors: Tensor, shape: tuple[int, ...], relu: bool, spare: bool, kernel: Callable | None) -> Step:
    """`conv_bn_act` by oneDNN on the CPU, as torch.compile calls it, but for the ReLU, which is a pass of its own.

    oneDNN's ReLU makes 0 of NaN. It orders the weight for images of this shape; those of another shape would have it reorder the
    weight at every call.

    Args:
        kernel: makes what calls oneDNN of a geometry and whether a ReLU follows; None: torch's operators do.
    """
    weight, shift = folded(unit, vectors)
    geometry = list(unit.padding), list(unit.stride), list(unit.dilation), unit.groups
    weight = internals.fused_convolution()[0](weight, *geometry, list(shape))
    call = (kernel or _by_operators)(geometry, relu)
    one_pixel = unit.output_size(*shape[2:]) == (1, 1)

    def step(x: Tensor, skip: Tensor | None) -> Tensor:
        if one_pixel and skip is not None and not spare:
            skip = skip.clone()  # torch 2.10's oneDNN refuses to add images of one pixel, but not onto them
        return nhwc(call(x, weight, shift, skip, spare or one_pixel))

    return Step(step, (weight, shift))


def _by_operators(geometry: tuple, relu: bool) -> Callable:
    """As the kernel `onednn_bn_act`."""
    _, alone, added, onto = internals.fused_convolution()

    def call(x: Tensor, weight: Tensor, shift: Tensor, skip: Tensor | None, spare: bool) -> Tensor:
        if skip is None:
            y = alone(x, weight, shift, *geometry, "none", [], "")
        else:
            last = weight, shift, *geometry, "add", 1.0, None, [], ""
            y = onto(skip, x, *last) if spare else added(x, skip, *last)
        y = nhwc(y)
        return _relu_(y) if relu else y

    return call


def folded(unit: ConvBN, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The weight with the scale inside, and the shift, in the weight's dtype."""
    weight, scale = unit.weight, vectors[3].view(-1, 1, 1, 1)
    return (weight.to(scale.dtype) * scale).to(weight.dtype), vectors[4].to(weight.dtype)
