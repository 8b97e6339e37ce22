"""`conv_dgrad`: exact on small integers, by the accuracy rule on others, with every prologue and epilogue."""

import pytest
import torch
from compare import same
from convolutions import DTYPES, GEOMETRIES, Draw, Geometry, every_geometry, every_tiled, huge, in_float64, misaligned

from fused_res.accuracy import MARGIN, floor
from fused_res.layout import to_rows
from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.operands import Activation, Addend, Gradient
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

SMALL = GEOMETRIES["3x3, stride 2"]
FULL = Geometry(2, 64, 64, (8, 16), (1, 1))
"""Every block of Triton's is full, whatever the tile."""


def convolve(dy, unit, size):
    shape = (dy.shape[0], unit.weight.shape[1] * unit.groups, *size)

    def conv2d_input(weight, dy):
        return torch.nn.grad.conv2d_input(shape, weight, dy, unit.stride, unit.padding, unit.dilation, unit.groups)

    return in_float64(conv2d_input, unit.weight, dy)


def per_channel(vector):
    return vector.double().view(-1, 1, 1)


class Case:
    """Integer operands of a geometry, and what comes of them in float64."""

    def __init__(self, geometry, dtype, device, mode="plain", training=True):
        self.geometry, self.dtype, draw = geometry, dtype, Draw(0, device)
        self.draw = draw
        self.unit = geometry.unit(draw.integers(geometry.k, geometry.c, *geometry.filter, dtype=dtype))
        self.image, self.y = (draw.integers(*geometry.out, dtype=dtype) for _ in "dy")
        self.like = draw.integers(geometry.n, geometry.c, *geometry.size, dtype=dtype)
        vectors, coefficients = draw.vectors(geometry.k), draw.vectors(geometry.k, rows=7)
        if not training:
            coefficients[1:3] = 0.0
        opened = draw.integers(*geometry.out) > 0
        self.gradient = Gradient(self.image)
        self.dy = self.image.double()
        if mode == "plain":
            return
        self.gradient = Gradient(self.image, self.y, vectors, coefficients, training=training)
        if mode == "outer":
            self.gradient.signs = pack_signs(to_rows(opened))
        else:
            opened = per_channel(vectors[3]) * self.y.double() + per_channel(vectors[4]) > 0
        if mode == "masked":
            self.image *= opened
            self.gradient.masked = True
        p, q, r = (per_channel(coefficients[row]) for row in range(3))
        self.dy = p * torch.where(opened, self.image.double(), 0) + q * self.y.double() + r

    @property
    def dx(self):
        return convolve(self.dy, self.unit, self.geometry.size)

    def run(self, backend, **epilogue):
        if self.gradient.coefficients is None and not epilogue:
            epilogue = {"add": Addend(torch.zeros_like(self.like))}  # with nothing fused the library would run
        before = [t.clone() for t in (self.image, self.y, self.like, self.unit.weight)]
        inflow = conv_dgrad(self.gradient, self.like, self.unit, run=of(backend), **epilogue)
        for tensor, copy in zip((self.image, self.y, self.like, self.unit.weight), before, strict=True):
            same(tensor, copy)
        assert inflow.image.shape == self.like.shape
        assert inflow.image.is_contiguous(memory_format=torch.channels_last)
        return inflow


