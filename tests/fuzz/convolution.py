"""The convolutions in all three directions: every geometry, prologue and epilogue, by the library and by kernels of ours."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from compare import within
from hypothesis import strategies as st
from torch import Tensor

from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives import products
from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.choice import Choice
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.operands import Activation, Addend, Gradient, Output
from fused_res.primitives.run import Fixed, Run, of
from fused_res.spec import ConvBN
from fuzz.bounds import activation, affine, gate, hold, hold_statistics, hold_sums, roundoff, stored, untouched
from fuzz.draws import DTYPES, Scope, Target, Values, flags, offsets, seeds


class Geometry(NamedTuple):
    """Of a convolution from c to k channels, both of them per group."""

    n: int
    c: int
    k: int
    groups: int
    size: tuple[int, int]
    filter: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def unit(self, weight: Tensor) -> ConvBN:
        return ConvBN(weight, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)

    @property
    def fits(self) -> bool:
        taps = zip(self.size, self.filter, self.padding, self.dilation, strict=True)
        return all(size + 2 * pad >= d * (tap - 1) + 1 for size, tap, pad, d in taps)


_OWN = (((1, 1), (1, 1), (0, 0), (1, 1)), ((3, 3), (1, 1), (1, 1), (1, 1)))


def geometries(scope: Scope):
    """Half of them those that compiled kernels take: 1x1, and unstrided 3x3."""
    width = st.sampled_from((1, 2, 3, 5, 8, 16, 17, 20) if scope.small else (1, 2, 3, 5, 7, 8, 16, 17, 24, 32, 33, 48, 65))

    def pair(low, high):
        return st.tuples(st.integers(low, high), st.integers(low, high))

    any_steps = st.tuples(pair(1, 3), pair(1, 2), pair(0, 3), pair(1, 2))
    steps = st.one_of(
        st.sampled_from(_OWN),
        st.tuples(st.just((1, 1)), pair(1, 3), st.just((0, 0)), pair(1, 2)),
        st.tuples(st.just((3, 3)), st.just((1, 1)), pair(0, 2), st.just((1, 1))),
        any_steps,
    )
    groups = st.sampled_from((1, 1, 1, 2, 3))

    def build(n, c, k, groups, size, steps):
        return Geometry(n, c, k, groups, size, *steps)

    return st.builds(build, st.integers(1, 3), width, width, groups, scope.size, steps).filter(lambda g: g.fits)


class Conv(NamedTuple):
    """own: whether the backend's own kernel runs wherever it can, or only where the rules say so.

    weight: its layout. epilogue: of fprop none, statistics or an output with its shortcut; of dgrad none, inner, add or signed add.
    mask: of the gradient: plain, signs, inner, or masked. prologue: whether x is an activation.
    """

    dtype: str
    geometry: Geometry
    own: bool
    weight: str
    prologue: bool
    mask: str
    training: bool
    epilogue: str
    kind: str
    offset: int
    seed: int


def _cases(epilogues: tuple[str, ...]):
    def cases(scope: Scope):
        layouts = st.sampled_from(("contiguous", "channels_last", "sliced"))
        masks = st.sampled_from(("plain", "signs", "inner", "masked"))
        kind = st.sampled_from(("normal", "normal", "integers", "sparse"))
        ends = st.sampled_from(epilogues)
        return st.builds(Conv, scope.dtype, geometries(scope), flags, layouts, flags, masks, flags, ends, kind, offsets, seeds)

    return cases


def _run(case: Conv, backend: str) -> Run:
    return Fixed(backend, Choice(True)) if case.own else of(backend)


def _unit(case: Conv, values: Values, dtype: torch.dtype) -> ConvBN:
    g = case.geometry
    shape = g.k * g.groups, g.c, *g.filter
    weight = (values.wide(*shape) / (g.c * g.filter[0] * g.filter[1]) ** 0.5).to(dtype)
    if case.weight == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    elif case.weight == "sliced":
        weight = torch.stack((weight, weight), -1)[..., 0]
    return g.unit(weight)


def _conv(x: Tensor, weight: Tensor, unit: ConvBN) -> Tensor:
    return F.conv2d(x, weight, None, unit.stride, unit.padding, unit.dilation, unit.groups)


def _dgrad(dy: Tensor, weight: Tensor, unit: ConvBN, shape) -> Tensor:
    geometry = (unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)
    like = torch.empty(shape, dtype=torch.float64)
    return torch.ops.aten.convolution_backward(dy, like, weight, None, *geometry, (True, False, False))[0]


def _wgrad(dy: Tensor, x: Tensor, unit: ConvBN, weight: Tensor) -> Tensor:
    geometry = (unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)
    return torch.ops.aten.convolution_backward(dy.contiguous(), x.contiguous(), weight, None, *geometry, (False, True, False))[1]


def _filtered(unit: ConvBN) -> bool:
    """Whether the convolution may run by F(2x2, 3x3)."""
    steps = (tuple(unit.stride), tuple(unit.dilation), unit.groups)
    return tuple(unit.weight.shape[2:]) == (3, 3) and steps == ((1, 1), (1, 1), 1)


def _spread(image: Tensor) -> Tensor:
    """The largest magnitude among the pixels that a tile of F(2x2, 3x3) reads beside this one: up to two away for fprop, dgrad."""
    return F.max_pool2d(image.abs(), 5, 1, 2)


# A tile's inputs are sums of 4 values, its filters of at most 9 / 4, its outputs of 9 products; each sum rounds a few times.
_GROWTH = 4 * 9 / 4 * 9


def _librarys(case: Conv, backend: str) -> bool:
    """Whether the library may run it in 16 bits, for which only Triton has kernels."""
    return backend != "triton" or not case.own or case.geometry.groups > 1


def _accumulated(dtype: torch.dtype, terms: int, librarys: bool) -> float:
    """Relative to the sum of magnitudes. The library's 16-bit sums may be kept in 16 bits for a while."""
    u = roundoff(dtype)
    if librarys and dtype.itemsize == 2:
        u = torch.finfo(dtype).eps
    return (terms + 16) * u


