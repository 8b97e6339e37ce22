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
from fused_res.primitives.bn_finalize import bn_finalize, bn_running
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.moments import Moments, moments, moments_finalize
from fused_res.primitives.operands import Activation, Output, multiplied
from fused_res.primitives.pointwise_tail import Joined, Pointwise, pointwise_tail
from fused_res.spec import AvgPool, Block, ConvBN


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

    vectors: for every unit the [5, K] tensor of `bn_finalize`; ys: for every unit its convolution's output as a matrix
    [P, K], or None where the moment form does without it; signs: the outer ReLU's sign bits. found: for every unit what the
    moment form found, or None; empty where nobody kept it, and it is found again. The inner activations are recomputed from
    `ys`.
    """

    vectors: Sequence[Tensor]
    ys: Sequence[Tensor | None]
    signs: Tensor
    found: Sequence[Found | None] = ()

    def to_list(self) -> list[Tensor]:
        ys, found = (y for y in self.ys if y is not None), (f for f in self.found if f is not None)
        return [*self.vectors, *ys, *chain.from_iterable(found), self.signs]

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor], block: Block, level: str) -> "Saved":
        level = Level.of(level, block)
        units, kept, counted = len(level.stores), sum(level.stores), level.keeps_moments(block)
        expected = units + kept + len(Found._fields) * sum(counted) + 1
        if len(tensors) != expected:
            raise ValueError(f"saved: expected {expected} tensors at level {level.name!r}, got {len(tensors)}")
        rest = iter(tensors[units:-1])
        ys = [next(rest) if stored else None for stored in level.stores]
        found = [Found(next(rest), next(rest), next(rest)) if there else None for there in counted]
        return cls(tensors[:units], ys, tensors[-1], found)


def running(unit: ConvBN, dtype: torch.dtype, residual_scale: Tensor | None, backend: str) -> Tensor:
    """The unit's [5, K] vectors from its running statistics."""
    statistics = unit.running_mean, unit.running_var, unit.bias, unit.gamma, unit.beta, unit.eps, residual_scale
    return bn_running(*statistics, dtype=statistics_dtype(dtype), backend=backend)


def conv_bn(
    z: Activation, unit: ConvBN, residual_scale: Tensor | None, level: Level, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's output as an image [N, K, H', W'] and as a matrix [P, K], and the unit's vectors."""
    statistics = unit.training and level.epilogues
    image, partials, size = conv_fprop(z, unit, statistics=statistics, backend=level.convolutions(backend))
    y = to_rows(image)
    if not unit.training:
        return image, y, running(unit, y.dtype, residual_scale, backend)
    if partials is None:
        partials, size = bn_stats(y, backend=backend)
    vectors = bn_finalize(partials, size, y.shape[0], unit.gamma, unit.beta, unit.eps, residual_scale, backend=backend)
    return image, y, vectors


def _pointwise(z: Activation, unit: ConvBN, residual_scale: Tensor | None, backend: str) -> tuple[Pointwise, Found | None]:
    """A unit in the moment form: its vectors from the moments of its input."""
    unit = unit._replace(weight=multiplied(unit.weight, backend))
    if not unit.training:
        return Pointwise(z, unit.weight, running(unit, z.image.dtype, residual_scale, backend)), None
    found = moments(z, backend=backend)
    vectors, suspect = moments_finalize(found, z, unit, residual_scale, backend=backend)
    return Pointwise(z, unit.weight, vectors), Found(*found, suspect)


def projected(image: Tensor, unit: ConvBN, pool: AvgPool | None) -> Activation:
    """What a projection in the moment form reads: x, pooled if there is a pool, at the stride of its convolution."""
    return Activation(pooled(image, pool), stride=unit.stride)


def forward(
    x: Tensor, skip: Tensor | None, residual_scale: Tensor | None, block: Block, level: str, save: bool, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """`out = relu(a * main(x) + shortcut(x))`.

    Args:
        x: [N, C, H, W], any strides.
        skip: the shortcut's value [N, K, H', W'] where the block has neither an identity nor a projection.
        residual_scale: the scalar a, or None for 1.
        block: tensors in x's dtype (BN's may be float32).
        level: one of `fused_res.block.levels.LEVELS`.
        save: whether to keep what the backward needs.

    Returns:
        out [N, K, H', W'], channels_last, and the list of `Saved`, of which only `vectors` if not `save`.
    """
    image, level = nhwc(x), Level.of(level, block)
    vectors: list[Tensor] = []
    ys: list[Tensor | None] = []
    z = Activation(image)
    for unit in block.main[:-1]:
        if level.epilogues and not (save or unit.training):
            vectors.append(running(unit, x.dtype, None, backend))
            z = Activation(conv_fprop(z, unit, output=Output(vectors[-1]), backend=backend).image)
            continue
        y, rows, v = conv_bn(z, unit, None, level, backend)
        vectors.append(v)
        ys.append(rows if save else None)
        z = Activation(y, v)
        if not level.prologues:
            z = Activation(z.values(backend))
        del y, rows
    finish = _moment_tail if level.moment_main else _tail
    end = finish(z, image, skip, residual_scale, block, level, save, backend)
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


def _tail(
    z: Activation,
    image: Tensor,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    block: Block,
    level: Level,
    save: bool,
    backend: str,
) -> _End:
    """The last convolution, BN, shortcut and ReLU."""
    unit, y2, rows2, vectors2 = block.main[-1], None, None, None
    if block.projection is not None:
        y2, rows2, vectors2 = conv_bn(Activation(pooled(image, block.pool)), block.projection, None, level, backend)
    elif skip is None:
        skip = image
    others = [] if vectors2 is None else [vectors2]
    if level.epilogues and not (save or unit.training):
        vectors = running(unit, image.dtype, residual_scale, backend)
        output = Output(vectors, None if skip is None else nhwc(skip), y2, vectors2)
        return _End(conv_fprop(z, unit, output=output, backend=backend).image, [vectors, *others], [], None, [])
    y, rows, vectors = conv_bn(z, unit, residual_scale, level, backend)
    del z
    n, _, h, w = y.shape
    shortcut = None if skip is None else to_rows(skip)
    out, signs = bn_act(rows, vectors, skip=shortcut, y2=rows2, vectors2=vectors2, keep_signs=save, backend=backend)
    return _End(to_image(out, n, h, w), [vectors, *others], [rows] if y2 is None else [rows, rows2], signs, [])


def _moment_tail(
    z: Activation,
    image: Tensor,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    block: Block,
    level: Level,
    save: bool,
    backend: str,
) -> _End:
    """As `_tail`, in the moment form: the last convolution's output is never stored."""
    main, of_main = _pointwise(z, block.main[-1], residual_scale, backend)
    vectors: list[Tensor] = [main.vectors]
    kept: list[Tensor | None] = [None]
    found = [of_main]
    if block.projection is None:
        shortcut = Joined(skip=image if skip is None else nhwc(skip))
    elif level.moment_projection:
        branch, of_branch = _pointwise(projected(image, block.projection, block.pool), block.projection, None, backend)
        shortcut = Joined(projection=branch)
        found.append(of_branch)
        vectors.append(branch.vectors)
        kept.append(None)
    else:
        y2, rows2, vectors2 = conv_bn(Activation(pooled(image, block.pool)), block.projection, None, level, backend)
        shortcut = Joined(y2=y2, vectors2=vectors2)
        vectors.append(vectors2)
        kept.append(rows2)
    out, signs = pointwise_tail(main, shortcut, keep_signs=save, backend=backend)
    return _End(out, vectors, kept, signs, found)
