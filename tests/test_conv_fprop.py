"""`conv_fprop`: exact on small integers, by the accuracy rule on others, with every prologue and epilogue."""

import pytest
import torch
from compare import same, within
from convolutions import DTYPES, GEOMETRIES, Draw, every_dtype, every_geometry, every_tiled, huge, in_float64, misaligned

from fused_res.accuracy import MARGIN, floor
from fused_res.layout import to_rows
from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.operands import Activation, Output
from fused_res.primitives.run import of

# numpy, under the interpreter, warns of NaN that is on its way on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

SMALL = GEOMETRIES["3x3"]


def convolve(x, unit):
    def conv2d(x, weight):
        return torch.nn.functional.conv2d(x, weight, None, unit.stride, unit.padding, unit.dilation, unit.groups)

    return in_float64(conv2d, x, unit.weight)


def activate(x, vectors):
    return (x.double() * vectors[3].view(-1, 1, 1) + vectors[4].view(-1, 1, 1)).relu().to(x.dtype)


def operands(geometry, dtype, device, seed=0):
    draw = Draw(seed, device)
    x = draw.integers(geometry.n, geometry.c, *geometry.size, dtype=dtype)
    weight = draw.integers(geometry.k, geometry.c, *geometry.filter, dtype=dtype)
    return x, draw.vectors(geometry.c), geometry.unit(weight), draw


@every_geometry
def test_exact_on_integers(backend, device, geometry, dtype):
    """And padding comes after the ReLU: the shifts are positive."""
    x, vectors, unit, _ = operands(geometry, dtype, device)
    before = x.clone(), unit.weight.clone()
    y, partials, rows = conv_fprop(Activation(x, vectors), unit, run=of(backend))
    assert y.shape == geometry.out
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (partials, rows) == (None, 0)
    same(y, convolve(activate(x, vectors), unit).to(dtype))
    y = conv_fprop(Activation(x), unit, statistics=True, run=of(backend)).image
    same(y, convolve(x, unit).to(dtype))
    same(x, before[0])
    same(unit.weight, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["1x1", "1x1, wide", "1x1, stride 2", "3x3", "3x3, stride 2", "one pixel"])
def test_statistics_are_those_of_the_stored_values(backend, device, name, dtype):
    geometry = GEOMETRIES[name]
    draw = Draw(1, device)
    x, weight = draw.normal(geometry.n, geometry.c, *geometry.size), draw.normal(geometry.k, geometry.c, *geometry.filter)
    unit = geometry.unit(weight.to(dtype))
    y, partials, rows = conv_fprop(Activation(x.to(dtype)), unit, statistics=True, run=of(backend))
    assert partials.dtype == torch.float32
    tiles = to_rows(y).double().split(rows)
    assert partials.shape == (len(tiles), 2, geometry.k)
    for (mean, squares), tile in zip(partials.double(), tiles, strict=True):
        deviation = tile.std(0, correction=0) + 1e-3 * tile.abs().amax(0)
        within(mean, tile.mean(0), 1e-6 * deviation)
        within(squares, tile.var(0, correction=0) * len(tile), 5e-6 * len(tile) * deviation.square())
    pixels = len(to_rows(y))
    merged = bn_finalize(partials, rows, pixels, None, None, 1e-5, run=of(backend))
    torch.testing.assert_close(merged[1].double(), to_rows(y).double().var(0, correction=0), rtol=1e-5, atol=1e-9)


@every_dtype
@pytest.mark.parametrize("shortcut", ["none", "skip", "second"])
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_evaluation_epilogue(backend, device, name, shortcut, dtype):
    geometry = GEOMETRIES[name]
    x, vectors, unit, draw = operands(geometry, dtype, device)
    after, vectors2 = draw.vectors(geometry.k), draw.vectors(geometry.k)
    other = draw.integers(*geometry.out, dtype=dtype)
    total = convolve(activate(x, vectors), unit)
    if backend != "triton":  # the library's convolution rounds its output
        total = total.to(dtype).double()
    total = total * after[3].view(-1, 1, 1) + after[4].view(-1, 1, 1)
    output = Output(after)
    if shortcut == "skip":
        total, output = total + other.double(), Output(after, skip=other)
    elif shortcut == "second":
        total = total + other.double() * vectors2[3].view(-1, 1, 1) + vectors2[4].view(-1, 1, 1)
        output = Output(after, y2=other, vectors2=vectors2)
    y = conv_fprop(Activation(x, vectors), unit, output=output, run=of(backend)).image
    same(y, total.relu().to(dtype))


