"""`im2col` and `col2im`: the windows of an image that a convolution reads, and the image that windows add up to."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_res.layout import nhwc
from fused_res.primitives.run import Run
from fused_res.spec import ConvBN


def _geometry(unit: ConvBN) -> tuple[int, ...]:
    return *unit.weight.shape[2:], *unit.stride, *unit.padding, *unit.dilation


def plain_im2col(x: Tensor, *geometry: int) -> Tensor:
    height, width, down, right, pad_down, pad_right, dilation_down, dilation_right = geometry
    padded = F.pad(x, (0, 0, pad_right, pad_right, pad_down, pad_down))
    image, line, pixel, _ = padded.stride()
    rows = (padded.shape[1] - dilation_down * (height - 1) - 1) // down + 1
    columns = (padded.shape[2] - dilation_right * (width - 1) - 1) // right + 1
    shape = x.shape[0], rows, columns, height, width, x.shape[3]
    steps = image, down * line, right * pixel, dilation_down * line, dilation_right * pixel, 1
    return padded.as_strided(shape, steps).flatten(0, 2).flatten(1)


def plain_col2im(windows: Tensor, image_height: int, image_width: int, *geometry: int) -> Tensor:
    height, width, down, right, pad_down, pad_right, dilation_down, dilation_right = geometry
    lines, pixels = image_height + 2 * pad_down, image_width + 2 * pad_right
    rows = (lines - dilation_down * (height - 1) - 1) // down + 1
    columns = (pixels - dilation_right * (width - 1) - 1) // right + 1
    windows = windows.view(-1, rows, columns, height, width, windows.shape[1] // (height * width))
    padded = windows.new_zeros((windows.shape[0], lines, pixels, windows.shape[-1]))
    for i in range(height):
        for j in range(width):
            first, second = i * dilation_down, j * dilation_right
            lines_of = slice(first, first + down * (rows - 1) + 1, down)
            padded[:, lines_of, second : second + right * (columns - 1) + 1 : right].add_(windows[:, :, :, i, j])
    return padded[:, pad_down : lines - pad_down, pad_right : pixels - pad_right]


def im2col(x: Tensor, unit: ConvBN, *, run: Run) -> Tensor:
    """The windows that a convolution reads, padding as zeros, one to a row.

    Args:
        x: [N, C, H, W], channels_last.
        unit: weight [K, C, R, S] (not grouped), of which the shape is read, stride, padding and dilation.

    Returns:
        [N*H'*W', R*S*C] in x's dtype: its product with the weight as [R*S*C, K] is the convolution's output.
    """
    kernel = run.find("im2col", x.device) or plain_im2col
    return kernel(x.permute(0, 2, 3, 1), *_geometry(unit))


def col2im(windows: Tensor, size: Sequence[int], unit: ConvBN, *, run: Run) -> Tensor:
    """The gradient of `im2col`: every pixel is the sum of what the windows that read it hold for it, in the order of their taps.

    Args:
        windows: [N*H'*W', R*S*C], float32 or float64: sums of 16-bit numbers would be rounded at each step.
        size: H and W.
        unit: as in `im2col`.

    Returns:
        [N, C, H, W] in the dtype of `windows`, channels_last, fresh.
    """
    if windows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"windows: expected float32 or float64, got {windows.dtype}")
    kernel = run.find("col2im", windows.device) or plain_col2im
    return nhwc(kernel(windows, *size, *_geometry(unit)).permute(0, 3, 1, 2))
