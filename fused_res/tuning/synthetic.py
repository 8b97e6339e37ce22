"""Random operands for a convolution or a step, and random blocks, of given shapes: what candidates are tried on.

No pre-activation of an inner ReLU is near 0, so that its signs are the same in every precision: what is then compared are the
products. A ReLU that is closed in a draw with an even seed is open in one with an odd seed, so that it hides nothing in both.
Nothing is drawn from torch's global generators.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fused_res.geometry import Convolution, Geometry
from fused_res.layout import nhwc
from fused_res.primitives.bn_finalize import Vectors
from fused_res.primitives.choice import Call
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.operands import Activation, Addend, Gradient, Output
from fused_res.spec import FORMS, Block, ConvBN

_OPEN = 0.25  # replaces pre-activations
_NEAR = 2.0**-6  # that are nearer to 0 than this


class Draw:
    """Random tensors on a device, the same for the same seed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, self.odd = device, seed % 2 == 1
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float) -> Tensor:
        return (torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low).to(dtype)

    def image(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return nhwc(self.normal(shape, dtype))

    def weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fan_in = shape[1] * shape[2] * shape[3]
        return nhwc(self.normal(shape, dtype, (2 / fan_in) ** 0.5))

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8)

    def open(self, shape: tuple[int, ...]) -> Tensor:
        """Where a ReLU is to be open: at random, the same for all even seeds, and for odd ones where it is closed for those."""
        half = torch.rand(shape, generator=torch.Generator(self.device).manual_seed(0), device=self.device) < 0.5
        return half ^ self.odd

    def vectors(self, channels: int, dtype: torch.dtype) -> Tensor:
        """[5, C] as from `bn_finalize`."""
        mean, var = self.normal((channels,), dtype, 0.1), self.uniform((channels,), dtype, 0.5, 1.5)
        invstd = var.rsqrt()
        scale = self.uniform((channels,), dtype, 0.5, 1.5) * invstd
        return torch.stack((mean, var, invstd, scale, self.normal((channels,), dtype, 0.3)))

    def coefficients(self, channels: int, dtype: torch.dtype, training: bool) -> Tensor:
        """[7, C] as from `bn_act_backward_finalize`."""
        rows = self.normal((7, channels), dtype, 0.1)
        rows[0] = self.uniform((channels,), dtype, 0.5, 1.5)
        if not training:
            rows[1:3] = 0
        return rows


def clear(image: Tensor, vectors: Tensor, open_: Tensor | None = None) -> Tensor:
    """The image with no `scale * image + shift` near 0, and these positive if `open_` is given, the others negative."""
    scale, shift = (row.to(torch.float32).view(-1, 1, 1) for row in (Vectors(*vectors).scale, Vectors(*vectors).shift))
    total = image * scale + shift
    size = torch.where(total.abs() < _NEAR, _OPEN, total.abs())
    wanted = torch.where(total > 0 if open_ is None else open_, size, -size)
    return nhwc(torch.where(wanted == total, image, ((wanted - shift) / scale).to(image.dtype)))


def activation(draw: Draw, like: Activation) -> Activation:
    """A random one of the same shape and dtypes."""
    shape, dtype = tuple(like.image.shape), like.image.dtype
    image = draw.image(shape, dtype)
    if like.vectors is None:
        return Activation(image, stride=like.stride)
    vectors = draw.vectors(shape[1], like.vectors.dtype)
    return Activation(clear(image, vectors, draw.open(shape)), vectors, like.stride)


def _gradient(draw: Draw, like: Gradient) -> Gradient:
    shape, dtype = tuple(like.image.shape), like.image.dtype
    image = draw.image(shape, dtype)
    if like.coefficients is None:
        return Gradient(image)
    vectors = draw.vectors(shape[1], like.vectors.dtype)
    y = clear(draw.image(shape, dtype), vectors, draw.open(shape))
    signs = None if like.signs is None else draw.signs(tuple(like.signs.shape))
    if like.masked:
        open_ = y * vectors[3].view(-1, 1, 1) + vectors[4].view(-1, 1, 1) > 0
        image = nhwc(torch.where(open_, image, 0))
    coefficients = draw.coefficients(shape[1], like.coefficients.dtype, like.training)
    return Gradient(image, y, vectors, coefficients, signs, like.training, like.masked)