@every_dtype
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_epilogue_without_a_relu(backend, device, name, scaled, dtype):
    """As a pre-activation block ends: in y and the shortcut, or in a * y + bias and the shortcut."""
    geometry = GEOMETRIES[name]
    x, vectors, unit, draw = operands(geometry, dtype, device)
    after, other = draw.vectors(geometry.k) if scaled else None, draw.integers(*geometry.out, dtype=dtype)
    total = convolve(activate(x, vectors), unit)
    if backend != "triton":  # whose kernel alone has this epilogue
        total = total.to(dtype).double()
    if scaled:
        total = total * after[3].view(-1, 1, 1) + after[4].view(-1, 1, 1)
    total = total + other.double()
    assert (total < 0).any()
    before = other.clone()
    y = conv_fprop(Activation(x, vectors), unit, output=Output(after, skip=other, relu=False), run=of(backend)).image
    same(y, total.to(dtype))
    same(other, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["1x1", "3x3, stride 2"])
def test_accuracy(device, poisoned_memory, name, dtype):
    """Of 8 seeds together, with a BN in front that is applied in the prologue or, eager, before."""
    pytest.importorskip("triton")
    geometry, errors = GEOMETRIES[name], {"fused": 0.0, "eager": 0.0, "truth": 0.0}
    for seed in range(8):
        draw = Draw(seed, device)
        x = draw.normal(geometry.n, geometry.c, *geometry.size, dtype=dtype)
        unit = geometry.unit(draw.normal(geometry.k, geometry.c, *geometry.filter, dtype=dtype))
        vectors = draw.normal(5, geometry.c)
        z = (x.double() * vectors[3].double().view(-1, 1, 1) + vectors[4].double().view(-1, 1, 1)).relu()
        truth = convolve(z, unit)
        fused = conv_fprop(Activation(x, vectors), unit, run=of("triton")).image
        eager = conv_fprop(Activation(activate(x, vectors)), unit, run=of("reference")).image
        for key, value in (("fused", fused - truth), ("eager", eager - truth), ("truth", truth)):
            errors[key] += value.double().square().sum().item()
    fused, eager = ((errors[key] / errors["truth"]) ** 0.5 for key in ("fused", "eager"))
    assert fused <= max(MARGIN * eager, floor(dtype))


