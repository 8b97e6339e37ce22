"""`max_pool`: an image as the maxima of its windows."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fused_res.layout import nhwc
from fused_res.primitives.run import Run


class Pool(NamedTuple):
    """What `nn.MaxPool2d` is made with, pairs for both directions."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False


def plain(x: Tensor, pool: Pool) -> Tensor:
    return F.max_pool2d(x, *pool)


def max_pool(x: Tensor, pool: Pool, *, run: Run) -> Tensor:
    """`torch.nn.functional.max_pool2d` without a gradient: where the maxima are is not noted. NaN where a window has one.

    Args:
        x: [N, C, H, W], channels_last.

    Returns:
        [N, C, H', W'] in x's dtype, channels_last.

    Raises:
        RuntimeError: a window beyond the padded image, or a padding of more than half of one, as torch does.
    """
    kernel = run.find("max_pool", x.device)
    if kernel is None:
        return nhwc(plain(x, pool))
    kernel_size, stride, padding, dilation, ceil_mode = pool
    return kernel(x.permute(0, 2, 3, 1), *kernel_size, *stride, *padding, *dilation, ceil_mode).permute(0, 3, 1, 2)
