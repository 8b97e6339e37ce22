"""What launchers make of their arguments: images and vectors that are checked, and the sizes and steps of a convolution."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res.kernels.tiling import cdiv
from fused_res.spec import ConvBN


class Source(NamedTuple):
    """An image [N, C, H, W] that a convolution reads, and what becomes of it on the way.

    Without `coefficients` an `Activation`: `relu(scale * image + shift)` with `vectors`, the image without. With them a `Gradient`:
    the ReLU's signs are the bits of `signs`, or those of `scale * y + shift` with `vectors`; without either the image is
    masked already.
    """

    image: Tensor
    y: Tensor | None
    vectors: Tensor | None
    coefficients: Tensor | None
    signs: Tensor | None


class Geometry(NamedTuple):
    """Sizes and steps of a convolution, height first."""

    height: int
    width: int
    out_height: int
    out_width: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int


# Pixels of an image, padding included: places within an image, and from there on within a part of all, take 32 bits.
_PIXELS = 2**30 - 1024


def check_image(name: str, image: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The image in channels_last, copied where it is not; raises unless it has this shape, and the dtype and device of `like`."""
    if tuple(image.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(image.shape)}")
    if image.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, as the weight has, got {image.dtype}")
    if image.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {image.device}")
    return image.contiguous(memory_format=torch.channels_last)


def check_dense(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """The tensor itself; raises unless it is contiguous, of this shape and dtype, and on the device of `like`."""
    if tensor is None:
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got None")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != like.device or not tensor.is_contiguous():
        got = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"{name}: expected a contiguous {dtype} {shape} on {like.device}, got {got}")
    return tensor


def activation(x: Any, weight: Tensor) -> Source:
    """The kernels' view of an `Activation` in front of this weight."""
    shape = (x.image.shape[0], weight.shape[1], *x.image.shape[2:])
    vectors = None if x.vectors is None else check_dense("x.vectors", x.vectors, (5, weight.shape[1]), torch.float32, weight)
    return Source(check_image("x", x.image, shape, weight), None, vectors, None, None)


def gradient(dy: Any, shape: tuple[int, ...], weight: Tensor) -> Source:
    """The kernels' view of a `Gradient` of this shape."""
    image = check_image("dy", dy.image, shape, weight)
    if dy.coefficients is None:
        return Source(image, None, None, None, None)
    n, k, h, w = shape
    y, vectors, signs = None, None, None
    if not dy.masked and dy.signs is not None:
        signs = check_dense("dy.signs", dy.signs, (n * h * w, cdiv(k, 8)), torch.uint8, weight)
    elif not dy.masked:
        vectors = check_dense("dy.vectors", dy.vectors, (5, k), torch.float32, weight)
    if dy.training or vectors is not None:
        if dy.y is None:
            raise ValueError(f"dy.y: expected an image of shape {tuple(shape)}, got None")
        y = check_image("dy.y", dy.y, shape, weight)
    coefficients = check_dense("dy.coefficients", dy.coefficients, (7, k), torch.float32, weight)
    return Source(image, y, vectors, coefficients, signs)


def sign_word(signs: Tensor | None, channels: int, block: int) -> int:
    """In how many bits the kernels read sign bits at a time: 32 where rows and blocks consist of such words, 8 elsewhere."""
    return 32 if signs is not None and channels % 32 == 0 and block % 32 == 0 and signs.data_ptr() % 4 == 0 else 8


def geometry(height: int, width: int, unit: ConvBN) -> Geometry:
    """Sizes and steps of the unit's convolution over images of this size."""
    out = unit.output_size(height, width)
    if min(out) < 1:
        raise ValueError(f"x: expected images no smaller than the filter, got {height} x {width}")
    padded = height + 2 * unit.padding[0], width + 2 * unit.padding[1]
    for h, w in (padded, out):
        if h * w > _PIXELS:
            raise ValueError(f"x: expected images of less than 2^30 pixels, got {h} x {w}")
    return Geometry(height, width, *out, *unit.stride, *unit.padding, *unit.dilation)


def taps_first(weight: Tensor) -> Tensor:
    """The weight [K, C, R, S] as [K, R, S, C], which a channels_last weight is already."""
    return weight.permute(0, 2, 3, 1).contiguous()