def _winograd_limit(image: Tensor, weight: Tensor, unit: ConvBN, channels: int, u: float, of_x: bool) -> Tensor:
    """For every output: every filter's sum of magnitudes, over the channels, with the largest input of its tiles."""
    taps = weight.abs().sum((2, 3))  # [K, C]
    near = _spread(image)
    padded = F.pad(near, (3, 3, 3, 3))
    reach = F.max_pool2d(padded, 7, 1)[:, :, : near.shape[2], : near.shape[3]] if near.numel() else near
    total = torch.einsum("kc,nchw->nkhw" if not of_x else "kc,nkhw->nchw", taps, reach)
    return (channels + 40) * u * _GROWTH * total


def _resized(limit: Tensor, shape) -> Tensor:
    """The largest anywhere near: outputs lie up to two pixels from the inputs of the same index, more at the padding."""
    return limit.amax((2, 3), keepdim=True).expand(shape)


def _x(case: Conv, values: Values, dtype: torch.dtype) -> tuple[Activation, Tensor, Tensor]:
    """The operand, its values and by how much they may be off, as images in float64."""
    g = case.geometry
    channels = g.c * g.groups
    image = values.image(g.n, channels, *g.size, dtype=dtype, kind=case.kind, offset=case.offset)
    vectors = values.vectors(channels, dtype) if case.prologue else None
    rows, off = activation(to_rows(image), vectors)
    return Activation(image, vectors), *(to_image(t.contiguous(), g.n, *g.size) for t in (rows, off))


def _dy(case: Conv, values: Values, dtype: torch.dtype, unit: ConvBN) -> tuple[Gradient, Tensor, Tensor]:
    g = case.geometry
    n, k, size = g.n, g.k * g.groups, unit.output_size(*g.size)
    image = values.image(n, k, *size, dtype=dtype, kind=case.kind, offset=case.offset)
    rows = to_rows(image)
    if case.mask == "plain":
        return Gradient(image), image.double(), torch.zeros(image.shape, dtype=torch.float64)
    y, vectors = values.image(n, k, *size, dtype=dtype), values.vectors(k, dtype)
    coefficients = values.wide(7, k).to(vectors.dtype)
    if not case.training:
        coefficients[1:3] = 0
    masked = case.mask == "masked"
    signs = pack_signs(values.open(len(rows), k)) if case.mask == "signs" else None
    grad, doubt = gate(rows, to_rows(y), vectors, signs)
    if masked:
        rows = torch.where(doubt > 0, torch.zeros_like(rows), grad.to(dtype))
        image, grad, doubt = to_image(rows.contiguous(), n, *size), rows.double(), torch.zeros_like(doubt)
    p, q, r = coefficients[:3].double()
    terms = [p * grad, q * to_rows(y).double(), r.expand_as(grad)] if case.training else [p * grad]
    value = sum(terms)
    off = stored(value, 4 * roundoff(dtype) * sum(t.abs() for t in terms) + p.abs() * doubt, dtype)
    operand = Gradient(image, y, vectors, coefficients, signs, case.training, masked)
    return operand, *(to_image(t.contiguous(), n, *size) for t in (value, off))


def _given(*operands) -> list[Tensor]:
    return [t for operand in operands if operand is not None for t in vars(operand).values() if isinstance(t, Tensor)]


