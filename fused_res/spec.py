"""What a residual block is made of, as data."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """What `torch.nn.functional.conv2d` takes for two numbers, as a pair: one number, or a sequence of one or two.

    Raises:
        TypeError: anything but integers.
        RuntimeError: a sequence of another length.
    """
    if not isinstance(value, (tuple, list)):
        value = (value,)
    if len(value) not in (1, 2):
        raise RuntimeError(f"expected {name} to be a single integer value or a list of 2 values, got {value!r}")
    return tuple(_integer(v, name) for v in (value if len(value) == 2 else value * 2))


def _integer(value: int, name: str) -> int:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected integers, got {type(value).__name__}")
    return operator.index(value)


class ConvBN(NamedTuple):
    """A 2-D convolution followed by batch normalisation, as tensors and numbers.

    `training=True` normalises with the batch's statistics and updates `running_mean`/`running_var` where they are given, as
    `torch.nn.functional.batch_norm` does; `training=False` normalises with the running statistics, which must then be given.
    `momentum=None` is the cumulative average of `nn.BatchNorm2d` and needs `num_batches_tracked`, which is incremented where
    it is given and `training` is set.

    Shapes: `weight` [K, C / groups, R, S]; every other tensor [K], but `num_batches_tracked`, a scalar of dtype int64.

    In a pre-activation block the BN is that in front of the convolution: its tensors are [C].
    """

    weight: Tensor
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the convolution's output for an input of this height and width."""
        _, _, r, s = self.weight.shape
        (down, right), (top, left), (dr, ds) = self.stride, self.padding, self.dilation
        return (height + 2 * top - dr * (r - 1) - 1) // down + 1, (width + 2 * left - ds * (s - 1) - 1) // right + 1

    def is_pointwise(self) -> bool:
        """Whether the convolution is one matrix product over the pixels, or with a stride over a sample of them."""
        return tuple(self.weight.shape[2:]) == (1, 1) and tuple(self.padding) == (0, 0) and self.groups == 1

    def is_strided(self) -> bool:
        """Whether it passes over pixels."""
        return tuple(self.stride) != (1, 1)


class AvgPool(NamedTuple):
    """Average pooling in front of a projection (ResNet-D, https://arxiv.org/abs/1812.01187), with `nn.AvgPool2d`'s meaning."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after pooling; with `ceil_mode` no window starts in the padding on the far side."""
        sizes = []
        for size, kernel, stride, padding in zip((height, width), self.kernel_size, self.stride, self.padding, strict=True):
            out = (size + 2 * padding - kernel + (stride - 1 if self.ceil_mode else 0)) // stride + 1
            sizes.append(out - 1 if self.ceil_mode and (out - 1) * stride >= size + padding else out)
        return tuple(sizes)


class Form(NamedTuple):
    """What a block computes of its parts.

    preactivated: BN and ReLU come before each convolution, not behind it. relu: whether a ReLU ends the block. skip: whether there
    is a shortcut to be added.
    """

    preactivated: bool
    relu: bool
    skip: bool


POST_ACTIVATION = "post-activation"
PRE_ACTIVATION = "pre-activation"
LINEAR = "linear"
CHAIN = "chain"
LINEAR_CHAIN = "linear chain"
FORMS = {
    POST_ACTIVATION: Form(preactivated=False, relu=True, skip=True),
    PRE_ACTIVATION: Form(preactivated=True, relu=False, skip=True),
    LINEAR: Form(preactivated=False, relu=False, skip=True),
    CHAIN: Form(preactivated=False, relu=True, skip=False),
    LINEAR_CHAIN: Form(preactivated=False, relu=False, skip=False),
}
"""The forms of a block; each one's number in the operator's `spec` is its place here.

post-activation: `relu(a * main(x) + shortcut(x))`, main being conv-BN-ReLU-…-conv-BN. linear: the same without the last ReLU.
pre-activation: `a * main(x) + shortcut(x)`, main being BN-ReLU-conv-…-BN-ReLU-conv, where a projection is a convolution alone and
reads what the first one reads. chain and linear chain: `relu(main(x))` and `main(x)`, without a shortcut.
"""


class Block(NamedTuple):
    """The parts of one block: `main` in order, and the shortcut.

    The shortcut is `projection`, with `pool` in front of it if there is one; or, if `given`, a tensor that the caller made; or
    else the identity; there is none where `form`, one of `FORMS`, has none.
    """

    main: Sequence[ConvBN]
    projection: ConvBN | None = None
    pool: AvgPool | None = None
    given: bool = False
    form: str = POST_ACTIVATION

    def units(self) -> list[ConvBN]:
        """All of them, the projection last. No property: torch.compile of torch 2.10 follows none of a named tuple."""
        return [*self.main, self.projection] if self.projection is not None else list(self.main)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of the output of each of `main`, for an input of the block of this height and width.

        The last is the block's, where a projection ends, too.
        """
        sizes, size = [], (height, width)
        for unit in self.main:
            size = unit.output_size(*size)
            sizes.append(size)
        return sizes

    def output_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        """Of the block, for an input x [N, C, H, W]: [N, K, H', W']."""
        return (x.shape[0], self.main[-1].weight.shape[0], *self.sizes(*x.shape[2:])[-1])

    def norms(self) -> list[ConvBN]:
        """For every BN, in the order of `units`, the unit whose BN it would be if all BNs came behind their convolutions."""
        if not FORMS[self.form].preactivated:
            return self.units()
        head, behind = regrouped(self)
        return [head, *behind.main[:-1]]


_CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups")


def _convolved(conv: ConvBN, bn: ConvBN | None) -> ConvBN:
    """The convolution of one unit with the BN of another, or with none."""
    if bn is None:
        return ConvBN(**{name: getattr(conv, name) for name in _CONVOLUTION}, training=False)
    return bn._replace(**{name: getattr(conv, name) for name in _CONVOLUTION})


def regrouped(block: Block) -> tuple[ConvBN | None, Block]:
    """A block as its schedules see it: BNs behind their convolutions, and the BN in front of all.

    A pre-activation block's last convolution, and its projection, have no BN then. Of other forms the block itself, and None.
    """
    if not FORMS[block.form].preactivated:
        return None, block
    units, projection = block.main, block.projection
    behind = [_convolved(conv, bn) for conv, bn in zip(units, [*units[1:], None], strict=True)]
    side = None if projection is None else _convolved(projection, None)
    return units[0]._replace(weight=None, bias=None), block._replace(main=behind, projection=side)


def in_front(head: ConvBN, block: Block) -> Block:
    """Inverse of `regrouped`, of gradients say."""
    bns = [head, *block.main[:-1]]
    return block._replace(main=[_convolved(conv, bn) for conv, bn in zip(block.main, bns, strict=True)])
