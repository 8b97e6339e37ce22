"""`conv_wgrad`: the gradient of a convolution's weight. The plain formula is the library's."""

from torch import Tensor

from fused_res.layout import nhwc
from fused_res.primitives import library, products
from fused_res.primitives.operands import Activation, Gradient
from fused_res.primitives.run import Run
from fused_res.spec import ConvBN


def plain(dy: Tensor, x: Tensor, unit: ConvBN, run: Run) -> Tensor:
    if products.pointwise(x, unit):
        return products.wgrad(dy, x, unit)
    if products.unfolded_backward(dy, x, unit):
        return products.unfolded_wgrad(dy, nhwc(x), unit, run)
    return library.wgrad(dy, x, unit)


def conv_wgrad(dy: Gradient, x: Activation, unit: ConvBN, *, run: Run) -> Tensor:
    """dweight = sum over the pixels of dy x. Prologue: both may be still to be computed.

    Args:
        dy: operand of shape [N, K, H', W'].
        x: the convolution's input, operand of shape [N, C, H, W].
        unit: as in `conv_fprop`.

    Returns:
        dweight [K, C / groups, R, S] in the weight's dtype.
    """
    own = run.convolution("conv_wgrad", unit, dy, x)
    if own is not None:
        return own(dy, x, unit)
    return plain(dy.values(run), x.values(run), unit, run)