def check_fprop(case: Conv, backend: str) -> None:
    values, dtype = Values(case.seed), DTYPES[case.dtype]
    unit = _unit(case, values, dtype)
    x, true, off = _x(case, values, dtype)
    w = unit.weight.double()
    y, magnitude = _conv(true, w, unit), _conv(true.abs() + off, w.abs(), unit)
    terms = unit.weight[0].numel()
    slack = _conv(off, w.abs(), unit) + _accumulated(dtype, terms, _librarys(case, backend)) * magnitude
    if _filtered(unit) and backend == "native":
        limit = _winograd_limit(true.abs() + off, w, unit, terms // 9, roundoff(dtype), False)
        slack = slack + _resized(limit, y.shape)
    n, k, *size = y.shape
    output, finish = None, None
    if case.epilogue.startswith("output"):
        shortcut = values.image(n, k, *size, dtype=dtype)
        vectors, vectors2 = values.vectors(k, dtype), values.vectors(k, dtype)
        output = Output(vectors)
        if case.epilogue == "output skip":
            output = Output(vectors, skip=shortcut)
        elif case.epilogue == "output second":
            output = Output(vectors, y2=shortcut, vectors2=vectors2)
        finish = shortcut, vectors2
    given = [*_given(x), unit.weight]
    before = [t.clone() for t in given]
    image, partials, rows = conv_fprop(x, unit, statistics=case.epilogue == "statistics", output=output, run=_run(case, backend))
    assert image.dtype == dtype
    assert image.is_contiguous(memory_format=torch.channels_last)
    if output is None:
        hold(image, y, slack, "conv_fprop")
    else:
        # The library's output is rounded before the rest of the block.
        rows_of = to_rows(y)
        total, limit = affine(rows_of, output.vectors, to_rows(stored(y, slack, dtype)))
        size_of = total.abs() + limit
        if case.epilogue == "output skip":
            total, size_of = total + to_rows(finish[0]).double(), size_of + to_rows(finish[0]).double().abs()
        elif case.epilogue == "output second":
            other, more = affine(to_rows(finish[0]).double(), finish[1])
            total, limit, size_of = total + other, limit + more, size_of + other.abs()
        hold(to_rows(image), total.relu(), limit + 4 * roundoff(dtype) * size_of, "conv_fprop: output")
    if case.epilogue == "statistics":
        hold_statistics(partials, rows, to_rows(image), "conv_fprop")
    untouched(given, before, "conv_fprop")


def check_dgrad(case: Conv, backend: str) -> None:
    values, dtype, g = Values(case.seed), DTYPES[case.dtype], case.geometry
    unit = _unit(case, values, dtype)
    dy, true, off = _dy(case, values, dtype, unit)
    shape = g.n, g.c * g.groups, *g.size
    w = unit.weight.double()
    dx, magnitude = _dgrad(true, w, unit, shape), _dgrad(true.abs() + off, w.abs(), unit, shape)
    terms = g.k * g.filter[0] * g.filter[1]
    slack = _dgrad(off, w.abs(), unit, shape) + _accumulated(dtype, terms, _librarys(case, backend)) * magnitude
    if _filtered(unit) and backend == "native":
        slack = slack + _resized(_winograd_limit(true.abs() + off, w, unit, g.k, roundoff(dtype), True), shape)
    like = values.image(*shape, dtype=dtype)
    inner = Activation(values.image(*shape, dtype=dtype), values.vectors(shape[1], dtype)) if case.epilogue == "inner" else None
    add, joins = None, None
    if case.epilogue.startswith("add"):
        stride = (2, 1) if case.epilogue == "add strided" else (1, 1)
        small = g.n, shape[1], -(-g.size[0] // stride[0]), -(-g.size[1] // stride[1])
        image = values.image(*small, dtype=dtype, offset=case.offset)
        opened = values.open(small[0] * small[2] * small[3], shape[1])
        signed = case.epilogue == "add signed"
        add = Addend(image, pack_signs(opened) if signed else None, stride)
        rows = torch.where(opened, to_rows(image), 0) if signed else to_rows(image)
        joins = torch.zeros(shape, dtype=torch.float64)
        joins[:, :, :: stride[0], :: stride[1]] = to_image(rows.double().contiguous(), g.n, *small[2:])
    given = [*_given(dy), unit.weight]
    before = [t.clone() for t in given]
    got = conv_dgrad(dy, like, unit, inner=inner, add=add, run=_run(case, backend))
    assert got.image.shape == shape
    assert got.image.is_contiguous(memory_format=torch.channels_last)
    assert got.image.data_ptr() != like.data_ptr()
    if joins is not None:
        slack = stored(dx, slack, dtype) + 2 * roundoff(dtype) * (dx.abs() + joins.abs())
        dx = dx + joins
    if not got.masked:
        hold(got.image, dx, slack, "conv_dgrad")
    else:
        value, doubt = affine(to_rows(inner.image).double(), inner.vectors)
        rows, limit = to_rows(got.image).double(), to_rows(stored(dx, slack, dtype))
        shut = value < -doubt
        within(torch.where(shut, rows, 0), torch.zeros_like(rows), 0.0, "conv_dgrad: where the ReLU is shut")
        within(torch.where(value > doubt, rows, 0), torch.where(value > doubt, to_rows(dx), 0), limit, "conv_dgrad: masked")
    assert (got.partials is not None) == (inner is not None)
    if inner is not None:
        rows, y = to_rows(got.image), to_rows(inner.image)
        grad, doubt = gate(rows, y, inner.vectors, None)
        hold_sums(got.partials[:, 0], grad, doubt.sum(0), "conv_dgrad: sum g")
        deviation = y.double() - inner.vectors[0].double()
        hold_sums(got.partials[:, 1], grad * deviation, (doubt * deviation.abs()).sum(0), "conv_dgrad: sum g (y - mean)")
    untouched(given, before, "conv_dgrad")


def check_wgrad(case: Conv, backend: str) -> None:
    values, dtype, _g = Values(case.seed), DTYPES[case.dtype], case.geometry
    unit = _unit(case, values, dtype)
    x, true_x, off_x = _x(case, values, dtype)
    dy, true_dy, off_dy = _dy(case, values, dtype, unit)
    w = unit.weight.double()
    dw = _wgrad(true_dy, true_x, unit, w)
    magnitude = _wgrad(true_dy.abs() + off_dy, true_x.abs() + off_x, unit, w)
    slack = magnitude - _wgrad(true_dy.abs(), true_x.abs(), unit, w)
    terms = true_dy.shape[0] * true_dy.shape[2] * true_dy.shape[3]
    slack = slack.clamp_min(0) + _accumulated(dtype, terms, _librarys(case, backend)) * magnitude
    if _filtered(unit) and backend == "native":
        # Over the tiles, each with the largest of its inputs and of its gradients.
        size = true_x.abs().amax((2, 3)), true_dy.abs().amax((2, 3))
        limit = torch.einsum("nc,nk->kc", *size) * terms * (terms + 40) * roundoff(dtype) * _GROWTH
        slack = slack + limit[:, :, None, None]
    given = [*_given(x, dy), unit.weight]
    before = [t.clone() for t in given]
    got = conv_wgrad(dy, x, unit, run=_run(case, backend))
    assert got.shape == unit.weight.shape
    assert got.dtype == dtype
    hold(got, dw, slack, "conv_wgrad")
    untouched(given, before, "conv_wgrad")


def check_products(case: Conv, backend: str) -> None:
    """The matrix products that stand for the library's convolutions, wherever they could."""
    values, dtype, g = Values(case.seed), DTYPES[case.dtype], case.geometry._replace(groups=1)
    case = case._replace(geometry=g)
    unit = _unit(case, values, dtype)
    x = values.image(g.n, g.c, *g.size, dtype=dtype, offset=case.offset)
    size = unit.output_size(*g.size)
    dy = values.image(g.n, g.k, *size, dtype=dtype, offset=case.offset)
    w, wide_x, wide_dy = unit.weight.double(), x.double(), dy.double()
    pixels, shape = g.n * size[0] * size[1], tuple(x.shape)

    def held(got, truth, magnitude, terms, name):
        hold(got, truth, _accumulated(dtype, terms, True) * magnitude, name)

    dw = _wgrad(wide_dy, wide_x, unit, w), _wgrad(wide_dy.abs(), wide_x.abs(), unit, w), pixels
    dx = _dgrad(wide_dy, w, unit, shape), _dgrad(wide_dy.abs(), w.abs(), unit, shape), g.k * g.filter[0] * g.filter[1]
    y = _conv(wide_x, w, unit), _conv(wide_x.abs(), w.abs(), unit), g.c * g.filter[0] * g.filter[1]
    run = of(backend)
    if products.pointwise(x, unit):
        held(products.fprop(x, unit), *y, "products.fprop")
        held(products.dgrad(dy, x, unit), *dx, "products.dgrad")
        held(products.wgrad(dy, x, unit), *dw, "products.wgrad")
    if dtype.itemsize >= 4:
        held(products.folded_dgrad(dy, x, unit, run), *dx, "products.folded_dgrad")
    held(products.unfolded_fprop(nhwc(x), unit, run), *y, "products.unfolded_fprop")
    held(products.unfolded_wgrad(dy, nhwc(x), unit, run), *dw, "products.unfolded_wgrad")


TARGETS = {
    "conv_fprop": Target(_cases(("none", "statistics", "output", "output skip", "output second")), check_fprop),
    "conv_dgrad": Target(_cases(("none", "inner", "add", "add signed", "add strided")), check_dgrad),
    "conv_wgrad": Target(_cases(("none",)), check_wgrad),
    "products": Target(_cases(("none",)), check_products),
}
