"""`conv_wgrad`: exact on small integers, by the accuracy rule on others, with every prologue."""

import pytest
import torch
from compare import every, same
from convolutions import DTYPES, GEOMETRIES, Draw, assert_rounded, every_geometry, every_tiled, huge, in_float64, misaligned

from fused_res.accuracy import MARGIN, floor
from fused_res.layout import to_rows
from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.operands import Activation, Gradient
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

SMALL = GEOMETRIES["3x3, stride 2"]


@pytest.fixture
def few_parts(monkeypatch):
    """Parts of the pixels are few enough to have several blocks each."""
    tiling = pytest.importorskip("fused_res.kernels.conv_tiling")
    monkeypatch.setattr(tiling, "PROGRAMS", 3)


def correlate(dy, x, unit):
    def conv2d_weight(x, dy):
        return torch.nn.grad.conv2d_weight(x, unit.weight.shape, dy, unit.stride, unit.padding, unit.dilation, unit.groups)

    return in_float64(conv2d_weight, x, dy)


def per_channel(vector):
    return vector.double().view(-1, 1, 1)


def activate(x, vectors):
    return (x.double() * per_channel(vectors[3]) + per_channel(vectors[4])).relu()


class Case:
    """Integer operands of a geometry, and what comes of them in float64."""

    def __init__(self, geometry, dtype, device, mode="inner", training=True):
        draw = Draw(0, device)
        self.draw = draw
        self.unit = geometry.unit(draw.integers(geometry.k, geometry.c, *geometry.filter, dtype=dtype))
        self.image, self.y = (draw.integers(*geometry.out, dtype=dtype) for _ in "dy")
        self.x = Activation(draw.integers(geometry.n, geometry.c, *geometry.size, dtype=dtype), draw.vectors(geometry.c))
        vectors, coefficients = draw.vectors(geometry.k), draw.vectors(geometry.k, rows=7)
        if not training:
            coefficients[1:3] = 0.0
        opened = draw.integers(*geometry.out) > 0
        self.z, self.dy = activate(self.x.image, self.x.vectors), self.image.double()
        self.gradient = Gradient(self.image)
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

    def check(self, backend, x):
        """conv_wgrad of these operands is the correlation with x, in float64, rounded."""
        expected, magnitude = correlate(self.dy, x, self.unit), correlate(self.dy.abs(), x.abs(), self.unit)
        assert_rounded(self.run(backend), expected, magnitude, len(self.image), backend)

    def run(self, backend):
        before = [t.clone() for t in (self.image, self.y, self.x.image, self.unit.weight)]
        dweight = conv_wgrad(self.gradient, self.x, self.unit, run=of(backend))
        for tensor, copy in zip((self.image, self.y, self.x.image, self.unit.weight), before, strict=True):
            same(tensor, copy)
        assert dweight.shape == self.unit.weight.shape
        return dweight