@every_geometry
def test_exact_on_integers(backend, device, geometry, dtype):
    for mode in ("plain", "inner"):
        case = Case(geometry, dtype, device, mode)
        dx, partials, masked = case.run(backend)
        same(dx, case.dx.to(dtype))
        assert partials is None
        assert not masked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["plain", "outer", "inner", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["live", "frozen"])
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_prologue_and_inner_epilogue(backend, device, name, training, mode, dtype):
    geometry = GEOMETRIES[name]._replace(k=32 if mode == "outer" else 20)
    case = Case(geometry, dtype, device, mode, training)
    inner = Activation(case.like, case.draw.vectors(geometry.c))
    dx, partials, masked = case.run(backend, inner=inner)
    y, (mean, _, _, scale, shift) = inner.image.double(), map(per_channel, inner.vectors)
    g = torch.where(scale * y + shift > 0, case.dx, 0).to(dtype)
    sums = torch.stack((g.double().sum((0, 2, 3)), (g.double() * (y - mean)).sum((0, 2, 3))))
    assert partials.shape[1:] == (2, geometry.c)
    same(partials.double().sum(0), sums)
    assert torch.equal(dx, g) if masked else torch.equal(torch.where(scale * y + shift > 0, dx, 0), g)
    assert masked == (backend == "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("signs", [False, True], ids=["all", "open"])
@pytest.mark.parametrize("geometry", [GEOMETRIES["1x1"], SMALL, FULL], ids=["1x1", "3x3, stride 2", "full blocks"])
def test_addend(backend, device, geometry, signs, stride, dtype):
    case = Case(geometry, dtype, device, "masked")
    n, c, h, w = case.like.shape
    image = case.draw.integers(n, c, -(-h // stride[0]), -(-w // stride[1]), dtype=dtype)
    opened = case.draw.integers(*image.shape) > 0 if signs else torch.ones_like(image, dtype=torch.bool)
    add = Addend(image, pack_signs(to_rows(opened)) if signs else None, stride)
    dx, before = case.dx, image.clone()
    dx[:, :, :: stride[0], :: stride[1]] += torch.where(opened, image.double(), 0)
    same(case.run(backend, add=add).image, dx.to(dtype))
    same(image, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_accuracy(device, poisoned_memory, name, dtype):
    """Of 8 seeds together, with the BN behind applied in the prologue or, eager, before."""
    pytest.importorskip("triton")
    geometry, errors = GEOMETRIES[name], {"fused": 0.0, "eager": 0.0, "truth": 0.0}
    for seed in range(8):
        draw = Draw(seed, device)
        unit = geometry.unit(draw.normal(geometry.k, geometry.c, *geometry.filter, dtype=dtype))
        image, y, like = (
            draw.normal(*shape, dtype=dtype) for shape in (geometry.out, geometry.out, (geometry.n, geometry.c, *geometry.size))
        )
        coefficients = draw.normal(7, geometry.k)
        p, q, r = (per_channel(row) for row in coefficients[:3])
        dy = p * image.double() + q * y.double() + r
        truth = convolve(dy, unit, geometry.size)
        fused = conv_dgrad(Gradient(image, y, None, coefficients, masked=True), like, unit, run=of("triton")).image
        eager = conv_dgrad(Gradient(dy.to(dtype)), like, unit, run=of("reference")).image
        for key, value in (("fused", fused - truth), ("eager", eager - truth), ("truth", truth)):
            errors[key] += value.double().square().sum().item()
    fused, eager = ((errors[key] / errors["truth"]) ** 0.5 for key in ("fused", "eager"))
    assert fused <= max(MARGIN * eager, floor(dtype))


@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_not_finite_goes_where_it_is_seen(backend, device, name):
    case = Case(GEOMETRIES[name], torch.float32, device)
    case.unit = case.unit._replace(weight=case.unit.weight.abs() + 1)
    case.gradient.image[0, 3, 1, 2] = float("nan")
    seen = convolve(case.gradient.image.isnan().float(), case.unit, case.geometry.size) != 0
    case.like.zero_()
    dx = conv_dgrad(case.gradient, case.like, case.unit, add=Addend(case.like), run=of(backend)).image
    same(dx.isnan(), seen)
    inner = Activation(case.like, torch.ones(5, case.geometry.c, device=device))
    inner.image[0, 0, 0, 0] = float("nan")
    partials = conv_dgrad(Gradient(case.image.nan_to_num()), case.like, case.unit, inner=inner, run=of(backend)).partials
    assert partials.sum(0)[1, 0].isnan()
    assert not partials[:, 0].isnan().any()
    assert not partials[:, :, 1:].isnan().any()


@pytest.mark.parametrize("mode", ["outer", "masked"])
def test_frozen_input_stays_out(backend, device, mode):
    case = Case(GEOMETRIES["1x1"], torch.float32, device, mode, training=False)
    case.gradient.y = torch.full_like(case.y, float("nan"))
    dx = conv_dgrad(case.gradient, case.like, case.unit, run=of(backend)).image
    same(dx, case.dx.float())


def test_bits_past_the_last_channel_do_not_matter(backend, device):
    case = Case(SMALL._replace(k=20, c=20), torch.float32, device, "outer")
    case.gradient.signs[:, 2] |= 0xF0
    opened = case.draw.integers(*case.like.shape) > 0
    signs = pack_signs(to_rows(opened))
    signs[:, 2] |= 0xF0
    dx = case.dx + torch.where(opened, case.like.double(), 0)
    same(case.run(backend, add=Addend(case.like, signs)).image, dx.float())


@every_tiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration(device, poisoned_memory, geometry, dtype):
    tiling = pytest.importorskip("fused_res.kernels.conv_tiling")
    launcher = pytest.importorskip("fused_res.kernels.conv_dgrad").conv_dgrad
    case = Case(geometry, dtype, device, "outer")
    expected = case.dx.to(dtype)
    tiles = tiling.configurations("dgrad", dtype, to_rows(expected).shape[0], case.unit.weight.shape)
    tiles = list(tiling.fitting("dgrad", tiles, case.unit.weight, case.gradient))
    assert len(tiles) >= 2
    for config in tiles:
        dx, _, _ = launcher(case.gradient, case.like, case.unit, None, None, config=config)
        same(dx, expected, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(backend, device, dtype):
    case = Case(SMALL, dtype, device, "inner")
    expected, weight, gradient = case.dx.to(dtype), case.unit.weight, case.gradient
    for image, filters, like in (
        (case.image.contiguous(), weight, case.like[:, :1].expand(-1, SMALL.c, -1, -1)),
        (misaligned(case.image), weight.contiguous(), case.like.contiguous()),
        (case.image, misaligned(weight), case.like),
    ):
        dy = Gradient(image, misaligned(case.y), gradient.vectors, gradient.coefficients)
        dx = conv_dgrad(dy, like, case.unit._replace(weight=filters), run=of(backend)).image
        same(dx, expected)
        assert dx.is_contiguous(memory_format=torch.channels_last)
    sums = case.image.new_ones(()).expand(SMALL.out)
    dx = conv_dgrad(Gradient(sums), case.like, case.unit, add=Addend(torch.zeros_like(case.like)), run=of(backend)).image
    same(dx, convolve(sums, case.unit, SMALL.size).to(dtype))


def test_misaligned_signs(backend, device):
    case = Case(SMALL._replace(k=64), torch.bfloat16, device, "outer")
    signs = case.gradient.signs
    case.gradient.signs = torch.cat([signs.new_zeros(1), signs.flatten()])[1:].view_as(signs)
    same(case.run(backend).image, case.dx.bfloat16())


def test_gradients_past_32_bits(device, proven_interpreter):
    """The incoming gradient has 2^33 elements, of which all but a few lie where the input was padded."""
    pytest.importorskip("triton")
    if device != "cpu":
        pytest.skip("the image is too large for most GPUs")
    side = 2**14
    dy, y, draw = huge(1, 32, side, side), huge(1, 32, side, side), Draw(3, device)
    unit = (
        GEOMETRIES["1x1"].unit(draw.integers(32, 16, 1, 1, dtype=torch.bfloat16))._replace(padding=(side // 2 - 2, side // 2 - 2))
    )
    like = draw.integers(1, 16, 4, 4, dtype=torch.bfloat16)
    lower = slice(side // 2 - 2, side // 2 + 2)
    for image in (dy, y):
        image.permute(0, 2, 3, 1)[0, lower, lower] = draw.integers(4, 4, 32, dtype=torch.bfloat16)
    coefficients, opened = draw.vectors(32, rows=7), draw.integers(4, 4, 32) > 0
    signs = huge(1, 4, side, side, dtype=torch.uint8).permute(0, 2, 3, 1)
    signs[0, lower, lower] = pack_signs(opened.view(16, 32)).view(4, 4, 4)
    gradient = Gradient(dy, y, None, coefficients, signs.reshape(-1, 4))
    dx = conv_dgrad(gradient, like, unit, run=of("triton")).image
    values = (image.permute(0, 2, 3, 1)[0, lower, lower].double() for image in (dy, y))
    g, v = values
    expected = coefficients[0] * torch.where(opened, g, 0) + coefficients[1] * v + coefficients[2]
    expected = torch.einsum("hwk,kc->chw", expected, unit.weight[:, :, 0, 0].double())
    same(dx[0], expected.bfloat16())


def test_nothing_fused_is_the_library(device, monkeypatch):
    case = Case(SMALL, torch.float32, device)
    monkeypatch.setattr("fused_res.primitives.conv_dgrad.plain", lambda dy, like, unit, run: dy)
    assert conv_dgrad(case.gradient, case.like, case.unit, run=of("triton")).image is case.image


def test_grouped_convolutions_are_the_library(backend, device):
    draw = Draw(5, device)
    unit = GEOMETRIES["3x3"].unit(draw.integers(12, 5, 3, 3))._replace(groups=4)
    dy, like = draw.integers(2, 12, 5, 5), draw.integers(2, 20, 5, 5)
    expected = convolve(dy, unit, like.shape[2:])
    inner = Activation(like, torch.zeros(5, 20, device=device))
    dx, partials, masked = conv_dgrad(Gradient(dy), like, unit, inner=inner, run=of(backend))
    same(dx.double(), expected)
    assert not partials.any()
    assert not masked


def test_repeats_bit_for_bit(backend, device):
    draw = Draw(6, device)
    unit = SMALL.unit(draw.normal(SMALL.k, SMALL.c, *SMALL.filter))
    like, dy = draw.normal(SMALL.n, SMALL.c, *SMALL.size), draw.normal(*SMALL.out)
    inner = Activation(like, draw.normal(5, SMALL.c))
    first, second = (conv_dgrad(Gradient(dy), like, unit, inner=inner, run=of(backend)) for _ in range(2))
    same(first.image, second.image)
    same(first.partials, second.partials)


def test_no_images(backend, device):
    case = Case(SMALL, torch.float32, device)
    like, dy = case.like[:0], Gradient(case.image[:0])
    inner = Activation(like, torch.ones(5, SMALL.c, device=device))
    dx, partials, _ = conv_dgrad(dy, like, case.unit, inner=inner, run=of(backend))
    assert dx.shape == like.shape
    assert not partials.sum(0).any()


def test_bad_arguments(device, proven_interpreter):
    pytest.importorskip("triton")
    case = Case(SMALL, torch.float32, device, "outer")
    inner = Activation(case.like, torch.zeros(5, SMALL.c, device=device))

    def run(like=case.like, unit=case.unit, inner=None, add=None, **changed):
        fields = {name: getattr(case.gradient, name) for name in ("image", "y", "vectors", "coefficients", "signs")}
        return conv_dgrad(Gradient(**(fields | changed)), like, unit, inner=inner, add=add, run=of("triton"))

    with pytest.raises(ValueError, match="add: expected None together with inner"):
        run(inner=inner, add=Addend(case.like))
    with pytest.raises(ValueError, match=r"dy: expected shape \(2, 32, 4, 4\), got \(2, 31, 4, 4\)"):
        run(image=case.image[:, 1:])
    with pytest.raises(ValueError, match="like: expected 16 channels, as the weight has, got 15"):
        run(like=case.like[:, 1:])
    with pytest.raises(ValueError, match=r"dy\.signs: expected a contiguous torch\.uint8 \(32, 4\)"):
        run(signs=case.gradient.signs[1:])
    with pytest.raises(ValueError, match=r"dy\.y: expected an image of shape \(2, 32, 4, 4\), got None"):
        run(y=None)
    with pytest.raises(ValueError, match=r"dy\.vectors: expected a tensor of shape \(5, 32\), got None"):
        run(signs=None, vectors=None)
    with pytest.raises(ValueError, match=r"dy\.coefficients: expected a contiguous torch\.float32 \(7, 32\)"):
        run(coefficients=case.gradient.coefficients[:6])
    with pytest.raises(ValueError, match=r"inner: expected shape \(2, 16, 7, 8\), got \(2, 15, 7, 8\)"):
        run(inner=Activation(case.like[:, 1:], inner.vectors))
    with pytest.raises(ValueError, match=r"inner\.vectors: expected a tensor of shape \(5, 16\), got None"):
        run(inner=Activation(case.like))
    with pytest.raises(ValueError, match=r"add: expected shape \(2, 16, 4, 4\), got \(2, 16, 7, 8\)"):
        run(add=Addend(case.like, stride=(2, 2)))
    with pytest.raises(ValueError, match=r"add\.signs: expected a contiguous torch\.uint8 \(112, 2\)"):
        run(add=Addend(case.like, case.gradient.signs))
