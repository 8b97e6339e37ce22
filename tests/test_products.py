"""Convolutions as matrix products: the same numbers as the library's convolutions, and where they stand in for them."""

import pytest
import torch
from compare import same

from fused_res.backends import native
from fused_res.primitives import library as library_module
from fused_res.primitives import products
from fused_res.primitives.conv_bn_act import Place, conv_bn_act, way
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.im2col import im2col
from fused_res.primitives.operands import Activation, Gradient
from fused_res.primitives.run import of
from fused_res.spec import ConvBN

LAST = torch.channels_last
RUN = of("reference")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((5, 2), (1, 3), (4, 0), (2, 1)),
    ((1, 1), (2, 1), (1, 2), (1, 1)),
]


def operands(unit, dtype, n=2, size=(9, 6), layout=LAST, seed=0):
    """x, dy and the unit in this dtype, and all of them in float64."""
    generator = torch.Generator().manual_seed(seed)
    channels = unit.weight.shape[1] * unit.groups
    shapes = (n, channels, *size), (n, unit.weight.shape[0], *unit.output_size(*size)), unit.weight.shape
    x, dy, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    x, dy, weight = x.contiguous(memory_format=LAST), dy.contiguous(memory_format=LAST), weight.contiguous(memory_format=layout)
    return (x, dy, unit._replace(weight=weight)), (x.double(), dy.double(), unit._replace(weight=weight.double()))


def library(x, dy, unit):
    """y, dx and dweight by torch's convolution."""
    geometry = (unit.stride, unit.padding, unit.dilation, False, (0, 0), unit.groups)
    dx, _, _ = torch.ops.aten.convolution_backward(dy, x, unit.weight, None, *geometry, (True, False, False))
    y = torch.convolution(x, unit.weight, None, *geometry)
    if tuple(unit.weight.shape[2:]) == (1, 1) and unit.padding == (0, 0):
        # Of the pixels that it reads alone: without AVX-512, oneDNN writes past the end of its memory where the strides differ.
        down, right = unit.stride
        x, geometry = x[:, :, ::down, ::right].contiguous(memory_format=LAST), ((1, 1), *geometry[1:])
    _, dw, _ = torch.ops.aten.convolution_backward(dy, x, unit.weight, None, *geometry, (False, True, False))
    return y, dx, dw


@pytest.fixture
def native_run():
    reason = native.missing()
    if reason is not None:
        pytest.skip(reason)
    return of("native")


