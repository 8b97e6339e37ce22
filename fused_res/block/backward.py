"""The backward schedule of a block: only the gradients asked for, from what the forward saved."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.block.forward import Saved
from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_act_backward import (
    Coefficients,
    bn_act_backward_apply,
    bn_act_backward_finalize,
    bn_act_backward_reduce,
)
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.reference import pooled
from fused_res.spec import AvgPool, Block, ConvBN


class Gradients(NamedTuple):
    """Gradients of x, skip, the residual scale and the block's tensors; None where not asked for.

    The same shape holds the request, with booleans in place of tensors.
    """

    x: Tensor | None
    skip: Tensor | None
    residual_scale: Tensor | None
    block: Block


class _Branch(NamedTuple):
    """One BN on the way back: its unit, what the forward saved of it, and what is asked of it."""

    unit: ConvBN
    y: Tensor
    vectors: Tensor
    wants: ConvBN
    needs_dy: bool
    residual_scale: Tensor | None = None
    needs_scale: bool = False

    @property
    def needs_sums(self) -> bool:
        """Whether the reduction is needed: batch statistics need it to go on, parameters for themselves."""
        live = self.unit.training
        return bool(self.wants.gamma or self.wants.beta or self.needs_scale or (self.needs_dy if live else self.wants.bias))


def _through_bn(
    dout: Tensor, branches: list[_Branch], signs: Tensor | None, keep_masked: bool, backend: str
) -> tuple[list[Coefficients], list[Tensor | None], Tensor | None]:
    """Through a ReLU and the one or two BNs in front of it: coefficients and dy of each branch, and the masked gradient."""
    first, second = branches[0], branches[1] if len(branches) > 1 else None
    if any(branch.needs_sums for branch in branches):
        pair = {} if second is None else {"y2": second.y, "vectors2": second.vectors}
        partials = bn_act_backward_reduce(dout, first.y, first.vectors, signs=signs, **pair, backend=backend)
    else:
        partials = first.vectors.new_zeros((1, 1 + len(branches), dout.shape[1]))
    coefficients = [
        bn_act_backward_finalize(
            partials,
            row,
            dout.shape[0],
            b.vectors,
            b.unit.gamma,
            b.unit.beta,
            b.residual_scale,
            training=b.unit.training,
            backend=backend,
        )
        for row, b in enumerate(branches, 1)
    ]
    dy, dy2, masked = None, None, None
    if keep_masked or any(branch.needs_dy for branch in branches):
        pair = {} if second is None else {"y2": second.y, "coefficients2": coefficients[1], "training2": second.unit.training}
        dy, dy2, masked = bn_act_backward_apply(
            dout,
            first.y,
            first.vectors,
            coefficients[0],
            training=first.unit.training,
            signs=signs,
            **pair,
            keep_masked=keep_masked,
            backend=backend,
        )
    return [Coefficients(*c) for c in coefficients], [dy, dy2], masked


def _parameters(branch: _Branch, coefficients: Coefficients, dweight: Tensor | None) -> ConvBN:
    wants = branch.wants
    return ConvBN(
        weight=dweight,
        bias=coefficients.dbias if wants.bias else None,
        gamma=coefficients.dgamma if wants.gamma else None,
        beta=coefficients.dbeta if wants.beta else None,
    )


def _projection_input(dy: Tensor, image: Tensor, unit: ConvBN, pool: AvgPool | None, backend: str) -> Tensor:
    """Gradient of x through the projection and the pooling in front of it."""
    if pool is None:
        return conv_dgrad(dy, image, unit, backend=backend)
    dpooled = conv_dgrad(dy, pooled(image, pool), unit, backend=backend)
    return torch.ops.aten.avg_pool2d_backward(dpooled, image, *pool, None)


def backward(
    dout: Tensor,
    x: Tensor,
    residual_scale: Tensor | None,
    block: Block,
    saved: Saved,
    needs: Gradients,
    backend: str,
) -> Gradients:
    """Gradients of `out = relu(a * main(x) + shortcut(x))` at level `bn_act`.

    Args:
        dout: [N, K, H', W'], any strides; never written to.
        x, residual_scale, block: as in the forward.
        saved: what the forward kept.
        needs: which gradients to compute.

    Returns:
        The gradients asked for: images channels_last, weights in the weights' dtype, per-channel vectors in the statistics'.
    """
    image, count = nhwc(x), len(block.main)
    sizes = [tuple(image.shape[2:])]
    for unit in block.main:
        sizes.append(unit.output_size(*sizes[-1]))

    def as_image(rows: Tensor, size: int) -> Tensor:
        return to_image(rows, image.shape[0], *sizes[size])

    # below[i]: whether anything in front of unit i wants a gradient.
    below = [bool(needs.x)]
    for wants in needs.block.main[:-1]:
        below.append(below[-1] or any((wants.weight, wants.bias, wants.gamma, wants.beta)))

    def branch(i: int, *scale) -> _Branch:
        wants = needs.block.main[i]
        return _Branch(block.main[i], saved.ys[i], saved.vectors[i], wants, bool(below[i] or wants.weight), *scale)

    branches = [branch(count - 1, residual_scale, bool(needs.residual_scale))]
    if block.projection is not None:
        wants = needs.block.projection
        branches.append(_Branch(block.projection, saved.ys[count], saved.vectors[count], wants, bool(needs.x or wants.weight)))
    keep_masked = block.projection is None and bool(needs.skip if block.given else needs.x)
    coefficients, dys, masked = _through_bn(to_rows(dout), branches, saved.signs, keep_masked, backend)
    dscale = coefficients[0].dscale.sum() if needs.residual_scale else None

    dx, projection = None, None
    if block.projection is not None:
        unit, dweight = block.projection, None
        dy = as_image(dys[1], count) if branches[1].needs_dy else None
        if branches[1].wants.weight:
            dweight = conv_wgrad(dy, pooled(image, block.pool), unit, backend=backend)
        if needs.x:
            dx = _projection_input(dy, image, unit, block.pool, backend)
        projection = _parameters(branches[1], coefficients[1], dweight)
    elif needs.x and not block.given:
        dx = as_image(masked, count)

    main: list[ConvBN] = [ConvBN(weight=None)] * count
    current, c, dy = branches[0], coefficients[0], dys[0]
    del dys
    for i in reversed(range(count)):
        dweight = None
        if current.wants.weight:
            z = image if i == 0 else as_image(bn_act(saved.ys[i - 1], saved.vectors[i - 1], backend=backend)[0], i)
            dweight = conv_wgrad(as_image(dy, i + 1), z, current.unit, backend=backend)
            del z
        main[i] = _parameters(current, c, dweight)
        if not below[i]:
            break
        like = image if i == 0 else as_image(saved.ys[i - 1], i)
        dz = conv_dgrad(as_image(dy, i + 1), like, current.unit, backend=backend)
        if i == 0:
            dx = dz if dx is None else dz.add_(dx)
            break
        current = branch(i - 1)
        (c,), (dy, _), _ = _through_bn(to_rows(dz), [current], None, False, backend)
    dskip = as_image(masked, count) if needs.skip else None
    return Gradients(dx, dskip, dscale, Block(main, projection))
