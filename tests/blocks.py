"""Small blocks, the same modules run by hand, and one step of either: what several test files compare."""

import copy

import pytest
import torch
from torch import nn

from fused_res import BasicBlock, Bottleneck


def projection(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _pooled(inputs, outputs):
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


BLOCKS = {
    "identity": lambda **kw: BasicBlock(8, 8, **kw),
    "projection": lambda **kw: BasicBlock(6, 8, 2, projection(6, 8, 2), **kw),
    "bottleneck": lambda **kw: Bottleneck(16, 4, residual_scale=0.5, **kw),
    "pooled": lambda **kw: Bottleneck(6, 4, 2, _pooled(6, 16), **kw),
    "as it is": lambda **kw: BasicBlock(6, 8, 2, nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1)), **kw),
}
every_block = pytest.mark.parametrize("kind", BLOCKS)


def make(kind, dtype=torch.float64, seed=0, **options):
    """A block whose parameters and buffers all differ, the same at every call."""
    torch.manual_seed(seed)
    block = BLOCKS[kind](**options)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in (
                (m.weight, 0.5, 1.5),
                (m.bias, -0.5, 0.5),
                (m.running_mean, -0.5, 0.5),
                (m.running_var, 0.5, 2),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
    return block.to(dtype)


def add_biases(block):
    """Give every convolution a bias."""
    torch.manual_seed(3)
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.randn(m.out_channels, dtype=m.weight.dtype))


def image(block, n=3, size=7, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, block.conv1.in_channels, size, size, dtype=dtype)


class Eager(nn.Module):
    """The block's own child modules, run by hand as torchvision runs them."""

    def __init__(self, block):
        super().__init__()
        self.depth = block.depth
        self.residual_scale = block.residual_scale
        for name, child in block.named_children():
            self.add_module(name, child)
        self.downsample = block.downsample

    def forward(self, x):
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = self.relu(out) if i < self.depth else out
        if self.residual_scale is not None:
            out = out * self.residual_scale
        out = out + (x if self.downsample is None else self.downsample(x)).to(out.dtype)
        return self.relu(out)


def eager(block):
    return Eager(copy.deepcopy(block))


def weights(out):
    """A fixed gradient for this output, no two values alike."""
    return torch.linspace(-1, 1.5, out.numel()).sin().view(out.shape).to(out)


def step(module, x, dout=weights, call=None):
    """One forward and backward: output, gradients (None where none came) and buffers by name."""
    module.zero_grad()
    x = x.detach().requires_grad_(x.is_floating_point())
    out = (module if call is None else call)(x)
    torch.autograd.backward(out, dout(out))
    found = {"out": out.detach().clone(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def assert_same(got, expected, rtol=1e-9, atol=1e-10):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