def test_prologue_is_bn_act(device, poisoned_memory):
    """To the bit, so that backward, which recomputes the activation, sees the same signs."""
    pytest.importorskip("triton")
    draw, identity = Draw(2, device), torch.eye(20, device=device)[:, :, None, None]
    for dtype in DTYPES:
        x, vectors = draw.normal(2, 20, 5, 6, dtype=dtype), draw.normal(5, 20)
        y = conv_fprop(Activation(x, vectors), GEOMETRIES["1x1"].unit(identity.to(dtype)), run=of("triton")).image
        same(to_rows(y), bn_act(to_rows(x), vectors, run=of("triton"))[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_not_finite_passes_the_relu(backend, device, name, poison):
    """Where a value is not finite, all that see it are not; nothing else is."""
    geometry = GEOMETRIES[name]
    x, vectors, unit, _ = operands(geometry, torch.float32, device)
    vectors[3], vectors[4] = 1.0, 0.5
    weight = unit.weight.abs() + 1
    unit = unit._replace(weight=weight)
    x[0, 3, 4, 5] = poison
    seen = convolve((x.isfinite() ^ True).float(), unit) != 0
    output = Output(torch.ones(5, geometry.k, device=device))
    for given in ({}, {"output": output}, {"statistics": True}):
        y, partials, _ = conv_fprop(Activation(x, vectors), unit, run=of(backend), **given)
        same(~y.isfinite(), seen)
        assert partials is None or not partials[:, 1].isfinite().all(0).any()


@every_tiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration(device, poisoned_memory, geometry, dtype):
    tiling = pytest.importorskip("fused_res.kernels.conv_tiling")
    launcher = pytest.importorskip("fused_res.kernels.conv_fprop").conv_fprop
    x, vectors, unit, _ = operands(geometry, dtype, device)
    expected = convolve(activate(x, vectors), unit).to(dtype)
    tiles = tiling.configurations("fprop", dtype, to_rows(expected).shape[0], unit.weight.shape)
    tiles = list(tiling.fitting("fprop", tiles, unit.weight, Activation(x, vectors)))
    assert len(tiles) >= 2
    for config in tiles:
        y, partials, rows = launcher(Activation(x, vectors), unit, True, None, config=tuple(config))
        same(y, expected, config)
        assert rows == config.block_p
        assert len(partials) == -(-to_rows(y).shape[0] // rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(backend, device, dtype):
    x, vectors, unit, _ = operands(SMALL, dtype, device)
    expected = convolve(activate(x, vectors), unit).to(dtype)
    weight = unit.weight
    for image, filters in (
        (x.contiguous(), weight),
        (misaligned(x), weight.contiguous()),
        (x.transpose(2, 3).contiguous().transpose(2, 3), misaligned(weight)),
        (x, weight.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        y = conv_fprop(Activation(image, vectors), unit._replace(weight=filters), run=of(backend)).image
        same(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
    row = x[:, :, :1].expand(-1, -1, x.shape[2], -1)
    y = conv_fprop(Activation(row), unit, statistics=True, run=of(backend)).image
    same(y, convolve(row, unit).to(dtype))


def test_images_past_32_bits(device, proven_interpreter):
    """The input has 2^33 elements, of which a stride picks a few."""
    pytest.importorskip("triton")
    if device != "cpu":
        pytest.skip("the image is too large for most GPUs")
    x = huge(1, 32, 2**14, 2**14)
    draw = Draw(3, device)
    for padding in (0, 1):
        geometry = GEOMETRIES["1x1"]._replace(c=32, k=16, stride=(2**13 - 1, 2**13), padding=(padding, padding))
        geometry = geometry._replace(n=1, size=(2**14, 2**14), filter=(1 + 2 * padding, 1 + 2 * padding))
        picked = torch.arange(geometry.out[2]) * geometry.stride[0], torch.arange(geometry.out[3]) * geometry.stride[1]
        values = draw.integers(len(picked[0]), len(picked[1]), 32, dtype=torch.bfloat16)
        x.permute(0, 2, 3, 1)[0][picked[0][:, None], picked[1][None, :]] = values
        unit = geometry.unit(draw.integers(16, 32, *geometry.filter, dtype=torch.bfloat16))
        y = conv_fprop(Activation(x), unit, statistics=True, run=of("triton")).image
        expected = torch.einsum("hwc,kc->khw", values.double(), unit.weight[:, :, padding, padding].double())
        same(y[0], expected.bfloat16())


def test_tensor_float_32(device, poisoned_memory, monkeypatch):
    """Operands are rounded to the nearest, as the library does, where torch's convolutions use TF32."""
    pytest.importorskip("triton")
    settings = torch.backends.mkldnn.conv if device == "cpu" else torch.backends.cudnn.conv
    before = settings.fp32_precision
    draw = Draw(4, device)
    x, weight = draw.normal(2, 20, 5, 6), draw.normal(13, 20, 3, 3)

    def rounded(values):
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)

    unit = SMALL.unit(weight)
    truth, narrow = convolve(x, unit), convolve(rounded(x), SMALL.unit(rounded(weight)))
    try:
        # Tensor cores cut off what their accumulators cannot hold.
        for precision, expected, limit in (("ieee", truth, 1e-6), ("tf32", narrow, 1e-6 if device == "cpu" else 4e-6)):
            settings.fp32_precision = precision
            y = conv_fprop(Activation(x), unit, statistics=True, run=of("triton")).image
            assert (y - expected).norm() <= limit * expected.norm()
    finally:
        settings.fp32_precision = before
    assert (narrow - truth).norm() > 1e-4 * truth.norm()


def test_nothing_fused_is_the_library(device, monkeypatch):
    x, _, unit, _ = operands(SMALL, torch.float32, device)
    monkeypatch.setattr("fused_res.primitives.conv_fprop.plain", lambda x, unit, run: x)
    assert conv_fprop(Activation(x), unit, run=of("triton")).image is x


def test_grouped_convolutions_are_the_library(backend, device):
    draw = Draw(5, device)
    unit = SMALL.unit(draw.integers(12, 5, 3, 3))._replace(groups=4)
    x = draw.integers(2, 20, 5, 5)
    expected = convolve(x, unit)
    y, partials, rows = conv_fprop(Activation(x), unit, statistics=True, run=of(backend))
    same(y.double(), expected)
    assert len(partials) == -(-50 // rows)


def test_repeats_bit_for_bit(backend, device):
    draw = Draw(6, device)
    x, unit = draw.normal(2, 20, 9, 8), SMALL.unit(draw.normal(13, 20, 3, 3))
    first, second = (conv_fprop(Activation(x), unit, statistics=True, run=of(backend)) for _ in range(2))
    same(first.image, second.image)
    same(first.partials, second.partials)


def test_no_images(backend, device):
    x, vectors, unit, _ = operands(SMALL, torch.float32, device)
    assert conv_fprop(Activation(x[:0], vectors), unit, run=of(backend)).image.shape == (0, *SMALL.out[1:])
    with pytest.raises(ValueError, match="y: expected at least one row"):
        conv_fprop(Activation(x[:0]), unit, statistics=True, run=of(backend))


def test_bad_arguments(device, proven_interpreter):
    pytest.importorskip("triton")
    x, vectors, unit, _ = operands(SMALL, torch.float32, device)
    after = torch.zeros(5, SMALL.k, device=device)

    def run(operand=None, unit=unit, **more):
        return conv_fprop(operand or Activation(x, vectors), unit, run=of("triton"), **more)

    with pytest.raises(ValueError, match="output: expected None together with statistics"):
        run(statistics=True, output=Output(after))
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 20, 9, 8\), got \(2, 19, 9, 8\)"):
        run(Activation(x[:, 1:], vectors))
    with pytest.raises(TypeError, match=r"x: expected torch\.float32, as the weight has, got torch\.float16"):
        run(Activation(x.half(), vectors))
    with pytest.raises(ValueError, match=r"x\.vectors: expected a contiguous torch\.float32 \(5, 20\)"):
        run(Activation(x, vectors.double()))
    with pytest.raises(ValueError, match="x: expected images no smaller than the filter, got 9 x 8"):
        run(unit=unit._replace(dilation=(9, 9)))
    with pytest.raises(ValueError, match=r"x: expected images of less than 2\^30 pixels"):
        run(unit=unit._replace(padding=(2**15, 2**15)))
    with pytest.raises(ValueError, match=r"output\.vectors: expected a contiguous"):
        run(output=Output(after[:, 1:]))
    with pytest.raises(ValueError, match=r"output\.skip: expected shape \(2, 13, 9, 8\), got \(2, 20, 9, 8\)"):
        run(output=Output(after, skip=x))
    with pytest.raises(ValueError, match=r"output\.vectors2: expected a tensor of shape \(5, 13\), got None"):
        run(output=Output(after, y2=x[:, :13]))
    with pytest.raises(ValueError, match=r"output\.skip: expected either skip or y2, got both"):
        run(output=Output(after, skip=x[:, :13], y2=x[:, :13], vectors2=after))
