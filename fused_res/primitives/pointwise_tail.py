"""`pointwise_tail`: the end of a block whose last convolution is 1x1, in one pass: that convolution's output is never stored."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.layout import to_image, to_rows
from fused_res.primitives.bn_act import pack_signs, sign_bytes
from fused_res.primitives.bn_finalize import Vectors
from fused_res.primitives.common import check, statistics_dtype
from fused_res.primitives.operands import Activation
from fused_res.primitives.run import Run


class Pointwise(NamedTuple):
    """A 1x1 convolution and the BN behind it: the input, with its stride; the weight [C, K, 1, 1]; the [5, C] vectors."""

    z: Activation
    weight: Tensor
    vectors: Tensor


class Joined(NamedTuple):
    """What joins the main branch: `skip` [N, C, H, W]; or `scale2 * y2 + shift2`; or a projection in the moment form."""

    skip: Tensor | None = None
    y2: Tensor | None = None
    vectors2: Tensor | None = None
    projection: Pointwise | None = None


def normalised(branch: Pointwise, run: Run) -> Tensor:
    """`scale * (W z) + shift` [P, C] in the vectors' dtype: scale and shift act on the accumulator."""
    v = Vectors(*branch.vectors)
    y = branch.z.rows(run).to(v.scale.dtype) @ branch.weight.flatten(1).to(v.scale.dtype).T
    return torch.addcmul(v.shift, y, v.scale)


def plain(main: Pointwise, shortcut: Joined, keep_signs: bool, run: Run) -> tuple[Tensor, Tensor | None]:
    total = normalised(main, run)
    if shortcut.skip is not None:
        total += to_rows(shortcut.skip)
    elif shortcut.y2 is not None:
        v = Vectors(*shortcut.vectors2)
        total += torch.addcmul(v.shift, to_rows(shortcut.y2).to(v.scale.dtype), v.scale)
    else:
        total += normalised(shortcut.projection, run)
    out = total.relu_().to(main.weight.dtype)
    n, _, h, w = main.z.image.shape
    return to_image(out, n, h, w), pack_signs(~(out <= 0)) if keep_signs else None


def pointwise_tail(main: Pointwise, shortcut: Joined, *, keep_signs: bool = False, run: Run) -> tuple[Tensor, Tensor | None]:
    """`out = relu(scale * (W z) + shift + shortcut)`; scale and shift act on the accumulator, and out is rounded once.

    A projection has an accumulator of its own: `scale * (W z) + scale2 * (W2 x) + shift + shift2`, x sampled at its stride.

    Args:
        main: z [N, K, H, W] of stride 1.
        shortcut: exactly one kind; images are channels_last, in z's dtype.
        keep_signs: whether to return the signs that the backward of the ReLU needs.

    Returns:
        out [N, C, H, W], channels_last, in z's dtype, and the signs [P, ceil(C / 8)] as `bn_act` returns them, or None.
    """
    channels, image = main.weight.shape[0], main.z.image
    n, _, h, w = image.shape
    if sum(part is not None for part in (shortcut.skip, shortcut.y2, shortcut.projection)) != 1:
        raise ValueError("shortcut: expected exactly one of skip, y2 and projection")
    check("vectors", main.vectors, (5, channels), statistics_dtype(image.dtype), image.device)
    for name, other in (("skip", shortcut.skip), ("y2", shortcut.y2)):
        if other is not None and (tuple(other.shape) != (n, channels, h, w) or other.dtype != image.dtype):
            got = f"{tuple(other.shape)} of {other.dtype}"
            raise ValueError(f"{name}: expected {(n, channels, h, w)} of {image.dtype}, got {got}")
    if shortcut.projection is not None and shortcut.projection.z.pixels != main.z.pixels:
        raise ValueError(f"projection: expected {main.z.pixels} pixels, got {shortcut.projection.z.pixels}")
    own = run.step("pointwise_tail", image, main, shortcut, keep_signs)
    out, signs = plain(main, shortcut, keep_signs, run) if own is None else own(main, shortcut, keep_signs)
    if signs is not None:
        check("signs", signs, (main.z.pixels, sign_bytes(channels)), torch.uint8, image.device)
    return out, signs
