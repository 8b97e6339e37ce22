"""The average pooling in front of a projection, and the way back through it."""

import itertools

import torch
from torch import Tensor

from fused_res import reference
from fused_res.layout import nhwc
from fused_res.spec import AvgPool


def pooled(image: Tensor, pool: AvgPool | None) -> Tensor:
    """What a projection reads, in channels_last. The library's pooling is not, of an image whose strides fit both layouts."""
    return image if pool is None else nhwc(reference.pooled(image, pool))


def through_pool(dpooled: Tensor, image: Tensor, pool: AvgPool) -> Tensor:
    """The gradient of the image, an image of its own."""
    return torch.ops.aten.avg_pool2d_backward(dpooled, image, *pool, None)


def join_through_pool(dx: Tensor, dpooled: Tensor, pool: AvgPool) -> None:
    """Adds the gradient of the image to dx, in place and rounded once where the windows do not overlap.

    Where they do, several of them meet in a pixel: they are added up first, in an image of their own.
    """
    # Numbers of pixels up to 2^8 are exact in every dtype.
    if any(k > s for k, s in zip(pool.kernel_size, pool.stride, strict=True)) or pool.kernel_size[0] * pool.kernel_size[1] > 2**8:
        dx.add_(through_pool(dpooled, dx, pool))
        return
    divisor = (_lengths(pool, 0, dx, dpooled).unsqueeze(1) * _lengths(pool, 1, dx, dpooled)).to(dx.dtype)
    for taps in itertools.product(*(range(k) for k in pool.kernel_size)):
        (lines, its_lines), (pixels, its_pixels) = (_met(pool, d, dx, dpooled, tap) for d, tap in enumerate(taps))
        dx[:, :, lines, pixels].addcdiv_(dpooled[:, :, its_lines, its_pixels], divisor[its_lines, its_pixels])


def _lengths(pool: AvgPool, d: int, image: Tensor, pooled: Tensor) -> Tensor:
    """By what dimension d of the windows counts in the divisor of their sums; computed where the image is."""
    size, padding = image.shape[2 + d], pool.padding[d]
    first = torch.arange(pooled.shape[2 + d], device=image.device) * pool.stride[d] - padding
    end = (first + pool.kernel_size[d]).clamp_max(size + padding)
    return end - first if pool.count_include_pad else end.clamp_max(size) - first.clamp_min(0)


def _met(pool: AvgPool, d: int, image: Tensor, pooled: Tensor, tap: int) -> tuple[slice, slice]:
    """In dimension d, where the image has what is at this place of a window, and which windows have it inside of the image."""
    step, shift = pool.stride[d], tap - pool.padding[d]
    first = max(0, -(shift // step))
    end = min(pooled.shape[2 + d], (image.shape[2 + d] - 1 - shift) // step + 1)
    count = max(0, end - first)
    place = first * step + shift
    return slice(place, place + (count - 1) * step + 1 if count else place, step), slice(first, first + count)
