"""`conv_fprop`: a convolution's output. The plain formula is the library's (cuDNN on a GPU, oneDNN or MKL on a CPU)."""

from typing import NamedTuple

from torch import Tensor

from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives import library, products
from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.masked_add import masked_add
from fused_res.primitives.operands import Activation, Addend, Output
from fused_res.primitives.run import Run
from fused_res.spec import ConvBN


class Convolved(NamedTuple):
    """What `conv_fprop` returns. `partials` and `rows` are those of `bn_stats(y)`, where they were asked for."""

    image: Tensor
    partials: Tensor | None = None
    rows: int = 0


def plain(x: Tensor, unit: ConvBN, run: Run) -> Tensor:
    if products.pointwise(x, unit):
        return products.fprop(x, unit)
    if products.unfolded(x, unit):
        return products.unfolded_fprop(nhwc(x), unit, run)
    return library.fprop(x, unit)


def conv_fprop(x: Activation, unit: ConvBN, *, statistics: bool = False, output: Output | None = None, run: Run) -> Convolved:
    """y = x * weight, without the bias: BN takes it into account where it matters.

    Prologue: x may be an `Activation` that is still to be computed. Epilogue: the statistics of y as it is stored, or what is
    left of the block in evaluation.

    Args:
        x: operand of shape [N, C, H, W].
        unit: weight [K, C / groups, R, S] of x's dtype, stride, padding, dilation, groups.
        statistics: whether to return partial statistics of y.
        output: what becomes of y before it is stored; excludes `statistics`.

    Returns:
        `Convolved`: the image [N, K, H', W'] in x's dtype, channels_last, and the partial statistics. Errors are the library's
        own (RuntimeError).
    """
    if statistics and output is not None:
        raise ValueError("output: expected None together with statistics")
    own = run.convolution("conv_fprop", unit, x, statistics, output)
    if own is not None:
        return Convolved(*own(x, unit, statistics, output))
    y = nhwc(plain(x.values(run), unit, run))
    if statistics:
        return Convolved(y, *bn_stats(to_rows(y), run=run))
    if output is None:
        return Convolved(y)
    return Convolved(finished(y, output, run=run))


def finished(y: Tensor, output: Output, *, run: Run) -> Tensor:
    """What `output` makes of an image that nobody else reads, in a pass of its own."""
    if output.vectors is None:
        masked_add(y, Addend(output.skip), run=run)
        return y
    n, _, h, w = y.shape
    skip, y2 = (None if image is None else to_rows(image) for image in (output.skip, output.y2))
    ends = {"skip": skip, "y2": y2, "vectors2": output.vectors2, "relu": output.relu}
    return to_image(bn_act(to_rows(y), output.vectors, **ends, run=run)[0], n, h, w)
