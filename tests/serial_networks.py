"""Small networks for the tests of evaluation as one call, and whether a call of theirs is one."""

import copy

import pytest
import torch
from torch import nn

import torchvision_operators
from fused_res import backends, fuse, serial, unfuse

torchvision_operators.load()
timm = pytest.importorskip("timm")
resnet = pytest.importorskip("torchvision.models.resnet")
BasicBlock, ResNet = resnet.BasicBlock, resnet.ResNet

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
marks = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.usefixtures("one_thread")]
"""Of all tests of this."""

AGAIN = serial._AGAIN + serial._FIRST
"""Calls after which programs are put together once more, however many there were before."""


def torchvisions(kind=ResNet):
    return kind(BasicBlock, [1, 1, 1, 1], num_classes=7)


def timms():
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=7)


NETWORKS = {"torchvision": torchvisions, "timm": timms}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))
DTYPES = [torch.float32, torch.bfloat16]


def drawn(make=torchvisions, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return randomised(make()).eval().to(dtype)


def randomised(net):
    """The network, with values in its BNs in which a swapped or a forgotten one would show."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def served(make=torchvisions, dtype=torch.float32):
    return fuse(drawn(make, dtype))


def images(dtype=torch.float32, size=32, n=2):
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def is_combined(net, x, runs):
    """Whether a call of it is a combined one."""
    before = len(runs)
    with torch.no_grad():
        net(x)
    return len(runs) > before


def combine(net, x, runs):
    """Call it until that is one call, and return its output."""
    for _ in range(AGAIN):
        if is_combined(net, x, runs):
            break
    else:
        raise AssertionError("never one call")
    with torch.no_grad():
        return net(x)


class Apart:
    """`serial.Serial` as it would be if it never put anything together."""

    def __enter__(self):
        self.kept = serial.Serial.__call__
        serial.Serial.__call__ = serial.Serial._one_by_one

    def __exit__(self, *_):
        serial.Serial.__call__ = self.kept


def one_by_one(net, x):
    """What a copy of the network, of which nothing is kept, makes of x, each of its modules called by itself."""
    with torch.no_grad(), Apart():
        return copy.deepcopy(net)(x)


def eager(net, x):
    """What the network's copy makes of x without any of this."""
    with torch.no_grad():
        return unfuse(copy.deepcopy(net))(x)
