"""The backward schedule of a block: only the gradients asked for, from what the forward saved."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.block.forward import Found, Saved, bare_vectors, projected, through
from fused_res.block.levels import Level
from fused_res.block.pool import join_through_pool, through_pool
from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives.bn_act import sign_bytes
from fused_res.primitives.bn_act_backward import (
    Coefficients,
    bn_act_backward,
    bn_act_backward_apply,
    bn_act_backward_finalize,
    bn_act_backward_reduce,
)
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.conv_dgrad import Inflow, conv_dgrad
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.masked_add import masked_add
from fused_res.primitives.moments import moments
from fused_res.primitives.operands import Activation, Addend, Gradient, multiplied
from fused_res.primitives.pointwise_tail import Pointwise
from fused_res.primitives.pointwise_tail_backward import (
    TailGradients,
    pointwise_tail_backward_apply,
    pointwise_tail_backward_finalize,
    pointwise_tail_backward_reduce,
    scaled_weight,
)
from fused_res.primitives.run import Run
from fused_res.spec import FORMS, AvgPool, Block, ConvBN, in_front, regrouped


class Gradients(NamedTuple):
    """Gradients of x, skip, the residual scale and the block's tensors; None where not asked for.

    The same shape holds the request, with booleans in place of tensors.
    """

    x: Tensor | None
    skip: Tensor | None
    residual_scale: Tensor | None
    block: Block


class _Branch(NamedTuple):
    """One unit on the way back: what the forward saved of it, and what is asked of it. `below`: a gradient is wanted in front."""

    unit: ConvBN
    y: Tensor | None
    vectors: Tensor
    found: Found | None
    wants: ConvBN
    below: bool
    residual_scale: Tensor | None = None
    needs_scale: bool = False

    @property
    def needs_dy(self) -> bool:
        return bool(self.below or self.wants.weight)

    @property
    def needs_any(self) -> bool:
        return bool(self.needs_dy or self.wants.bias or self.wants.gamma or self.wants.beta or self.needs_scale)

    @property
    def needs_sums(self) -> bool:
        """Whether the reduction is needed: batch statistics need it to go on, parameters for themselves."""
        live = self.unit.training
        return bool(self.wants.gamma or self.wants.beta or self.needs_scale or (self.needs_dy if live else self.wants.bias))

    def parameters(self, found: Tensor | TailGradients | None, dweight: Tensor | None) -> ConvBN:
        """Of a tensor of `Coefficients`, or of what stands for it in the moment form."""
        return ConvBN(
            weight=dweight if self.wants.weight else None,
            bias=coefficient(found, "dbias") if self.wants.bias else None,
            gamma=coefficient(found, "dgamma") if self.wants.gamma else None,
            beta=coefficient(found, "dbeta") if self.wants.beta else None,
        )


def coefficient(found: Tensor | TailGradients, name: str) -> Tensor:
    return found[Coefficients._fields.index(name)] if isinstance(found, Tensor) else getattr(found, name)


class _Outer(NamedTuple):
    """The gradient of out, [N, K, H', W'] and channels_last, and the signs of the outer ReLU, if there is one."""

    dout: Tensor
    signs: Tensor | None


def _open(outer: _Outer) -> Tensor:
    """The signs of the outer ReLU, or of one that is open everywhere: an eighth of a byte for each element, and no kernel more."""
    if outer.signs is not None:
        return outer.signs
    n, channels, h, w = outer.dout.shape
    return torch.full((n * h * w, sign_bytes(channels)), 255, dtype=torch.uint8, device=outer.dout.device)


def _coefficients(partials: Tensor | None, row: int, pixels: int, branch: _Branch, run: Run) -> Tensor:
    if partials is None:
        partials = branch.vectors.new_zeros((1, 1 + row, branch.vectors.shape[1]))
    gamma, beta, a = branch.unit.gamma, branch.unit.beta, branch.residual_scale
    options = {"training": branch.unit.training, "run": run}
    return bn_act_backward_finalize(partials, row, pixels, branch.vectors, gamma, beta, a, **options)


def _whole_bn(dout: Tensor, branch: _Branch, signs: Tensor | None, run: Run) -> tuple[Tensor, Tensor]:
    """Through one BN and the ReLU behind it, without a stop: [7, K] coefficients and dy [P, K]."""
    unit, options = branch.unit, {"signs": signs, "training": branch.unit.training, "run": run}
    return bn_act_backward(dout, branch.y, branch.vectors, unit.gamma, unit.beta, branch.residual_scale, **options)


def _outer_bns(outer: _Outer, branches: list[_Branch], level: Level, run: Run) -> tuple[list[Tensor], list[Gradient | None]]:
    """Through the outer ReLU and the BNs added in front of it, one or two: [7, K] coefficients and dy of each branch."""
    dout, signs = to_rows(outer.dout), _open(outer)
    first, second = branches[0], branches[1] if len(branches) > 1 else None
    n, _, h, w = outer.dout.shape
    if second is None and first.needs_sums and first.needs_dy and not level.prologues:
        c, dy = _whole_bn(dout, first, signs, run)
        return [c], [Gradient(to_image(dy, n, h, w))]
    partials = None
    if any(branch.needs_sums for branch in branches):
        pair = {} if second is None else {"y2": second.y, "vectors2": second.vectors}
        partials = bn_act_backward_reduce(dout, first.y, first.vectors, signs=signs, **pair, run=run)
    found = [_coefficients(partials, row, dout.shape[0], branch, run) for row, branch in enumerate(branches, 1)]
    dys: list[Gradient | None] = [None] * len(branches)
    if level.prologues:
        for i, (branch, c) in enumerate(zip(branches, found, strict=True)):
            if branch.needs_dy:
                y = to_image(branch.y, n, h, w)
                dys[i] = Gradient(outer.dout, y, branch.vectors, c, signs, branch.unit.training)
    elif any(branch.needs_dy for branch in branches):
        pair = {} if second is None else {"y2": second.y, "coefficients2": found[1], "training2": second.unit.training}
        live = first.unit.training
        rows = bn_act_backward_apply(dout, first.y, first.vectors, found[0], training=live, signs=signs, **pair, run=run)
        dys = [Gradient(to_image(dy, n, h, w)) for dy in rows[: len(branches)]]
    return found, dys


def _inner_bn(inflow: Inflow, branch: _Branch, level: Level, run: Run) -> tuple[Tensor, Gradient | None]:
    """Through an inner ReLU and the BN in front of it: [7, K] coefficients and dy."""
    partials = inflow.partials
    dz, (n, _, h, w) = to_rows(inflow.image), inflow.image.shape
    if partials is None and branch.needs_sums and branch.needs_dy and not level.prologues:
        c, dy = _whole_bn(dz, branch, None, run)
        return c, Gradient(to_image(dy, n, h, w))
    if partials is None and branch.needs_sums:
        partials = bn_act_backward_reduce(dz, branch.y, branch.vectors, run=run)
    c = _coefficients(partials, 1, dz.shape[0], branch, run)
    if not branch.needs_dy:
        return c, None
    live = branch.unit.training
    if level.prologues:
        return c, Gradient(inflow.image, to_image(branch.y, n, h, w), branch.vectors, c, training=live, masked=inflow.masked)
    dy, _, _ = bn_act_backward_apply(dz, branch.y, branch.vectors, c, training=live, run=run)
    return c, Gradient(to_image(dy, n, h, w))


def _moment_bn(
    outer: _Outer, z: Activation, branch: _Branch, run: Run, into: Tensor | None = None
) -> tuple[TailGradients | None, Inflow | None]:
    """Through the outer ReLU and a unit in the moment form: its gradients, and what flows into z, where they are wanted.

    With `into` the latter joins that image; it is not kept on the way then, and the incoming gradient is read once more.
    """
    if not branch.needs_any:
        return None, None
    pointwise = Pointwise(z, multiplied(branch.unit.weight, run), branch.vectors)
    found, suspect = None, None
    if branch.unit.training:
        kept = branch.found
        found, suspect = (moments(z, run=run), None) if kept is None else (kept.moments, kept.suspect)
    scaled = scaled_weight(pointwise, run=run) if branch.below else None
    mean = None if found is None else found.mean
    sums = pointwise_tail_backward_reduce(*outer, z, mean, scaled if into is None else None, run=run)
    gamma, beta, a = branch.unit.gamma, branch.unit.beta, branch.residual_scale
    arguments = sums, found, pointwise, scaled, gamma, beta, a, *outer, suspect
    gradients = pointwise_tail_backward_finalize(*arguments, run=run)
    inflow = None
    if branch.below:
        ends = {"inner": z.vectors is not None, "into": into}
        inflow = pointwise_tail_backward_apply(*outer, z, scaled, sums.through, gradients, **ends, run=run)
    return gradients, inflow


def _projection(
    read: Activation, branch: _Branch, pool: AvgPool | None, dy: Gradient | None, run: Run
) -> tuple[Tensor | None, Addend | None]:
    """Gradients of a projection's weight and of what it reads, before the pool, from the gradient of its convolution's output."""
    if not branch.needs_dy:
        return None, None
    unit, image, sampled = branch.unit, read.image, through(read, pool, run)
    dweight = conv_wgrad(dy, sampled, unit, run=run) if branch.wants.weight else None
    if not branch.below:
        return dweight, None
    if unit.is_pointwise() and unit.is_strided() and pool is None:
        # The pixels that the convolution passes over get nothing: there is no need to write their zeros and to add them.
        (n, _, h, w), channels = dy.image.shape, image.shape[1]
        read = image.new_empty((n, h, w, channels)).permute(0, 3, 1, 2)
        dx = conv_dgrad(dy, read, unit._replace(stride=(1, 1)), run=run).image
        return dweight, Addend(dx, stride=tuple(unit.stride))
    dx = conv_dgrad(dy, sampled.image, unit, run=run).image
    return dweight, Addend(dx if pool is None else nhwc(through_pool(dx, image, pool)))


class _Bare(NamedTuple):
    """Through a last convolution without a BN: gradients of its bias, of the residual scale and of the bias of a projection beside
    it, where they are wanted, and dy, that of its output."""

    dbias: Tensor | None
    dscale: Tensor | None
    dy: Gradient
    dside: Tensor | None


def _bare_end(outer: _Outer, z: Activation, current: _Branch, side: _Branch | None, level: Level, run: Run) -> _Bare:
    """What a residual scale multiplied is computed once more where the scale's own gradient is wanted: nobody has kept it."""
    rows, unit, a = to_rows(outer.dout), current.unit, current.residual_scale
    wide = statistics_dtype(rows.dtype)
    of_side = side is not None and side.wants.bias
    total = rows.sum(0, dtype=wide) if of_side or current.wants.bias or (current.needs_scale and unit.bias is not None) else None
    dbias = total if current.wants.bias else None
    dy = Gradient(outer.dout)
    if a is not None:
        dbias = None if dbias is None else dbias * a.to(wide)
        dy = Gradient(outer.dout * a)
    dscale = None
    if current.needs_scale:
        read = z if level.prologues else Activation(z.values(run))
        y = to_rows(conv_fprop(read, unit, run=level.convolutions(run)).image)
        vectors = bare_vectors(unit._replace(bias=None), None, torch.ones_like(a), y.dtype)
        partials = bn_act_backward_reduce(rows, y, vectors, signs=_open(outer), run=run)
        dscale = partials[:, 1].sum()
        if unit.bias is not None:
            dscale = dscale + (unit.bias.to(wide) * total).sum()
    return _Bare(dbias, dscale, dy, total if of_side else None)


