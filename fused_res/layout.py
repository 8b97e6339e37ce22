"""Memory layouts: the one eager would choose, and views between images [N, C, H, W] and matrices [N*H*W, C]."""

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the strides of a 4-D tensor mean channels_last to PyTorch (`suggest_memory_format` in ATen).

    Strides that fit both layouts mean contiguous, as in ATen.
    """
    least = 0
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False
        least = strides[d]
        if sizes[d] > 1:
            least *= sizes[d]
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def nhwc(image: Tensor) -> Tensor:
    """The image in channels_last, itself where it already is."""
    return image.contiguous(memory_format=torch.channels_last)


def in_layout(image: Tensor, channels_last: bool) -> Tensor:
    """The image with exactly the strides of that layout, without a copy where it can be had so.

    `contiguous` alone leaves the strides of dimensions of size 1 as they are.
    """
    image = image.contiguous(memory_format=memory_format(channels_last))
    if min(image.shape) > 1:
        return image
    _, c, h, w = image.shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return image if image.stride() == strides else image.as_strided(image.shape, strides)


def to_rows(image: Tensor) -> Tensor:
    """[N, C, H, W] as a contiguous matrix [N*H*W, C]; a view where the image is channels_last."""
    n, c, h, w = image.shape
    if image.is_contiguous(memory_format=torch.channels_last):
        return image.as_strided((n * h * w, c), (c, 1))
    return image.permute(0, 2, 3, 1).reshape(n * h * w, c).contiguous()


def to_image(rows: Tensor, n: int, h: int, w: int) -> Tensor:
    """A contiguous matrix [n*h*w, C] as a channels_last view [n, C, h, w]."""
    c = rows.shape[1]
    return rows.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _parameter_strides(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's strides if it is dense, those of a contiguous tensor otherwise."""
    if parameter.is_contiguous() or (parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)):
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


def empty_like_parameter(parameter: Tensor) -> Tensor:
    """An uninitialised tensor in the dtype and layout of the parameter's gradient."""
    strides = _parameter_strides(parameter)
    return torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)


def as_parameter(gradient: Tensor, parameter: Tensor, apart: bool = True) -> Tensor:
    """The gradient in the dtype and strides of `empty_like_parameter(parameter)`.

    Weights are not copied where that can be helped. Equal strides matter: DistributedDataParallel copies, and warns, where they
    differ only in dimensions of size 1. Vectors are rows of one tensor; `apart`, they are copied, because an operator's outputs
    may not share memory.
    """
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    elif apart and gradient.dim() == 1:
        gradient = gradient.clone()
    strides = _parameter_strides(parameter)
    if gradient.stride() == strides:
        return gradient
    if gradient.is_contiguous() and parameter.is_contiguous():
        return gradient.as_strided(gradient.shape, strides)
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
