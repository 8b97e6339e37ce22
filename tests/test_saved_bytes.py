"""What a whole ResNet-50 keeps for backward at each level, beside eager, and what the moment form never allocates."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blocks import eager
from fused_res import Bottleneck, backends, use_backend
from fused_res.benchmarks.memory import saved_bytes
from fused_res.block.backward import Gradients, backward
from fused_res.block.forward import Saved, forward
from fused_res.planner import LEVELS
from fused_res.spec import Block, ConvBN


def stages():
    """The 16 blocks of ResNet-50, each with its input's size at 224 x 224."""
    inplanes, size = 64, 56
    for stage, (planes, count) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for i in range(count):
            stride = 2 if i == 0 and stage > 0 else 1
            downsample = None
            if i == 0:
                downsample = nn.Sequential(nn.Conv2d(inplanes, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4))
            yield Bottleneck(inplanes, planes, stride, downsample), inplanes, size
            inplanes, size = planes * 4, size // stride


def kept(level, dtype):
    """Bytes that all blocks hold at batch 2, inputs included, which are the outputs of the blocks before."""
    backend = "native" if backends.supports("native", torch.device("cpu"), dtype) is None else "reference"
    total = 0
    for block, channels, size in stages():
        block = block.to(dtype).to(memory_format=torch.channels_last)
        x = torch.randn(2, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        if level == "eager":
            block = eager(block)
            total += saved_bytes(lambda block=block, x=x: block(x), block)
        else:
            with use_backend(backend, level):
                total += saved_bytes(lambda block=block, x=x: block(x), block)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_moment_form_keeps_half_of_what_eager_keeps(dtype):
    held = {level: kept(level, dtype) for level in ("eager", *LEVELS)}
    print({level: round(count / held["eager"], 3) for level, count in held.items()})
    assert held["moment"] <= 0.52 * held["eager"]
    assert held["bn_act"] == held["epilogue"] == held["prologue"] < 0.9 * held["eager"]


class Allocations(TorchDispatchMode):
    """Shapes of all tensors of at least `least` elements that operators inside make, views apart."""

    def __init__(self, least):
        super().__init__()
        self.least, self.shapes = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(values):
            return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, torch.Tensor)}

        before = storages((args, kwargs))
        made = function(*args, **(kwargs or {}))
        large = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.numel() >= self.least]
        self.shapes += [tuple(t.shape) for t in large if t.untyped_storage().data_ptr() not in before]
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_moment_form_allocates_nothing_of_the_outer_width_but_out_and_dx(dtype):
    reason = backends.supports("native", torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(reason)
    block = Bottleneck(256, 64).to(dtype)
    x = torch.randn(2, 256, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
    parts = Block(block.operands(x)["main"])
    needs = Gradients(True, False, False, parts._replace(main=[ConvBN(True, gamma=True, beta=True)] * 3))
    with torch.no_grad():
        with Allocations(x.numel() // 2) as forwards:
            out, saved = forward(x, None, None, parts, "moment", True, "native")
        dout = torch.randn_like(out)
        kept = Saved.from_list(saved, parts, "moment")
        with Allocations(x.numel() // 2) as backwards:
            gradients = backward(dout, x, None, parts, kept, needs, "moment", "native")
    assert gradients.x.shape == x.shape
    assert len(forwards.shapes) == len(backwards.shapes) == 1, (forwards.shapes, backwards.shapes)