def _through_head(inflow: Inflow, head: _Branch, add: Addend | None, level: Level, run: Run) -> tuple[ConvBN, Tensor | None]:
    """Through the ReLU and the BN in front of all convolutions: its parameters' gradients, and x's, with the shortcut's."""
    c, dy = _inner_bn(inflow, head, level, run)
    dx = None
    if head.below:
        dx = dy.values(run)
        if add is not None:
            masked_add(dx, add, run=run)
    return head.parameters(c, None), dx


def _moment_projection(
    outer: _Outer, image: Tensor, branch: _Branch, pool: AvgPool | None, dx: Tensor | None, run: Run
) -> TailGradients | None:
    """Through a projection in the moment form: its gradients; x's through it joins dx in place, where that is wanted."""
    z = projected(image, branch.unit, pool)
    if pool is None or dx is None:
        return _moment_bn(outer, z, branch, run, into=dx)[0]
    dpooled = torch.zeros_like(z.image)
    gradients, _ = _moment_bn(outer, z, branch, run, into=dpooled)
    del z
    join_through_pool(dx, dpooled, pool)
    return gradients


def backward(
    dout: Tensor,
    x: Tensor,
    residual_scale: Tensor | None,
    block: Block,
    saved: Saved,
    needs: Gradients,
    level: str,
    run: Run,
) -> Gradients:
    """Gradients of what the block's form says: of `out = relu(a * main(x) + shortcut(x))`, say.

    Args:
        dout: [N, K, H', W'], any strides; never written to.
        x, residual_scale, block, level: as in the forward.
        saved: what the forward kept.
        needs: which gradients to compute.

    Returns:
        The gradients asked for: images channels_last, weights in the weights' dtype, per-channel vectors in the statistics'.
    """
    image, count, level = nhwc(x), len(block.main), Level.of(level, block)
    (head, block), (head_wants, wants_of) = regrouped(block), regrouped(needs.block)
    outer, convolutions = _Outer(nhwc(dout), saved.signs), level.convolutions(run)
    sizes = [tuple(image.shape[2:]), *block.sizes(*image.shape[2:])]

    units, wanted = block.units(), wants_of.units()
    # With a BN in front of all convolutions, the others' vectors come after its own.
    vectors = [*saved.vectors[head is not None :], *[None] * len(units)]

    def branch(i: int, below: bool, *scale) -> _Branch:
        found = saved.found[i] if saved.found else None
        return _Branch(units[i], saved.ys[i], vectors[i], found, wanted[i], below, *scale)

    # below[i]: whether anything in front of unit i wants a gradient.
    below = [bool(needs.x) or (head is not None and any((head_wants.gamma, head_wants.beta)))]
    for wants in wants_of.main[:-1]:
        below.append(below[-1] or any((wants.weight, wants.bias, wants.gamma, wants.beta)))

    before = None
    if head is not None:  # whose input is x, and which has no convolution in front whose weight would want dy
        before = _Branch(head, to_rows(image), saved.vectors[0], None, head_wants._replace(weight=False, bias=False), bool(needs.x))
    current = branch(count - 1, below[-1], residual_scale, bool(needs.residual_scale))
    side = None if block.projection is None else branch(count, below[0])
    identity = FORMS[block.form].skip and side is None and not block.given
    # What joins the gradient of what the first convolution reads: x's own shortcut, unless that begins in front of a BN.
    add = Addend(*outer) if identity and head is None else None
    dprojection = None

    def activation(i: int) -> Activation:
        """What unit i of main reads."""
        if i == 0:
            return Activation(image) if head is None else Activation(image, saved.vectors[0])
        return Activation(to_image(saved.ys[i - 1], image.shape[0], *sizes[i]), vectors[i - 1])

    main: list[ConvBN] = [ConvBN(weight=None)] * count
    if level.moment_main:
        dy, z = None, activation(count - 1)
        c, inflow = _moment_bn(outer, z, current, run)
        del z
        if side is not None and not level.moment_projection:
            (found,), (dside,) = _outer_bns(outer, [side], level, run)
            dweight, add = _projection(Activation(image), side, block.pool, dside, convolutions)
            dprojection = side.parameters(found, dweight)
            del dside
    elif head is not None:
        c, bare = None, _bare_end(outer, activation(count - 1), current, side, level, run)
        dy, dscale = bare.dy, bare.dscale
        if side is not None:
            z = activation(0)
            read = z if level.prologues else Activation(z.values(run))
            dweight, add = _projection(read, side, block.pool, Gradient(outer.dout), convolutions)
            dprojection = ConvBN(dweight, bare.dside)
            del z, read
    else:
        branches = [current] if side is None else [current, side]
        (c, *found), (dy, *dsides) = _outer_bns(outer, branches, level, run)
        if side is not None:
            dweight, add = _projection(Activation(image), side, block.pool, dsides[0], convolutions)
            dprojection = side.parameters(found[0], dweight)
        del dsides
    if head is None:
        dscale = coefficient(c, "dscale").sum() if needs.residual_scale else None

    dx = None
    for i in reversed(range(count)):
        if i == count - 1 and level.moment_main:
            dweight = None if c is None else c.dweight
            if i == 0 and needs.x:
                dx = inflow.image
                if add is not None:
                    masked_add(dx, add, run=run)
        else:
            z = activation(i)
            dweight = None
            if current.wants.weight:
                read = z if level.prologues else Activation(z.values(run))
                dweight = conv_wgrad(dy, read, current.unit, run=convolutions)
                z, read = activation(i), None  # frees the values
            if i == 0 and head is None and needs.x:
                joins = add if level.epilogues else None
                dx = conv_dgrad(dy, image, current.unit, add=joins, run=convolutions).image
                if add is not None and joins is None:
                    masked_add(dx, add, run=run)
            elif below[i]:
                behind, joins = (before, add) if i == 0 else (branch(i - 1, below[i - 1]), None)
                inner = z if level.epilogues and joins is None and behind.needs_sums else None
                ends = {"inner": inner, "add": joins if level.epilogues else None}
                inflow = conv_dgrad(dy, z.image, current.unit, **ends, run=convolutions)
                if joins is not None and not level.epilogues:
                    masked_add(inflow.image, joins, run=run)
        if head is not None and i == count - 1:
            main[i] = ConvBN(dweight, bare.dbias)
        else:
            main[i] = current.parameters(c, dweight)
        if i == 0 or not below[i]:
            break
        current = branch(i - 1, below[i - 1])
        c, dy = _inner_bn(inflow, current, level, run)
        inflow = None  # frees its image
    dhead = ConvBN(None)
    if head is not None and below[0]:
        dhead, dx = _through_head(inflow, before, Addend(outer.dout) if identity else None, level, run)
    if side is not None and level.moment_projection:
        found = _moment_projection(outer, image, side, block.pool, dx, run)
        dprojection = side.parameters(found, None if found is None else found.dweight)
    dskip = None
    if needs.skip:
        dskip = outer.dout.clone() if outer.signs is None else torch.zeros_like(outer.dout)
        if outer.signs is not None:
            masked_add(dskip, Addend(*outer), run=run)
    found = Block(main, dprojection)
    return Gradients(dx, dskip, dscale, found if head is None else in_front(dhead, found))
