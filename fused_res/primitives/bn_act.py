"""`bn_act`: normalise, add the shortcut, apply ReLU, and keep the ReLU's signs, in one pass."""

import torch
from torch import Tensor

from fused_res.primitives.bn_finalize import Vectors
from fused_res.primitives.common import check, check_rows, statistics_dtype
from fused_res.primitives.run import Run


def sign_bytes(channels: int) -> int:
    """Bytes in a row of sign bits."""
    return -(-channels // 8)


def pack_signs(open_: Tensor) -> Tensor:
    """Booleans [P, C] as bits [P, ceil(C / 8)]: bit j of byte i of a row stands for channel 8*i + j."""
    rows, channels = open_.shape
    padded = torch.nn.functional.pad(open_.to(torch.uint8), (0, sign_bytes(channels) * 8 - channels))
    place = torch.arange(8, dtype=torch.uint8, device=open_.device)
    return (padded.view(rows, sign_bytes(channels), 8) << place).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, channels: int) -> Tensor:
    """Inverse of `pack_signs`."""
    place = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return ((signs.unsqueeze(-1) >> place) & 1).flatten(1)[:, :channels].bool()


def plain(
    y: Tensor,
    vectors: Tensor,
    skip: Tensor | None,
    y2: Tensor | None,
    vectors2: Tensor | None,
    keep_signs: bool,
    relu: bool = True,
) -> tuple[Tensor, Tensor | None]:
    v = Vectors(*vectors)
    total = torch.addcmul(v.shift, y.to(v.scale.dtype), v.scale)
    if skip is not None:
        total += skip
    if y2 is not None:
        v2 = Vectors(*vectors2)
        total += torch.addcmul(v2.shift, y2.to(v2.scale.dtype), v2.scale)
    out = (total.relu_() if relu else total).to(y.dtype)
    return out, pack_signs(~(out <= 0)) if keep_signs else None


def bn_act(
    y: Tensor,
    vectors: Tensor,
    *,
    skip: Tensor | None = None,
    y2: Tensor | None = None,
    vectors2: Tensor | None = None,
    keep_signs: bool = False,
    relu: bool = True,
    run: Run,
) -> tuple[Tensor, Tensor | None]:
    """`out = relu(scale * y + shift [+ skip] [+ scale2 * y2 + shift2])`, computed in the vectors' dtype and rounded once.

    The ReLU is left out without `relu`; there are no signs then.

    Args:
        y: convolution output [P, C].
        vectors: [5, C] from `bn_finalize`.
        skip: identity shortcut [P, C], same dtype as y.
        y2, vectors2: the projection's convolution output and its vectors; excludes `skip`.
        keep_signs: whether to return the signs that the backward of the ReLU needs.

    Returns:
        `out` [P, C] in y's dtype, and `signs` (uint8 [P, ceil(C / 8)], see `pack_signs`) or None. A bit is set where
        `not (out <= 0)`, so that NaN passes the gradient, as in `torch.relu`. NaN in gives NaN out.
    """
    check_bn_act(y, skip, y2, vectors2, keep_signs, relu)
    check("vectors", vectors, (5, y.shape[1]), statistics_dtype(y.dtype), y.device)
    kernel = run.find("bn_act", y.device) or plain
    if relu:
        return kernel(y, vectors, skip, y2, vectors2, keep_signs)
    return kernel(y, vectors, skip, y2, vectors2, False, False)


def check_bn_act(y: Tensor, skip: Tensor | None, y2: Tensor | None, vectors2: Tensor | None, keep_signs: bool, relu: bool) -> None:
    """Raises ValueError or TypeError for arguments of `bn_act` that do not fit y."""
    check_rows("y", y)
    if skip is not None and y2 is not None:
        raise ValueError("skip: expected either skip or y2, got both")
    for name, other in (("skip", skip), ("y2", y2)):
        if other is not None:
            check(name, other, y.shape, y.dtype, y.device)
    if (y2 is None) != (vectors2 is None):
        raise ValueError("vectors2: expected together with y2")
    if vectors2 is not None:
        check("vectors2", vectors2, (5, y.shape[1]), statistics_dtype(y.dtype), y.device)
    if keep_signs and not relu:
        raise ValueError("keep_signs: expected False without a ReLU")
