"""The forward schedule of a block: which primitive runs when, and what is kept for backward."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.block.levels import Level
from fused_res.block.pool import pooled
from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_finalize import bn_finalize, bn_running, bn_stats_finalize
from fused_res.primitives.bn_stats_act import bn_stats_act
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.conv_fprop import conv_fprop, finished
from fused_res.primitives.moments import Moments, moments, moments_finalize
from fused_res.primitives.operands import Activation, Output, multiplied
from fused_res.primitives.pointwise_tail import Joined, Pointwise, pointwise_tail
from fused_res.primitives.run import Run
from fused_res.spec import FORMS, AvgPool, Block, ConvBN, regrouped


class Found(NamedTuple):
    """What the moment form knows of a unit under batch statistics.

    mean [K] and covariance [K, K] of its input, float64; suspect [C], bool: the channels that took their statistics directly.
    """

    mean: Tensor
    covariance: Tensor
    suspect: Tensor

    @property
    def moments(self) -> Moments:
        return Moments(self.mean, self.covariance)


class Saved(NamedTuple):
    """What the forward keeps for the backward, beside the inputs.

    vectors: for every BN, in the order of `block.norms()`, the [5, K] tensor of `bn_finalize`; ys: for every unit its convolution's
    output as a matrix [P, K], or None where backward does without it; signs: the outer ReLU's sign bits, if there is one. found:
    for every unit what the moment form found, or None; empty where nobody kept it, and it is found again. The inner activations
    are recomputed from `ys`, and from x where a BN comes first.
    """

    vectors: Sequence[Tensor]
    ys: Sequence[Tensor | None]
    signs: Tensor | None
    found: Sequence[Found | None] = ()

    def to_list(self) -> list[Tensor]:
        ys, found = (y for y in self.ys if y is not None), (f for f in self.found if f is not None)
        return [*self.vectors, *ys, *chain.from_iterable(found), *(() if self.signs is None else (self.signs,))]

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor], block: Block, level: str) -> "Saved":
        level = Level.of(level, block)
        norms, kept, counted, signed = len(block.norms()), sum(level.stores), level.keeps_moments(block), FORMS[block.form].relu
        expected = norms + kept + len(Found._fields) * sum(counted) + signed
        if len(tensors) != expected:
            raise ValueError(f"saved: expected {expected} tensors at level {level.name!r}, got {len(tensors)}")
        rest = iter(tensors[norms:])
        ys = [next(rest) if stored else None for stored in level.stores]
        found = [Found(next(rest), next(rest), next(rest)) if there else None for there in counted]
        return cls(tensors[:norms], ys, next(rest) if signed else None, found)


def running(unit: ConvBN, dtype: torch.dtype, residual_scale: Tensor | None, run: Run) -> Tensor:
    """The unit's [5, K] vectors from its running statistics."""
    statistics = unit.running_mean, unit.running_var, unit.bias, unit.gamma, unit.beta, unit.eps, residual_scale
    return bn_running(*statistics, dtype=statistics_dtype(dtype), run=run)


