"""oneDNN's convolution with a shift, a shortcut and the ReLU, called from C++, against float64 and torch's own operators."""

import re
from pathlib import Path

import pytest
import torch
from compare import same, within

from fused_res import backends, internals
from fused_res.backends._native_calls import onednn_bn_act
from fused_res.primitives import library
from fused_res.spec import ConvBN

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
if WHY is None and not library.fuses(torch.float32):
    WHY = "this torch has no fused convolutions of oneDNN's"
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[1]
HEADER = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_torch/c/shim_cpu.h"

# Images, channels out, height and width of the window, padding, stride, dilation, groups.
CASES = {
    "1x1": ((2, 24, 7, 9), 40, (1, 1), (0, 0), (1, 1), (1, 1), 1),
    "1x1, strided": ((2, 16, 7, 9), 32, (1, 1), (0, 0), (2, 2), (1, 1), 1),
    "3x3": ((2, 16, 9, 8), 32, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3, strided": ((3, 16, 9, 8), 16, (3, 3), (1, 1), (2, 2), (1, 1), 1),
    "3x3, dilated": ((2, 16, 9, 8), 16, (3, 3), (2, 2), (1, 1), (2, 2), 1),
    "3x3, grouped": ((2, 32, 9, 8), 32, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "3x3, depthwise": ((2, 19, 9, 8), 19, (3, 3), (1, 1), (1, 1), (1, 1), 19),
    "uneven": ((2, 6, 9, 8), 10, (3, 2), (1, 0), (2, 1), (1, 2), 2),
    "odd channels": ((2, 7, 5, 6), 13, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "7x7": ((1, 3, 21, 20), 32, (7, 7), (3, 3), (2, 2), (1, 1), 1),
    "1x1, one pixel": ((3, 16, 1, 1), 32, (1, 1), (0, 0), (1, 1), (1, 1), 1),
    "3x3, one pixel": ((1, 16, 1, 1), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 to one pixel": ((2, 16, 3, 3), 16, (3, 3), (0, 0), (1, 1), (1, 1), 1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
BFLOAT16 = pytest.mark.skipif(not library.fuses(torch.bfloat16), reason="oneDNN has no bfloat16 convolutions for this CPU")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BFLOAT16)], ids=str)


def drawn(case, dtype):
    """x, weight, shift, shortcut, and the geometry as the operator takes it."""
    shape, outputs, window, padding, stride, dilation, groups = case
    draw = torch.Generator().manual_seed(sum(shape) + outputs)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    weight = torch.randn(outputs, shape[1] // groups, *window, generator=draw, dtype=torch.float64)
    weight /= weight[0].numel() ** 0.5
    shift = torch.randn(outputs, generator=draw, dtype=torch.float64)
    geometry = list(padding), list(stride), list(dilation), groups
    y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    skip = torch.randn(y.shape, generator=draw, dtype=torch.float64)
    images = [image.to(dtype).contiguous(memory_format=torch.channels_last) for image in (x, skip)]
    return images[0], weight.to(dtype), shift.to(dtype), images[1], geometry


def bound(x, weight, expected, geometry):
    """Of a result rounded to its dtype, of sums in float32."""
    padding, stride, dilation, groups = geometry
    size = torch.conv2d(x.double().abs(), weight.double().abs(), None, stride, padding, dilation, groups)
    return 4 * (torch.finfo(x.dtype).eps * (1 + expected.abs()) + torch.finfo(torch.float32).eps * size)


def in_order(weight, geometry, x):
    return internals.fused_convolution()[0](weight, *geometry, list(x.shape))


def truth(x, weight, shift, skip, geometry, relu):
    padding, stride, dilation, groups = geometry
    out = torch.conv2d(x.double(), weight.double(), shift.double(), stride, padding, dilation, groups)
    out = out if skip is None else out + skip.double()
    return out.relu() if relu else out


@pytest.mark.parametrize("added", ["nothing", "a shortcut", "onto the shortcut"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "plain"])
@dtypes
@cases
def test_numbers_are_right_and_torchs_operators_to_the_bit(case, dtype, ordered, relu, added):
    x, weight, shift, skip, geometry = drawn(case, dtype)
    given = None if added == "nothing" else skip
    expected = truth(x, weight, shift, given, geometry, relu)
    limit = bound(x, weight, expected, geometry)
    if ordered:
        weight = in_order(weight, geometry, x)
    spare = added == "onto the shortcut"
    if added == "a shortcut" and expected.shape[2:] == (1, 1):
        spare = True  # as `library.fused` calls it
    skips = [None if given is None else given.clone() for _ in range(2)]
    found = onednn_bn_act(geometry, relu)(x, weight, shift, skips[0], spare)
    within(found.double(), expected, limit)
    same(found, library._by_operators(geometry, relu)(x, weight, shift, skips[1], spare))
    assert found.is_contiguous(memory_format=torch.channels_last)
    if given is not None:
        assert (found is skips[0]) == spare
        if not spare:
            same(skips[0], given, "the shortcut is left as it was")


@pytest.mark.parametrize("spare", [True, False])
@dtypes
@pytest.mark.parametrize("case", ["3x3", "1x1, one pixel", "3x3 to one pixel"])
def test_the_prepared_step_is_the_same_by_the_kernel_and_by_torchs_operators(case, dtype, spare):
    x, weight, shift, skip, geometry = drawn(CASES[case], dtype)
    unit = ConvBN(weight, None, None, None, None, None)._replace(
        stride=tuple(geometry[1]), padding=tuple(geometry[0]), dilation=tuple(geometry[2]), groups=geometry[3]
    )
    vectors = torch.stack([torch.zeros_like(shift).float()] * 3 + [torch.ones_like(shift).float(), shift.float()])
    steps = [library.fused(unit, vectors, tuple(x.shape), True, spare, kernel) for kernel in (onednn_bn_act, None)]
    for given in (None, skip):
        expected = truth(x, weight, shift, given, geometry, True)
        skips = [None if given is None else given.clone() for _ in steps]
        found = [step.call(x, image) for step, image in zip(steps, skips, strict=True)]
        within(found[0].double(), expected, bound(x, weight, expected, geometry))
        same(*found)
        if given is not None and not spare:
            same(skips[0], given, "the shortcut is left as it was")


def copying(channels, dtype):
    """A weight and a shift with which the convolution copies its images."""
    return torch.ones(channels, 1, 1, 1, dtype=dtype), torch.zeros(channels, dtype=dtype), ([0, 0], [1, 1], [1, 1], channels)


def odd_values(shape, dtype):
    """Numbers among which are NaN of either sign, infinities, zeros of either sign, and the least and largest of the dtype."""
    draw, about = torch.Generator().manual_seed(sum(shape)), torch.finfo(dtype)
    x = torch.randn(shape, generator=draw).to(dtype)
    nan = torch.tensor(torch.nan, dtype=dtype)
    odd = torch.stack([nan, -nan, *(torch.tensor(v, dtype=dtype) for v in (torch.inf, -torch.inf, 0.0, -0.0))])
    odd = torch.cat([odd, torch.tensor([about.max, about.min, about.tiny, -about.tiny], dtype=dtype)])
    which = torch.randint(0, len(odd), shape, generator=draw)
    x = torch.where(torch.rand(shape, generator=draw) < 0.5, odd[which], x)
    return x.contiguous(memory_format=torch.channels_last)


@dtypes
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 15, 16, 17, 31, 33, 64, 83])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7)], ids=str)
def test_the_relu_is_torchs_with_every_instruction_set(capability, dtype, channels, size):
    x = odd_values((2, channels, *size), dtype)
    weight, shift, geometry = copying(channels, dtype)
    linear = torch.ops.fused_res.onednn_bn_act(x, weight, shift, None, *geometry, False)
    assert channels == 1 or linear.isnan().any()
    same(torch.ops.fused_res.onednn_bn_act(x, weight, shift, None, *geometry, True), torch.relu(linear), nan=True)
    onto = [torch.zeros_like(x), torch.zeros_like(x)]
    for out, relu in zip(onto, (False, True), strict=True):
        torch.ops.fused_res.onednn_bn_act_(out, x, weight, shift, *geometry, relu)
    same(onto[1], torch.relu(onto[0]), nan=True)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
