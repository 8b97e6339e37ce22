"""Triton's kernels with a product leave masks out where every block of theirs is full, and change no bit by it."""

import importlib

import pytest
import torch
from compare import same
from torch import nn

import fused_res
from fused_res import plans, use_backend
from fused_res.backends import triton
from fused_res.layout import nhwc

pytest.importorskip("triton")
PAYS = triton.pays  # conftest.py replaces it in every test by one that says yes, to 3x3 convolutions as well
FILES = ("conv_fprop", "conv_dgrad", "conv_wgrad", "pointwise_tail", "pointwise_tail_backward")


@pytest.fixture
def launched(monkeypatch):
    """What was launched, as names and whether masks were left out; with `launched.masked = True` none are."""

    class Launched(list):
        masked = False

    found = Launched()
    monkeypatch.setattr(triton, "pays", PAYS)
    for file in FILES:
        module = importlib.import_module(f"fused_res.kernels.{file}")

        def launch(kernel, *arguments, really=module.launch, **constants):
            if "EVEN" in constants:
                found.append((kernel.__name__.removesuffix("_kernel"), constants["EVEN"]))
                constants |= {name: constants[name] and not found.masked for name in ("EVEN", "FULL") if name in constants}
            return really(kernel, *arguments, **constants)

        monkeypatch.setattr(module, "launch", launch)
    return found


def block(projection):
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256)) if projection else None
    made = fused_res.Bottleneck(64 if projection else 256, 64, 1, downsample)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return made


def step(made, size, dtype, device):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, made.conv1.in_channels, size, 16, generator=generator).to(device, dtype)
    x = nhwc(x).requires_grad_()
    with plans.afresh():
        out = made(x)
        out.backward(torch.randn(out.shape, generator=generator).to(device, dtype))
    gradients = [parameter.grad for parameter in made.parameters()]
    made.zero_grad()
    return [out.detach(), x.grad, *gradients]


@pytest.mark.usefixtures("proven_interpreter")
@pytest.mark.parametrize(
    ("projection", "level", "dtype"),
    [
        pytest.param(False, "prologue", torch.float32, id="identity, prologue", marks=pytest.mark.slow),
        pytest.param(False, "moment", torch.bfloat16, id="identity, moment"),
        pytest.param(True, "moment", torch.bfloat16, id="projection, moment", marks=pytest.mark.slow),
    ],
)
def test_full_blocks_give_the_same_bits_as_masked_ones(launched, device, projection, level, dtype):
    made = block(projection).to(device, dtype)
    with use_backend("triton", level):
        full = step(made, 8, dtype, device)
        kernels = {name for name, even in launched if even}
        launched.masked = True
        masked = step(made, 8, dtype, device)
    wanted = {"conv_fprop", "conv_dgrad"}
    wanted |= {"pointwise_tail", "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply"} if level == "moment" else set()
    wanted |= {"conv_wgrad_partial"} if projection else set()
    assert kernels == wanted
    for one, other in zip(full, masked, strict=True):
        same(one, other)


@pytest.mark.usefixtures("proven_interpreter")
def test_ragged_blocks_keep_their_masks(launched, device):
    made = fused_res.Bottleneck(16, 4).to(device)
    with use_backend("triton", "moment"):
        step(made, 3, torch.float32, device)
    assert launched
    assert not any(even for _, even in launched)
