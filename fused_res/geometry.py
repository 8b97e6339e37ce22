"""What a plan for a block may depend on: its numbers without its tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_res.spec import POST_ACTIVATION, AvgPool, Block, ConvBN


class Convolution(NamedTuple):
    """A convolution and its BN: weight [K, C / groups, R, S], and whether the BN takes the batch's statistics."""

    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    training: bool


class Geometry(NamedTuple):
    """A block. `images` is N, H, W of x, or None where a plan must not depend on it: in a graph that holds for several sizes.

    Without a projection the shortcut is the identity, or a tensor that the caller made if `given`.
    """

    main: tuple[Convolution, ...]
    projection: Convolution | None
    pool: AvgPool | None
    given: bool
    images: tuple[int, int, int] | None
    form: str = POST_ACTIVATION

    @property
    def training(self) -> bool:
        """Whether any BN takes the batch's statistics."""
        units = self.main if self.projection is None else (*self.main, self.projection)
        return any(unit.training for unit in units)

    @property
    def pixels(self) -> int | None:
        """About as many as the output has: exact where the padding makes up for the kernels."""
        if self.images is None:
            return None
        return math.prod(self.images) // math.prod(step for unit in self.main for step in unit.stride)

    @property
    def numbers(self) -> tuple:
        """As `numbers_of` gives them."""
        return self.main, self.projection, self.pool, self.given, self.form, self.images

    @classmethod
    def from_numbers(cls, numbers: tuple) -> "Geometry":
        """Inverse of `numbers_of`."""
        main, projection, pool, given, form, images = numbers
        return cls(
            tuple(Convolution(*unit) for unit in main),
            None if projection is None else Convolution(*projection),
            None if pool is None else AvgPool(*pool),
            given,
            images,
            form,
        )


def numbers_of(x: Tensor, block: Block) -> tuple | None:
    """The geometry of a block that is called with x, or None where a weight has no fixed shape.

    In plain tuples: torch.compile hands over named ones without their content. `images` is None where one graph is to hold for
    several sizes, and for tensors without data that no compiler traces.
    """
    if not all(is_fixed(size) for unit in block.units() for size in unit.weight.shape):
        return None
    sizes = (x.shape[0], x.shape[2], x.shape[3])
    known = (torch.compiler.is_compiling() or type(x) in (Tensor, Parameter)) and all(is_fixed(size) for size in sizes)
    projection = None if block.projection is None else _numbers(block.projection)
    pool = None if block.pool is None else (*block.pool,)
    parts = projection, pool, block.given, block.form
    return tuple([_numbers(unit) for unit in block.main]), *parts, sizes if known else None


def _numbers(unit: ConvBN) -> tuple:
    steps = (tuple(unit.stride), tuple(unit.padding), tuple(unit.dilation))
    return tuple(unit.weight.shape), *steps, unit.groups, unit.training


def is_fixed(size: int | torch.SymInt) -> bool:
    """Whether a size is a plain number, asked without fixing it."""
    if not torch.compiler.is_compiling():
        return type(size) is int
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)
