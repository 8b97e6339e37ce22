"""`im2col` and `col2im` against torch's own, which have channels first, and each backend against the formula, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from compare import same, within

from fused_res.backends import native
from fused_res.primitives.im2col import col2im, im2col, plain_col2im
from fused_res.primitives.run import PLAIN
from fused_res.primitives.run import of as run_of
from fused_res.spec import ConvBN

# kernel, stride, padding, dilation, size
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), (4, 4)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (9, 6)),
    ((3, 3), (1, 2), (2, 0), (2, 1), (5, 7)),
    ((5, 2), (1, 3), (4, 0), (2, 1), (9, 6)),
    ((1, 1), (2, 1), (1, 2), (1, 1), (5, 4)),
    ((2, 3), (4, 5), (0, 1), (1, 1), (2, 3)),
    ((1, 7), (1, 1), (0, 3), (1, 1), (1, 1)),
]
geometries = pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), GEOMETRIES, ids=str)


@pytest.fixture
def compiled():
    reason = native.missing()
    if reason is not None:
        pytest.skip(reason)
    native.load()


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def unit_of(channels, kernel, stride, padding, dilation):
    return ConvBN(torch.empty(1, channels, *kernel), stride=stride, padding=padding, dilation=dilation)


def tap_first(windows, channels):
    """[P, R*S*C] as torch has it, [N, C*R*S, P / N], for one image."""
    return windows.view(windows.shape[0], -1, channels).permute(2, 1, 0).flatten(0, 1)[None]


@geometries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_windows_are_torchs(backend, device, dtype, kernel, stride, padding, dilation, size):
    x = drawn(3, 5, *size, dtype=dtype).to(device).contiguous(memory_format=torch.channels_last)
    windows = im2col(x, unit_of(5, kernel, stride, padding, dilation), run=run_of(backend))
    expected = F.unfold(x.double(), kernel, dilation, padding, stride)
    for got, image in zip(windows.chunk(3), expected.to(dtype), strict=True):
        same(tap_first(got, 5)[0], image)


@geometries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_sum_of_windows_is_torchs_and_the_formulas(backend, device, dtype, kernel, stride, padding, dilation, size):
    unit = unit_of(5, kernel, stride, padding, dilation)
    pixels = unit.output_size(*size)
    windows = drawn(3 * pixels[0] * pixels[1], 5 * kernel[0] * kernel[1], dtype=dtype).to(device)
    image = col2im(windows, size, unit, run=run_of(backend))
    assert image.is_contiguous(memory_format=torch.channels_last)
    first = torch.cat([tap_first(some, 5) for some in windows.double().chunk(3)])
    true = F.fold(first, size, kernel, dilation, padding, stride)
    within(image, true, 8 * torch.finfo(dtype).eps * F.fold(first.abs(), size, kernel, dilation, padding, stride))
    same(image, col2im(windows, size, unit, run=PLAIN))


def test_what_is_not_finite_stays_where_it_is_read(backend, device):
    unit = unit_of(2, (3, 3), (1, 1), (1, 1), (1, 1))
    windows = torch.zeros(16, 18, device=device)
    windows[5, 0] = torch.nan  # the first pixel that window (1, 1) reads is (0, 0)
    image = col2im(windows, (4, 4), unit, run=run_of(backend))
    assert image.isnan().nonzero().tolist() == [[0, 0, 0, 0]]


def test_sixteen_bits_are_not_summed():
    unit = unit_of(2, (3, 3), (1, 1), (1, 1), (1, 1))
    with pytest.raises(TypeError, match="windows: expected float32 or float64, got torch"):
        col2im(torch.zeros(16, 18, dtype=torch.bfloat16), (4, 4), unit, run=PLAIN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 4, 4, 2), 3, 3, 0, 1, 1, 1, 1, 1), "at least 1"),
        ((torch.zeros(1, 4, 4, 2), 3, 3, 1, 1, -1, 1, 1, 1), "padding"),
        ((torch.zeros(1, 4, 4, 2), 5, 3, 1, 1, 0, 1, 1, 1), "padded image"),
        ((torch.zeros(1, 4, 4, 2), 3, 3, 1, 1, 2**62, 1, 1, 1), "at most"),
        ((torch.zeros(9, 4, 4, 2), 2**24, 2**24, 1, 1, 2**24, 2**24, 1, 1), "fewer elements"),
        ((torch.zeros(4, 4, 2), 3, 3, 1, 1, 1, 1, 1, 1), "x: expected images"),
        ((torch.zeros(1, 2, 4, 4).permute(0, 2, 3, 1), 3, 3, 1, 1, 1, 1, 1, 1), "contiguous"),
    ],
    ids=str,
)
def test_the_operator_refuses_images(arguments, message, compiled):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_res.im2col(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(15, 18), 4, 4, 3, 3, 1, 1, 1, 1, 1, 1), "16 rows for each image"),
        ((torch.zeros(16, 17), 4, 4, 3, 3, 1, 1, 1, 1, 1, 1), "9 taps, got 17"),
        ((torch.zeros(16, 0), 4, 4, 3, 3, 1, 1, 1, 1, 1, 1), "channels"),
        ((torch.zeros(16, 18, dtype=torch.bfloat16), 4, 4, 3, 3, 1, 1, 1, 1, 1, 1), "float32 or float64"),
        ((torch.zeros(2**12, 2**12), 2**24, 2**24, 1, 1, 2**24, 2**24, 0, 0, 1, 1), "fewer elements"),
        ((torch.zeros(16, 18), 0, 4, 3, 3, 1, 1, 1, 1, 1, 1), "at least 1"),
    ],
    ids=str,
)
def test_the_operator_refuses_windows(arguments, message, compiled):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_res.col2im(*arguments)


def test_the_formula_takes_an_empty_batch():
    assert plain_col2im(torch.zeros(0, 18), 4, 4, 3, 3, 1, 1, 1, 1, 1, 1).shape == (0, 4, 4, 2)
