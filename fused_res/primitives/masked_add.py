"""`masked_add`: one more gradient of x joins dx, in place: the shortcut's, masked by the outer ReLU, or a strided projection's."""

import torch
from torch import Tensor

from fused_res.layout import to_rows
from fused_res.primitives.bn_act import sign_bytes, unpack_signs
from fused_res.primitives.common import check
from fused_res.primitives.operands import Addend
from fused_res.primitives.run import Run


def plain(dx: Tensor, image: Tensor, signs: Tensor | None, stride: tuple[int, int]) -> None:
    if signs is not None:
        n, c, h, w = image.shape
        open_ = unpack_signs(signs, c).view(n, h, w, c).permute(0, 3, 1, 2)
        image = torch.where(open_, image, 0)
    dx[:, :, :: stride[0], :: stride[1]].add_(image)


def masked_add(dx: Tensor, addend: Addend, *, run: Run) -> None:
    """`dx[:, :, ::sh, ::sw] += where(open, image, 0)`.

    Args:
        dx: [N, C, H, W], channels_last, written in place.
        addend: its image [N, C, ceil(H / sh), ceil(W / sw)] in dx's dtype, channels_last; signs [N*h*w, ceil(C / 8)] or None.
    """
    image, signs, (down, right) = addend
    n, c, h, w = dx.shape
    expected = (n, c, -(-h // down), -(-w // right))
    if tuple(image.shape) != expected:
        raise ValueError(f"addend: expected shape {expected}, got {tuple(image.shape)}")
    rows = to_rows(image)
    check("addend", rows, rows.shape, dx.dtype, dx.device)
    if signs is not None:
        check("signs", signs, (rows.shape[0], sign_bytes(c)), torch.uint8, dx.device)
    (run.find("masked_add", dx.device) or plain)(dx, image, signs, (down, right))