@every_geometry
def test_exact_on_integers(backend, device, geometry, dtype):
    """And padding comes after the ReLU: the shifts are positive."""
    case = Case(geometry, dtype, device)
    case.check(backend, case.z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["plain", "outer", "inner", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["live", "frozen"])
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_prologues_and_parts(backend, device, few_parts, name, training, mode, dtype):
    geometry = GEOMETRIES[name]._replace(n=6 if name == "1x1" else 8, k=32 if mode == "outer" else 13)
    case = Case(geometry, dtype, device, mode, training)
    case.check(backend, case.z)
    if mode != "plain":
        case.x.vectors = None
        case.check(backend, case.x.image)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_accuracy(device, poisoned_memory, name, dtype):
    """Of 8 seeds together, with the BNs on both sides applied in the prologue or, eager, before."""
    pytest.importorskip("triton")
    geometry, errors = GEOMETRIES[name], {"fused": 0.0, "eager": 0.0, "truth": 0.0}
    for seed in range(8):
        draw = Draw(seed, device)
        unit = geometry.unit(draw.normal(geometry.k, geometry.c, *geometry.filter, dtype=dtype))
        image, y = (draw.normal(*geometry.out, dtype=dtype) for _ in "dy")
        x = Activation(draw.normal(geometry.n, geometry.c, *geometry.size, dtype=dtype), draw.normal(5, geometry.c))
        coefficients = draw.normal(7, geometry.k)
        p, q, r = (per_channel(row) for row in coefficients[:3])
        dy, z = p * image.double() + q * y.double() + r, activate(x.image, x.vectors)
        truth = correlate(dy, z, unit)
        fused = conv_wgrad(Gradient(image, y, None, coefficients, masked=True), x, unit, run=of("triton"))
        eager = conv_wgrad(Gradient(dy.to(dtype)), Activation(z.to(dtype)), unit, run=of("reference"))
        for key, value in (("fused", fused - truth), ("eager", eager - truth), ("truth", truth)):
            errors[key] += value.double().square().sum().item()
    fused, eager = ((errors[key] / errors["truth"]) ** 0.5 for key in ("fused", "eager"))
    assert fused <= max(MARGIN * eager, floor(dtype))


def test_not_finite_spoils_its_channel_only(backend, device, few_parts):
    case = Case(GEOMETRIES["1x1"], torch.float32, device, "plain")

    def run():
        return conv_wgrad(case.gradient, Activation(case.x.image, case.x.vectors), case.unit, run=of(backend))

    clean = run()
    case.image[0, 3, 1, 2] = float("nan")
    dweight = run()
    every(dweight[3].isnan())
    others = [k for k in range(len(clean)) if k != 3]
    same(dweight[others], clean[others])
    case.image[0, 3, 1, 2], case.x.image[2, 5, 8, 6] = 1.0, float("nan")
    same(run().isnan().flatten(1).any(0).nonzero(), torch.tensor([[5]], device=device))


@pytest.mark.parametrize("mode", ["outer", "masked"])
def test_frozen_input_stays_out(backend, device, mode):
    case = Case(GEOMETRIES["1x1"], torch.float32, device, mode, training=False)
    case.gradient.y = torch.full_like(case.y, float("nan"))
    dweight = conv_wgrad(case.gradient, case.x, case.unit, run=of(backend))
    same(dweight, correlate(case.dy, case.z, case.unit).float())


def test_pixels_past_the_last_do_not_count(device, poisoned_memory):
    """Rows of a block past the last pixel would be r in dy and relu(shift) in x, were they not cut off."""
    pytest.importorskip("triton")
    for pixels in (1, 31, 33, 65):
        geometry = GEOMETRIES["1x1"]._replace(n=1, size=(1, pixels))
        case = Case(geometry, torch.float32, device)
        same(case.run("triton"), correlate(case.dy, case.z, case.unit).float())


@every_tiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration(device, poisoned_memory, geometry, dtype):
    tiling = pytest.importorskip("fused_res.kernels.conv_tiling")
    launcher = pytest.importorskip("fused_res.kernels.conv_wgrad").conv_wgrad
    case = Case(geometry, dtype, device)
    expected = correlate(case.dy, case.z, case.unit).to(dtype)
    tiles = tiling.configurations("wgrad", dtype, len(to_rows(case.image)), case.unit.weight.shape)
    tiles = list(tiling.fitting("wgrad", tiles, case.unit.weight, case.gradient, case.x))
    assert len(tiles) >= 2
    for config in tiles:
        same(launcher(case.gradient, case.x, case.unit, config=config), expected, config)


def test_parts_cover_all_pixels():
    split = pytest.importorskip("fused_res.kernels.conv_wgrad").split
    for pixels in (0, 1, 63, 64, 1000, 802816, 2**33 + 5):
        for programs in (1, 9, 300):
            parts, rows = split(pixels, programs, 64)
            assert rows % 64 == 0
            assert rows * (parts - 1) < max(pixels, 1) <= rows * parts
            assert rows < 2**31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(backend, device, dtype):
    case = Case(SMALL, dtype, device)
    expected, weight, gradient = correlate(case.dy, case.z, case.unit).to(dtype), case.unit.weight, case.gradient
    for dy_image, x_image, filters in (
        (case.image.contiguous(), misaligned(case.x.image), weight.contiguous()),
        (misaligned(case.image), case.x.image.contiguous(), weight),
        (case.image, case.x.image, weight[:1].expand(weight.shape)),
    ):
        dy = Gradient(dy_image, misaligned(case.y), gradient.vectors, gradient.coefficients)
        dweight = conv_wgrad(dy, Activation(x_image, case.x.vectors), case.unit._replace(weight=filters), run=of(backend))
        same(dweight, expected)
        if backend == "triton" and filters.is_contiguous():
            assert dweight.is_contiguous()
    ones = case.image.new_ones(()).expand(SMALL.out)
    dweight = conv_wgrad(Gradient(ones), case.x, case.unit, run=of(backend))
    same(dweight, correlate(ones, case.z, case.unit).to(dtype))


def test_images_past_32_bits(device, proven_interpreter):
    """The input has 2^33 elements, of which a stride picks a few."""
    pytest.importorskip("triton")
    if device != "cpu":
        pytest.skip("the image is too large for most GPUs")
    x, draw = huge(1, 32, 2**14, 2**14), Draw(3, device)
    unit = GEOMETRIES["1x1"].unit(draw.integers(16, 32, 1, 1, dtype=torch.bfloat16))._replace(stride=(2**13 - 1, 2**13))
    out = unit.output_size(2**14, 2**14)
    picked = torch.arange(out[0]) * unit.stride[0], torch.arange(out[1]) * unit.stride[1]
    values = draw.integers(*out, 32, dtype=torch.bfloat16)
    x.permute(0, 2, 3, 1)[0][picked[0][:, None], picked[1][None, :]] = values
    dy, vectors = draw.integers(1, 16, *out, dtype=torch.bfloat16), draw.vectors(32)
    dweight = conv_wgrad(Gradient(dy), Activation(x, vectors), unit, run=of("triton"))
    z = (values.double() * vectors[3].double() + vectors[4].double()).relu()
    expected = torch.einsum("khw,hwc->kc", dy[0].double(), z)
    same(dweight[:, :, 0, 0], expected.bfloat16())


def test_nothing_fused_is_the_library(device, monkeypatch):
    case = Case(SMALL, torch.float32, device, "plain")
    monkeypatch.setattr("fused_res.primitives.conv_wgrad.plain", lambda dy, x, unit, run: x)
    x = Activation(case.x.image)
    assert conv_wgrad(case.gradient, x, case.unit, run=of("triton")) is x.image


def test_grouped_convolutions_are_the_library(backend, device):
    draw = Draw(5, device)
    unit = GEOMETRIES["3x3"].unit(draw.integers(12, 5, 3, 3))._replace(groups=4)
    dy, x, vectors = draw.integers(2, 12, 5, 5), draw.integers(2, 20, 5, 5), draw.vectors(20)
    expected = correlate(dy, activate(x, vectors), unit)
    same(conv_wgrad(Gradient(dy), Activation(x, vectors), unit, run=of(backend)).double(), expected)


def test_repeats_bit_for_bit(backend, device, few_parts):
    draw = Draw(6, device)
    unit = SMALL.unit(draw.normal(SMALL.k, SMALL.c, *SMALL.filter))
    x = Activation(draw.normal(SMALL.n, SMALL.c, *SMALL.size), draw.normal(5, SMALL.c))
    dy = Gradient(draw.normal(*SMALL.out))
    same(conv_wgrad(dy, x, unit, run=of(backend)), conv_wgrad(dy, x, unit, run=of(backend)))


def test_no_images(backend, device):
    case = Case(SMALL, torch.float32, device, "plain")
    dy, x = Gradient(case.image[:0]), Activation(case.x.image[:0], case.x.vectors)
    dweight = conv_wgrad(dy, x, case.unit, run=of(backend))
    assert dweight.shape == case.unit.weight.shape
    assert not dweight.any()


def test_bad_arguments(device, proven_interpreter):
    pytest.importorskip("triton")
    case = Case(SMALL, torch.float32, device, "outer")

    def run(x=case.x, **changed):
        fields = {name: getattr(case.gradient, name) for name in ("image", "y", "vectors", "coefficients", "signs")}
        return conv_wgrad(Gradient(**(fields | changed)), x, case.unit, run=of("triton"))

    with pytest.raises(ValueError, match=r"x: expected shape \(2, 16, 7, 8\), got \(2, 15, 7, 8\)"):
        run(Activation(case.x.image[:, 1:]))
    with pytest.raises(ValueError, match=r"dy: expected shape \(2, 32, 4, 4\), got \(1, 32, 4, 4\)"):
        run(image=case.image[:1])
    with pytest.raises(TypeError, match=r"dy: expected torch\.float32, as the weight has, got torch\.float64"):
        run(image=case.image.double())
    with pytest.raises(ValueError, match=r"dy\.signs: expected a contiguous torch\.uint8 \(32, 4\)"):
        run(signs=case.gradient.signs.bool())