def _output(draw: Draw, like: Output) -> Output:
    vectors, vectors2 = (
        None if rows is None else draw.vectors(rows.shape[1], rows.dtype) for rows in (like.vectors, like.vectors2)
    )
    images = (None if image is None else draw.image(tuple(image.shape), image.dtype) for image in (like.skip, like.y2))
    return Output(vectors, *images, vectors2, like.relu)


def _addend(draw: Draw, like: Addend) -> Addend:
    signs = None if like.signs is None else draw.signs(tuple(like.signs.shape))
    return Addend(draw.image(tuple(like.image.shape), like.image.dtype), signs, like.stride)


_KINDS: dict[type, Callable] = {Activation: activation, Gradient: _gradient, Output: _output, Addend: _addend}


def operands(call: Call, device: torch.device, seed: int) -> Call:
    """The call with random tensors of the same shapes and dtypes, those of its operands and its weight."""
    draw = Draw(seed, device)
    weight = draw.weight(tuple(call.unit.weight.shape), call.unit.weight.dtype)

    def fresh(operand: object) -> object:
        if isinstance(operand, Tensor):
            return draw.image(tuple(operand.shape), operand.dtype)
        make = _KINDS.get(type(operand))
        return operand if make is None else make(draw, operand)

    return call._replace(unit=call.unit._replace(weight=weight), operands=tuple(fresh(operand) for operand in call.operands))


def adverse(image: Tensor) -> Tensor:
    """A copy whose first value is NaN, and whose last one infinite."""
    found = image.clone()
    found[(0,) * found.dim()], found[(-1,) * found.dim()] = math.nan, math.inf
    return found


def adverse_operands(call: Call) -> Call:
    """The call with such images in its activations and gradients."""

    def spoil(operand: object) -> object:
        return replace(operand, image=adverse(operand.image)) if isinstance(operand, (Activation, Gradient)) else operand

    return call._replace(operands=tuple(spoil(operand) for operand in call.operands))


def renewed(operand: Activation | Gradient) -> Activation | Gradient:
    """The operand with nothing computed yet, on the same tensors."""
    return replace(operand, _values=None)


def anew(call: Call, dtype: torch.dtype | None = None) -> Call:
    """The call with operands that have computed nothing yet, on the same tensors, or on these in another dtype."""

    def cast(value: object) -> object:
        return value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value

    def renew(operand: object) -> object:
        if isinstance(operand, (Activation, Gradient)):
            return renewed(replace(operand, **{name: cast(value) for name, value in vars(operand).items()}))
        if isinstance(operand, (Output, Addend)):
            return type(operand)(*map(cast, operand))
        return cast(operand)

    unit = call.unit._replace(weight=cast(call.unit.weight))
    return call._replace(unit=unit, operands=tuple(renew(operand) for operand in call.operands))


def _unit(draw: Draw, unit: Convolution, dtype: torch.dtype, in_front: bool) -> ConvBN:
    """in_front: whether its BN normalises the convolution's input."""
    statistics, channels = statistics_dtype(dtype), (unit.weight[1] * unit.groups if in_front else unit.weight[0],)
    weight = draw.weight(unit.weight, dtype)
    gamma, beta = draw.uniform(channels, statistics, 0.5, 1.5), draw.normal(channels, statistics, 0.3)
    mean, var = draw.normal(channels, statistics, 0.1), draw.uniform(channels, statistics, 0.5, 1.5)
    steps = {"stride": unit.stride, "padding": unit.padding, "dilation": unit.dilation, "groups": unit.groups}
    return ConvBN(weight, None, gamma, beta, mean, var, training=unit.training, **steps)


def block(geometry: Geometry, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Block, Tensor]:
    """A random block of this geometry, and an x for it."""
    draw = Draw(seed, device)
    in_front = FORMS[geometry.form].preactivated
    main = [_unit(draw, unit, dtype, in_front) for unit in geometry.main]
    projection = None if geometry.projection is None else _unit(draw, geometry.projection, dtype, in_front)
    if projection is not None and in_front:
        projection = projection._replace(**dict.fromkeys(("gamma", "beta", "running_mean", "running_var")), training=False)
    n, height, width = geometry.images
    first = geometry.main[0]
    x = draw.image((n, first.weight[1] * first.groups, height, width), dtype)
    return Block(main, projection, geometry.pool, geometry.given, geometry.form), x
