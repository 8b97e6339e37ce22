"""`conv_dgrad`: the gradient of a convolution's input. The plain formula is the library's."""

from typing import NamedTuple

from torch import Tensor

from fused_res.layout import nhwc, to_rows
from fused_res.primitives import library, products
from fused_res.primitives.bn_act_backward import bn_act_backward_reduce
from fused_res.primitives.masked_add import masked_add
from fused_res.primitives.operands import Activation, Addend, Gradient
from fused_res.primitives.run import Run
from fused_res.spec import ConvBN


class Inflow(NamedTuple):
    """What `conv_dgrad` returns: the gradient; the partial sums of the BN below, and whether its ReLU has masked the gradient."""

    image: Tensor
    partials: Tensor | None = None
    masked: bool = False


def plain(dy: Tensor, like: Tensor, unit: ConvBN, run: Run) -> Tensor:
    if products.pointwise(dy, unit):
        return products.dgrad(dy, like, unit)
    if products.folded(dy, unit):
        return products.folded_dgrad(dy, like, unit, run)
    return library.dgrad(dy, like, unit)


def conv_dgrad(
    dy: Gradient, like: Tensor, unit: ConvBN, *, inner: Activation | None = None, add: Addend | None = None, run: Run
) -> Inflow:
    """dx = dy * weight^T.

    Prologue: dy may be a `Gradient` that is still to be computed. Epilogue: the ReLU and the sums of the BN in front of this
    convolution, or one more gradient of the same x.

    Args:
        dy: operand of shape [N, K, H', W'].
        like: any tensor of the input's shape [N, C, H, W], dtype and layout (channels_last); its values are not read.
        unit: as in `conv_fprop`.
        inner: this convolution's input, where that is `relu(scale * y + shift)`: asks for the sums of g = dx where that is open.
        add: what is added to dx; excludes `inner`.

    Returns:
        `Inflow`: the image, fresh, of the shape of `like`, channels_last; with `inner` the partial sums of `g` and
        `g * (y - mean)` as `bn_act_backward_reduce` returns them, of the values as they are stored.
    """
    if inner is not None and add is not None:
        raise ValueError("add: expected None together with inner")
    own = run.convolution("conv_dgrad", unit, dy, like, inner, add)
    if own is not None:
        return Inflow(*own(dy.ready(), like, unit, inner, add))
    dx = nhwc(plain(dy.values(run), like, unit, run))
    if add is not None:
        masked_add(dx, add, run=run)
    if inner is None:
        return Inflow(dx)
    return Inflow(dx, bn_act_backward_reduce(to_rows(dx), to_rows(inner.image), inner.vectors, run=run))
