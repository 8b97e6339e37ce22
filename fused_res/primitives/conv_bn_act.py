"""`conv_bn_act`: in evaluation, a convolution with its BN, the shortcut and the ReLU, on a weight that was prepared before."""

from typing import NamedTuple

from torch import Tensor

from fused_res import backends, settings
from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives import library, products
from fused_res.primitives.bn_finalize import Vectors
from fused_res.primitives.choice import Choice
from fused_res.primitives.common import check, statistics_dtype
from fused_res.primitives.run import Run
from fused_res.primitives.step import Step
from fused_res.spec import ConvBN


class Place(NamedTuple):
    """Where a convolution stands. shape: x's. relu: whether a ReLU follows. spare: whether the shortcut may be written to."""

    shape: tuple[int, int, int, int]
    relu: bool = True
    spare: bool = False


def plain(x: Tensor, skip: Tensor | None, unit: ConvBN, vectors: Tensor, relu: bool) -> Tensor:
    y, v = nhwc(library.fprop(x, unit)), Vectors(*vectors)
    total = to_rows(y).to(v.scale.dtype) * v.scale + v.shift
    if skip is not None:
        total += to_rows(skip)
    total = total.relu_() if relu else total
    return to_image(total.to(x.dtype), y.shape[0], *y.shape[2:])


def who(unit: ConvBN, place: Place, run: Run) -> Choice:
    """Who is to run it: a kernel of the backend, where that takes the convolution and is taken to be faster, or the library."""
    n, _, height, width = place.shape
    down, right = unit.output_size(height, width)
    kernels = backends.load(run.backend)
    if unit.groups != 1:
        return Choice(False, why="grouped")
    if kernels.find("conv_bn_act", unit.weight.device) is None:
        return Choice(False, why="no kernel")
    why = kernels.declined("conv_bn_act", unit, n * down * right)
    if why is not None:
        return Choice(False, why=why)
    if not (place.relu or unit.is_pointwise()):
        return Choice(False, why="no ReLU")
    asked = settings.convolutions()
    if asked == "library":
        return Choice(False, why="FUSED_RES_CONVOLUTIONS=library")
    if asked == "own" or not library.fuses(unit.weight.dtype):
        return Choice(True)
    return Choice(True) if kernels.pays("conv_bn_act", unit, n * down * right) else Choice(False, why="faster at this size")


def way(unit: ConvBN, place: Place, run: Run) -> str:
    """How it is run: "own", by a kernel of the backend, or the library's: "product", "fused" or "plain"."""
    if who(unit, place, run).own:
        return "own"
    if products.small(place.shape, unit):
        return "product"
    return "fused" if library.fuses(unit.weight.dtype) else "plain"


def conv_bn_act(unit: ConvBN, vectors: Tensor, place: Place, *, run: Run) -> Step:
    """Prepares `out = relu(scale * (x * weight) + shift [+ skip])`, computed in float32 at least and rounded as it is stored.

    The library gets the scale inside of the weight, rounded to the weight's dtype, and the weight in the order in which it reads it
    for images of this shape, or as a matrix where one product does; kernels of ours get it in panels or, 3x3, as the points of
    F(2x2, 3x3), and the vectors beside it.

    Args:
        unit: weight [K, C / groups, R, S] of x's dtype, stride, padding, dilation, groups. Its bias is in the vectors.
        vectors: [5, K] of `bn_finalize`.
        place: where it stands.

    Returns:
        The step, which holds what was prepared, and nothing of the unit's own.

    Raises:
        ValueError, TypeError: vectors that do not fit the weight.
    """
    check("vectors", vectors, (5, unit.weight.shape[0]), statistics_dtype(unit.weight.dtype), unit.weight.device)
    found = way(unit, place, run)
    if found == "own":
        return run.find("conv_bn_act", unit.weight.device)(unit, vectors, place.relu)
    if found == "fused":
        kernel = run.find("onednn_bn_act", unit.weight.device)
        return library.fused(unit, vectors, place.shape, place.relu, place.spare, kernel)
    steps = {"stride": unit.stride, "padding": unit.padding, "dilation": unit.dilation, "groups": unit.groups}
    if found == "product":
        kernel = run.find("unfolded_bn_act", unit.weight.device)
        if kernel is not None:
            return kernel(ConvBN(unit.weight, **steps), vectors, place.relu)
        weight, shift = library.folded(unit, vectors)
        return products.conv_bn_act(ConvBN(weight, **steps), shift, place.relu, run)
    kept = ConvBN(unit.weight.clone(), **steps)
    return Step(lambda x, skip: plain(x, skip, kept, vectors, place.relu), (kept.weight, vectors))