def assert_close(got, expected, truth):
    """Same shape and dtype, and as near to float64 as the library, or half an ulp."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    floor = torch.finfo(got.dtype).eps / 2 if got.dtype.itemsize == 2 else 8 * torch.finfo(got.dtype).eps
    errors = [(t.double() - truth).norm() / truth.norm() for t in (got, expected)]
    assert errors[0] <= max(1.25 * errors[1], floor)


def supported(dtype):
    if not products._supported(dtype):
        pytest.skip(f"no library for products of {dtype} here")


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise_convolutions(dtype, stride, layout):
    supported(dtype)
    unit = ConvBN(torch.empty(7, 5, 1, 1), stride=stride)
    (x, dy, unit), exact = operands(unit, dtype, layout=layout)
    assert products.pointwise(x, unit)
    got = products.fprop(x, unit), products.dgrad(dy, torch.empty_like(x), unit), products.wgrad(dy, x, unit)
    for ours, theirs, truth in zip(got, library(x, dy, unit), library(*exact), strict=True):
        assert_close(ours, theirs, truth)
    for image in got[:2]:
        assert image.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unfolded_output_and_gradient_of_the_weight(dtype, kernel, stride, padding, dilation, layout):
    supported(dtype)
    unit = ConvBN(torch.empty(150, 3, *kernel), stride=stride, padding=padding, dilation=dilation)
    (x, dy, unit), exact = operands(unit, dtype, layout=layout)
    assert products.unfolded(x, unit) == (dtype.itemsize >= 4 and unit.weight.is_contiguous(memory_format=LAST))
    assert products.unfolded_backward(dy, x, unit)
    y, dweight = products.unfolded_fprop(x, unit, RUN), products.unfolded_wgrad(dy, x, unit, RUN)
    for ours, theirs, truth in zip((y, dweight), library(x, dy, unit)[::2], library(*exact)[::2], strict=True):
        assert ours.is_contiguous(memory_format=LAST)
        assert_close(ours, theirs, truth)


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_the_gradient_of_the_weight_takes_so_many_images_at_a_time(images, monkeypatch):
    supported(torch.float32)
    unit = ConvBN(torch.empty(150, 3, 3, 3), stride=(2, 2), padding=(1, 1))
    (x, dy, unit), exact = operands(unit, torch.float32, n=4)
    monkeypatch.setattr(products, "_WINDOWS", images * dy[0, 0].numel() * unit.weight[0].numel() * 4)
    seen = []
    monkeypatch.setattr(products, "im2col", lambda some, *rest, **run: seen.append(len(some)) or im2col(some, *rest, **run))
    assert_close(products.unfolded_wgrad(dy, x, unit, RUN), library(x, dy, unit)[2], library(*exact)[2])
    assert seen == [len(some) for some in torch.arange(4).split(images)]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_folded_gradient_of_the_input(dtype, kernel, stride, padding, dilation):
    supported(dtype)
    unit = ConvBN(torch.empty(150, 3, *kernel), stride=stride, padding=padding, dilation=dilation)
    (x, dy, unit), exact = operands(unit, dtype)
    assert products.folded(dy, unit)
    assert_close(products.folded_dgrad(dy, torch.empty_like(x), unit, RUN), library(x, dy, unit)[1], library(*exact)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_pixels_for_the_library(dtype, monkeypatch):
    """The library gets NCHW images, and whoever calls the primitives does not see it."""
    if dtype == torch.bfloat16:
        supported(dtype)
    unit = ConvBN(torch.empty(72, 64, 3, 3), padding=(1, 1))
    (x, dy, unit), exact = operands(unit, dtype, n=1, size=(4, 5), layout=torch.contiguous_format)
    forward, backward, seen = torch.convolution, library_module._backward, []
    monkeypatch.setattr(torch, "convolution", lambda image, *rest: seen.append(image) or forward(image, *rest))
    monkeypatch.setattr(library_module, "_backward", lambda image, *rest, **kw: seen.append(image) or backward(image, *rest, **kw))
    y = conv_fprop(Activation(x), unit, run=of("reference")).image
    dx = conv_dgrad(Gradient(dy), torch.empty_like(x), unit, run=of("reference")).image
    monkeypatch.undo()
    assert [image.is_contiguous() for image in seen] == [True, True]
    for ours, theirs, truth in zip((y, dx), library(x, dy, unit), library(*exact), strict=False):
        assert ours.is_contiguous(memory_format=LAST)
        assert_close(ours, theirs, truth)
    assert library_module._few_pixels(x, 32 * dtype.itemsize // 2, unit)
    assert not library_module._few_pixels(x, 32 * dtype.itemsize // 2 + 1, unit)
    assert not library_module._few_pixels(x, 1, unit._replace(stride=(2, 2)))


def test_what_is_not_pointwise():
    supported(torch.float32)
    x, y = torch.randn(2, 6, 4, 4), torch.randn(2, 40, 4, 4)
    one, three = torch.randn(40, 6, 1, 1), torch.randn(40, 6, 3, 3)
    assert products.pointwise(x, ConvBN(one))
    assert not products.pointwise(x, ConvBN(three))
    assert not products.pointwise(x, ConvBN(one, padding=(1, 0)))
    assert not products.pointwise(x, ConvBN(one[:, :3], groups=2))
    assert not products.pointwise(x.to("meta"), ConvBN(one.to("meta")))
    assert products.unfolded_backward(y, x, ConvBN(three, padding=(1, 1)))
    last = three.contiguous(memory_format=LAST)
    assert products.unfolded(x, ConvBN(last, padding=(1, 1)))
    assert products.unfolded(x, ConvBN(last[:32], padding=(1, 1)))
    assert not products.unfolded(x, ConvBN(last[:31], padding=(1, 1)))
    assert not products.unfolded(x, ConvBN(three, padding=(1, 1)))
    assert not products.unfolded(x, ConvBN(last[:, :3].contiguous(memory_format=LAST), padding=(1, 1), groups=2))
    assert not products.unfolded(x.bfloat16(), ConvBN(last.bfloat16(), padding=(1, 1)))
    assert not products.folded(torch.cat((y, y)), ConvBN(three.contiguous(memory_format=LAST)))
    assert products.unfolded_backward(y[:, :16], x, ConvBN(three[:16], padding=(1, 1)))
    assert not products.unfolded_backward(y[:, :15], x, ConvBN(three[:15], padding=(1, 1)))
    assert not products.unfolded_backward(y, x, ConvBN(three[:, :3], padding=(1, 1), groups=2))
    assert products.folded(y, ConvBN(three.contiguous(memory_format=LAST)))
    assert products.folded(y[:1], ConvBN(three.contiguous(memory_format=LAST)))
    assert not products.folded(y[:1], ConvBN(three))
    assert not products.folded(y[:1].bfloat16(), ConvBN(three.bfloat16().contiguous(memory_format=LAST)))


def test_strided_gradients_of_many_pixels():
    supported(torch.float32)
    x, dy = torch.randn(2, 6, 16, 16), torch.randn(2, 4, 8, 8)
    unit = ConvBN(torch.randn(4, 6, 3, 3), stride=(2, 2), padding=(1, 1))
    assert products.unfolded_backward(dy, x, unit)
    assert not products.unfolded_backward(torch.randn(2, 4, 16, 16), x, unit._replace(stride=(1, 1)))
    assert not products.unfolded_backward(dy.double(), x.double(), unit)


def test_products_that_may_round_their_operands_do_not_stand_in():
    supported(torch.float32)
    x, unit = torch.randn(2, 6, 4, 4), ConvBN(torch.randn(40, 6, 1, 1))
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert not products.pointwise(x, unit)
        assert not products.unfolded(x, unit)
        assert not products.unfolded_backward(torch.randn(2, 40, 4, 4), x, unit)
        assert products.pointwise(x.double(), unit._replace(weight=unit.weight.double()))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert products.pointwise(x, unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_primitives_take_the_products(dtype):
    supported(dtype)
    unit = ConvBN(torch.empty(40, 6, 1, 1), stride=(2, 2))
    (x, dy, unit), _ = operands(unit, dtype)
    wide = unit._replace(weight=torch.randn(40, 6, 3, 3, dtype=dtype), padding=(1, 1))
    with torch.profiler.profile() as profile:
        conv_fprop(Activation(x), unit, run=of("reference"))
        conv_dgrad(Gradient(dy), x, unit, run=of("reference"))
        conv_wgrad(Gradient(dy), Activation(x), unit, run=of("reference"))
        conv_wgrad(Gradient(dy), Activation(x), wide, run=of("reference"))
    names = [event.name for event in profile.events()]
    assert names.count("aten::mm") == 4
    assert not [name for name in names if "convolution" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES, ids=str)
def test_the_compiled_operators_have_every_bit_of_what_they_join(native_run, monkeypatch, kernel, stride, padding, dilation, dtype):
    """Forward, and both ways back, in parts as well; where nothing is read, zeros."""
    supported(dtype)
    unit = ConvBN(torch.empty(7, 3, *kernel), stride=stride, padding=padding, dilation=dilation)
    for images in (3, 0):
        (x, dy, unit), _ = operands(unit, dtype, n=images)
        for bytes_ in (products._WINDOWS, 1):
            monkeypatch.setattr(products, "_WINDOWS", bytes_)
            found = [
                (
                    products.unfolded_fprop(x, unit, run),
                    products.folded_dgrad(dy, x, unit, run),
                    products.unfolded_wgrad(dy, x, unit, run),
                )
                for run in (native_run, RUN)
            ]
            for got, expected in zip(*found, strict=True):
                same(got, expected)
                assert got.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES, ids=str)
def test_a_small_convolution_of_evaluation_is_one_product(cpu_backend, kernel, stride, padding, dilation, relu):
    """By the library's product, or by that of the backend's own 1x1 kernel; a NaN passes the ReLU."""
    supported(torch.float32)
    unit = ConvBN(torch.empty(24, 3, *kernel), stride=stride, padding=padding, dilation=dilation)
    (x, _, unit), (wide_x, _, wide) = operands(unit, torch.float32)
    vectors, run = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) - 0.5, of(cpu_backend)
    place = Place(tuple(x.shape), relu=relu)
    if kernel != (1, 1):
        assert way(unit, place, run) == "product"
    step = conv_bn_act(unit, vectors, place, run=run)
    scale, shift = (row.double().view(1, -1, 1, 1) for row in vectors[3:])
    y = torch.conv2d(wide_x, wide.weight, None, stride, padding, dilation) * scale + shift
    for skip in (None, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=LAST)):
        total = y if skip is None else y + skip
        out = step.call(x, None if skip is None else skip.clone())
        assert out.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(out.double(), total.relu() if relu else total, rtol=1e-5, atol=1e-5)
    x[0, 1] = torch.nan
    out = step.call(x, None)
    assert out[0].isnan().any()
    assert not out[1].isnan().any()


@pytest.mark.parametrize(("pixels", "small"), [(227, True), (228, False)])
def test_what_is_small_in_evaluation(pixels, small):
    supported(torch.float32)
    unit = ConvBN(torch.empty(32, 32, 3, 3), padding=(1, 1))
    assert products.small((1, 32, 1, pixels), unit) is small
    assert not products.small((1, 64, 1, 4), unit._replace(groups=2))
    assert not products.small((1, 32, 1, 4), ConvBN(unit.weight.bfloat16(), padding=(1, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_librarys_relu_is_torchs_and_passes_every_nan(dtype):
    """Every number of 16 bits, as a float32 as well."""
    numbers = torch.arange(2**16).to(torch.uint16)
    y = numbers.view(dtype) if dtype.itemsize == 2 else numbers.view(torch.bfloat16).float()
    out = library_module._relu_(y.clone())
    same(out.nan_to_num(nan=-1), y.relu().nan_to_num(nan=-1))
    same(out.isnan(), y.isnan())