@dtypes
@pytest.mark.parametrize("case", ["1x1", "3x3, grouped"])
def test_nan_and_infinity_come_out_as_torchs_relu_leaves_them(case, dtype, value):
    x, weight, shift, skip, geometry = drawn(CASES[case], dtype)
    x[0, 1, 2, 3] = skip[1, 5, 4, 4] = value
    for given in (None, skip):
        linear, found = (torch.ops.fused_res.onednn_bn_act(x, weight, shift, given, *geometry, relu) for relu in (False, True))
        assert not linear.isfinite().all()
        same(found, torch.relu(linear), nan=True)
        expected = truth(x, weight, shift, given, geometry, True)
        same(found.isnan(), expected.isnan())
        same(found.isinf(), expected.isinf())


def test_an_empty_batch_makes_an_empty_image():
    x, weight, shift, _, geometry = drawn(CASES["3x3"], torch.float32)
    assert torch.ops.fused_res.onednn_bn_act(x[:0], weight, shift, None, *geometry, True).shape == (0, 32, 9, 8)


REFUSED = {
    "channels": lambda x, w, b, s, g: (x[:, :15].contiguous(memory_format=torch.channels_last), w, b, s, *g),
    "dimensions": lambda x, w, b, s, g: (x[0], w, b, s, *g),
    "an image smaller than the window": lambda x, w, b, s, g: (x[..., :1, :1], w, b, None, [0, 0], *g[1:]),
    "a shift too short": lambda x, w, b, s, g: (x, w, b[:3], s, *g),
    "a shortcut too small": lambda x, w, b, s, g: (x, w, b, s[..., :4, :4].contiguous(memory_format=torch.channels_last), *g),
    "a shortcut too large": lambda x, w, b, s, g: (x, w, b, torch.nn.functional.pad(s, (1, 1, 1, 1)), *g),
    "a shortcut of one pixel": lambda x, w, b, s, g: (x, w, b, s[..., :1, :1], *g),
    "a shortcut of fewer channels": lambda x, w, b, s, g: (x, w, b, s[:, :8].contiguous(memory_format=torch.channels_last), *g),
    "a shortcut of fewer images": lambda x, w, b, s, g: (x, w, b, s[:1], *g),
    "no padding": lambda x, w, b, s, g: (x, w, b, s, [], *g[1:]),
    "negative padding": lambda x, w, b, s, g: (x, w, b, None, [-1, -1], *g[1:]),
    "a stride of none": lambda x, w, b, s, g: (x, w, b, s, g[0], [0, 0], *g[2:]),
    "groups that do not divide": lambda x, w, b, s, g: (x, w, b, s, *g[:3], 3),
    "no groups": lambda x, w, b, s, g: (x, w, b, s, *g[:3], 0),
    "the weight's dtype": lambda x, w, b, s, g: (x, w.bfloat16(), b, s, *g),
    "the shift's dtype": lambda x, w, b, s, g: (x, w, b.bfloat16(), s, *g),
    "the shortcut's dtype": lambda x, w, b, s, g: (x, w, b, s.bfloat16(), *g),
    "float64": lambda x, w, b, s, g: (x.double(), w.double(), b.double(), s.double(), *g),
    "another layout": lambda x, w, b, s, g: (x.contiguous(), w, b, None, *g),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    x, weight, shift, skip, *geometry = REFUSED[what](*drawn(CASES["3x3"], torch.float32))
    if skip is not None:
        with pytest.raises(RuntimeError):
            torch.ops.fused_res.onednn_bn_act_(skip.clone(), x, weight, shift, *geometry, True)
    with pytest.raises(RuntimeError):
        torch.ops.fused_res.onednn_bn_act(x, weight, shift, skip, *geometry, True)


def declarations(text):
    """By name the parameters, types and names, of the functions that C++ source declares."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    found = re.findall(r"AOTITorchError\s+(aoti_torch_cpu_mkldnn__convolution_pointwise(?:_binary_?)?)\s*\(([^)]*)\)\s*;", text)
    return {name: re.sub(r"\s*([*&,])\s*", r"\1 ", " ".join(parameters.split())) for name, parameters in found}


@pytest.mark.skipif(not HEADER.is_file(), reason="this torch came without its header shim_cpu.h")
def test_functions_are_declared_as_torchs_header_declares_them():
    ours = declarations((ROOT / "csrc/cpu/onednn_bn_act.cpp").read_text())
    torchs = declarations(HEADER.read_text())
    assert len(ours) == 3
    assert ours == torchs
