"""What a whole ResNet-50 keeps for backward at each level, beside eager."""

import pytest
import torch
from torch import nn

from blocks import eager
from fused_res import Bottleneck, backends, use_backend
from fused_res.benchmarks.memory import saved_bytes
from fused_res.planner import LEVELS


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


def kept(level, dtype, batch):
    """Bytes that all blocks hold, inputs included, which are the outputs of the blocks before."""
    backend = "native" if backends.supports("native", torch.device("cpu"), dtype) is None else "reference"
    total = 0
    for block, channels, size in stages():
        block = block.to(dtype).to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        if level == "eager":
            block = eager(block)
            total += saved_bytes(lambda block=block, x=x: block(x), block)
        else:
            with use_backend(backend, level):
                total += saved_bytes(lambda block=block, x=x: block(x), block)
    return total


def projected(block):
    return [] if block.downsample is None else [block.downsample[0].in_channels]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_the_moment_form_keeps_half_of_what_eager_keeps(dtype):
    """For every image; and, whatever the batch, the moments of what the last convolutions and the projections read, in float64."""
    one, two = ({level: kept(level, dtype, batch) for level in ("eager", *LEVELS)} for batch in (1, 2))
    held = {level: two[level] - one[level] for level in two}
    print({level: round(count / held["eager"], 3) for level, count in held.items()})
    assert held["moment"] <= 0.52 * held["eager"]
    read = [width for block, *_ in stages() for width in (block.conv3.in_channels, *projected(block))]
    rest = one["moment"] - held["moment"]
    assert 0 < rest <= 1.05 * sum(8 * width * width for width in read)
    assert held["bn_act"] == held["epilogue"] == held["prologue"] < 0.9 * held["eager"]