def conv_bn(z: Activation, unit: ConvBN, residual_scale: Tensor | None, level: Level, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's output as an image [N, K, H', W'] and as a matrix [P, K], and the unit's vectors."""
    statistics = unit.training and level.epilogues
    image, partials, size = conv_fprop(z, unit, statistics=statistics, run=level.convolutions(run))
    y = to_rows(image)
    if not unit.training:
        return image, y, running(unit, y.dtype, residual_scale, run)
    parameters = unit.gamma, unit.beta, unit.eps, residual_scale
    if partials is None:
        return image, y, bn_stats_finalize(y, *parameters, run=run)
    return image, y, bn_finalize(partials, size, y.shape[0], *parameters, run=run)


def whole_unit(
    z: Activation, unit: ConvBN, residual_scale: Tensor | None, level: Level, run: Run, **ends: object
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `conv_bn`, with what follows the BN: the convolution's output as a matrix, the vectors, the result as an image, its signs.

    ends: arguments of `bn_act`.
    """
    if unit.training and not level.epilogues:
        image = conv_fprop(z, unit, run=level.convolutions(run)).image
        y = to_rows(image)
        v, out, signs = bn_stats_act(y, unit.gamma, unit.beta, unit.eps, residual_scale, **ends, run=run)
    else:
        image, y, v = conv_bn(z, unit, residual_scale, level, run)
        out, signs = bn_act(y, v, **ends, run=run)
    n, _, h, w = image.shape
    return y, v, to_image(out, n, h, w), signs


def _pointwise(z: Activation, unit: ConvBN, residual_scale: Tensor | None, run: Run) -> tuple[Pointwise, Found | None]:
    """A unit in the moment form: its vectors from the moments of its input."""
    unit = unit._replace(weight=multiplied(unit.weight, run))
    if not unit.training:
        return Pointwise(z, unit.weight, running(unit, z.image.dtype, residual_scale, run)), None
    found = moments(z, run=run)
    vectors, suspect = moments_finalize(found, z, unit, residual_scale, run=run)
    return Pointwise(z, unit.weight, vectors), Found(*found, suspect)


def projected(image: Tensor, unit: ConvBN, pool: AvgPool | None) -> Activation:
    """What a projection in the moment form reads: x, pooled if there is a pool, at the stride of its convolution."""
    return Activation(pooled(image, pool), stride=unit.stride)


def forward(
    x: Tensor, skip: Tensor | None, residual_scale: Tensor | None, block: Block, level: str, save: bool, run: Run
) -> tuple[Tensor, list[Tensor]]:
    """What the block's form says (`fused_res.spec.FORMS`): `out = relu(a * main(x) + shortcut(x))`, say.

    Args:
        x: [N, C, H, W], any strides.
        skip: the shortcut's value [N, K, H', W'] where that is neither the identity nor a projection, and there is one.
        residual_scale: the scalar a, or None for 1.
        block: tensors in x's dtype (BN's may be float32).
        level: one of `fused_res.block.levels.LEVELS`.
        save: whether to keep what the backward needs.

    Returns:
        out [N, K, H', W'], channels_last, and the list of `Saved`, of which only `vectors` if not `save`.
    """
    image, level = nhwc(x), Level.of(level, block)
    head, block = regrouped(block)
    vectors: list[Tensor] = []
    ys: list[Tensor | None] = []
    z = Activation(image)
    if head is not None:
        vectors.append(_in_front(image, head, run))
        z = Activation(image, vectors[0])
        if not level.prologues:
            z = Activation(z.values(run))
    first = z if head is not None and block.projection is not None else None
    for unit in block.main[:-1]:
        if level.epilogues and not (save or unit.training):
            vectors.append(running(unit, x.dtype, None, run))
            z = Activation(conv_fprop(z, unit, output=Output(vectors[-1]), run=run).image)
            continue
        if level.prologues:
            y, rows, v = conv_bn(z, unit, None, level, run)
            z = Activation(y, v)
            del y
        else:
            rows, v, values, _ = whole_unit(z, unit, None, level, run)
            z = Activation(values)
            del values
        vectors.append(v)
        ys.append(rows if save else None)
        del rows
    if head is not None:
        end = _bare_tail(z, first or Activation(image), skip, residual_scale, block, level, run)
    else:
        finish = _moment_tail if level.moment_main else _tail
        end = finish(z, image, skip, residual_scale, block, level, save, run)
    vectors += end.vectors
    if not save:
        return end.out, vectors
    return end.out, Saved(vectors, [*ys, *end.ys], end.signs, end.found).to_list()


class _End(NamedTuple):
    """The block's output, and of its last units what `Saved` has."""

    out: Tensor
    vectors: list[Tensor]
    ys: list[Tensor | None]
    signs: Tensor | None
    found: list[Found | None]


def _in_front(image: Tensor, head: ConvBN, run: Run) -> Tensor:
    """The [5, C] vectors of the BN in front of all convolutions. Another normalisation of x would be found here."""
    rows = to_rows(image)
    if not head.training:
        return running(head, rows.dtype, None, run)
    return bn_stats_finalize(rows, head.gamma, head.beta, head.eps, run=run)


def bare_vectors(unit: ConvBN, side: ConvBN | None, residual_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[5, K] of what stands behind a convolution that has no BN: `scale = a`, `shift = a * bias + bias2`; None for nothing.

    side: a convolution that is added as it is, and whose bias2 then joins here.
    """
    biases = unit.bias is not None or (side is not None and side.bias is not None)
    if residual_scale is None and not biases:
        return None
    rows = unit.weight.new_zeros((5, unit.weight.shape[0]), dtype=statistics_dtype(dtype))
    rows[1:4] = 1
    if unit.bias is not None:
        rows[4] = unit.bias
    if residual_scale is not None:
        rows[3:] *= residual_scale
    if side is not None and side.bias is not None:
        rows[4] += side.bias
    return rows


def _bare_tail(
    z: Activation,
    first: Activation,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    block: Block,
    level: Level,
    run: Run,
) -> _End:
    """The last convolution, without a BN, and the shortcut. first: what a projection reads; or else x."""
    unit, side, convolutions = block.main[-1], block.projection, level.convolutions(run)
    if side is not None:
        skip = conv_fprop(through(first, block.pool, run), side, run=convolutions).image
    elif skip is None:
        skip = first.image
    output = Output(bare_vectors(unit, side, residual_scale, skip.dtype), nhwc(skip), relu=False)
    if level.epilogues:
        return _End(conv_fprop(z, unit, output=output, run=run).image, [], [], None, [])
    y = conv_fprop(z, unit, run=convolutions).image
    return _End(finished(y, output, run=run), [], [], None, [])


def through(z: Activation, pool: AvgPool | None, run: Run) -> Activation:
    """What a projection reads behind a pool."""
    return z if pool is None else Activation(pooled(z.values(run), pool))


def _tail(
    z: Activation,
    image: Tensor,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    block: Block,
    level: Level,
    save: bool,
    run: Run,
) -> _End:
    """The last convolution and BN, and what there is of shortcut and ReLU."""
    unit, form, y2, rows2, vectors2 = block.main[-1], FORMS[block.form], None, None, None
    if block.projection is not None:
        y2, rows2, vectors2 = conv_bn(Activation(pooled(image, block.pool)), block.projection, None, level, run)
    elif skip is None and form.skip:
        skip = image
    others = [] if vectors2 is None else [vectors2]
    if level.epilogues and not (save or unit.training):
        vectors = running(unit, image.dtype, residual_scale, run)
        output = Output(vectors, None if skip is None else nhwc(skip), y2, vectors2, form.relu)
        return _End(conv_fprop(z, unit, output=output, run=run).image, [vectors, *others], [], None, [])
    ends = {"skip": None if skip is None else to_rows(skip), "y2": rows2, "vectors2": vectors2}
    ends |= {"keep_signs": save and form.relu, "relu": form.relu}
    rows, vectors, out, signs = whole_unit(z, unit, residual_scale, level, run, **ends)
    return _End(out, [vectors, *others], [rows] if y2 is None else [rows, rows2], signs, [])


def _moment_tail(
    z: Activation,
    image: Tensor,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    block: Block,
    level: Level,
    save: bool,
    run: Run,
) -> _End:
    """As `_tail`, in the moment form: the last convolution's output is never stored."""
    main, of_main = _pointwise(z, block.main[-1], residual_scale, run)
    vectors: list[Tensor] = [main.vectors]
    kept: list[Tensor | None] = [None]
    found = [of_main]
    if block.projection is None:
        shortcut = Joined(skip=image if skip is None else nhwc(skip))
    elif level.moment_projection:
        branch, of_branch = _pointwise(projected(image, block.projection, block.pool), block.projection, None, run)
        shortcut = Joined(projection=branch)
        found.append(of_branch)
        vectors.append(branch.vectors)
        kept.append(None)
    else:
        y2, rows2, vectors2 = conv_bn(Activation(pooled(image, block.pool)), block.projection, None, level, run)
        shortcut = Joined(y2=y2, vectors2=vectors2)
        vectors.append(vectors2)
        kept.append(rows2)
    out, signs = pointwise_tail(main, shortcut, keep_signs=save, run=run)
    return _End(out, vectors, kept, signs, found)
