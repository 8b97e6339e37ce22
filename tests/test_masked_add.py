"""`masked_add`, in place."""

import pytest
import torch
from addends import addend_case as case
from compare import same
from convolutions import Draw, every_dtype, misaligned

from fused_res.primitives.masked_add import masked_add
from fused_res.primitives.operands import Addend
from fused_res.primitives.run import of

STRIDES = [(1, 1), (2, 2), (1, 3)]


@every_dtype
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 5, 7), (1, 3, 1, 1), (3, 64, 8, 6)], ids=str)
@pytest.mark.parametrize("signs", [False, True], ids=["all", "open"])
def test_exact_on_integers(backend, device, signs, shape, stride, dtype):
    dx, addend, expected = case(shape, stride, dtype, device, signs)
    before = addend.image.clone()
    assert masked_add(dx, addend, run=of(backend)) is None
    same(dx, expected)
    same(addend.image, before)


@every_dtype
def test_rounds_once(backend, device, dtype):
    draw = Draw(1, device)
    dx, image = draw.normal(2, 20, 5, 7, dtype=dtype), draw.normal(2, 20, 5, 7, dtype=dtype)
    expected = (dx.double() + image.double()).to(dtype)
    masked_add(dx, Addend(image), run=of(backend))
    same(dx, expected)


@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_nan_passes_where_open(backend, device, stride):
    dx, addend, _ = case((2, 20, 5, 7), stride, torch.float32, device)
    addend.image.fill_(float("nan"))
    opened = torch.zeros_like(dx)
    masked_add(opened, Addend(torch.ones_like(addend.image), addend.signs, stride), run=of(backend))
    masked_add(dx, addend, run=of(backend))
    same(dx.isnan(), opened != 0)


@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_misaligned_images(backend, device, stride):
    dx, addend, expected = case((3, 64, 8, 6), stride, torch.bfloat16, device)
    dx = misaligned(dx)
    masked_add(dx, addend._replace(image=misaligned(addend.image)), run=of(backend))
    same(dx, expected)


def test_float64_and_many_channels(cpu_backend):
    dx, addend, expected = case((2, 300, 5, 7), (1, 1), torch.float64, "cpu")
    masked_add(dx, addend, run=of(cpu_backend))
    same(dx, expected)


def test_bits_past_the_last_channel_do_not_matter(backend, device):
    dx, addend, expected = case((2, 20, 5, 7), (1, 1), torch.float32, device)
    addend.signs[:, 2] |= 0xF0
    masked_add(dx, addend, run=of(backend))
    same(dx, expected)


def test_no_images(backend, device):
    dx, addend, _ = case((0, 20, 5, 7), (2, 2), torch.float32, device)
    masked_add(dx, addend, run=of(backend))


def test_bad_arguments(backend, device):
    dx, addend, _ = case((2, 20, 5, 7), (2, 2), torch.float32, device)
    with pytest.raises(ValueError, match=r"addend: expected shape \(2, 20, 5, 7\), got \(2, 20, 3, 4\)"):
        masked_add(dx, addend._replace(stride=(1, 1)), run=of(backend))
    with pytest.raises(TypeError, match=r"addend: expected torch\.float32, got torch\.float16"):
        masked_add(dx, addend._replace(image=addend.image.half()), run=of(backend))
    with pytest.raises(ValueError, match=r"signs: expected shape \(24, 3\), got \(23, 3\)"):
        masked_add(dx, addend._replace(signs=addend.signs[1:]), run=of(backend))
    if backend == "triton":
        with pytest.raises(ValueError, match="dx: expected a channels_last image"):
            masked_add(dx.contiguous(), addend, run=of(backend))
