"""Small pre-activation blocks, and the same modules run by hand as timm runs them."""

import copy

import torch
from torch import nn

import fused_res
from blocks import Eager
from fused_res import accuracy

KINDS = ("PreActBasicBlock", "PreActBottleneck")
SHORTCUTS = ("identity", "projection", "pooled")


def make(kind, shortcut, *, width=4, planes=2, seed=0, bias=False, training=True, dtype=torch.float64, **options):
    """A block with random parameters and statistics; the channels of x are `width`."""
    torch.manual_seed(seed)
    block_class = getattr(fused_res, kind)
    stride = 1 if shortcut == "identity" else 2
    if shortcut == "identity":
        planes = width // block_class.expansion
    out = planes * block_class.expansion
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    downsample = {
        "identity": lambda: None,
        "projection": lambda: nn.Conv2d(width, out, 1, stride, bias=bias),
        "pooled": lambda: nn.Sequential(pool, nn.Conv2d(width, out, 1, bias=bias), nn.Identity()),
    }[shortcut]()
    block = block_class(width, planes, stride, downsample, **options)
    if bias:
        for i in range(1, block.depth + 1):
            conv = getattr(block, f"conv{i}")
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    return accuracy.random_block(block, seed).to(dtype).train(training)


def image(block, n=3, size=(5, 4), dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, block.conv1.in_channels, *size, dtype=dtype)


class Peer(Eager):
    """The block's own child modules, run by hand as timm runs them."""

    def forward(self, x):
        activated = self.relu(self.norm1(x))
        out = self.conv1(activated)
        for i in range(2, self.depth + 1):
            out = getattr(self, f"conv{i}")(self.relu(getattr(self, f"norm{i}")(out)))
        if self.residual_scale is not None:
            out = out * self.residual_scale
        return out + (x if self.downsample is None else self.downsample(activated)).to(out.dtype)


def peer(block):
    return Peer(copy.deepcopy(block))
