"""Residual blocks as people write their own, and a small network of each."""

import torch
import torch.nn.functional as F
from torch import nn

from blocks import projection
from fused_res import Anatomy


class Functional(nn.Module):
    """As in many CIFAR networks: ReLU is a function, and the shortcut an empty Sequential where it is the identity."""

    fused_res_anatomy = Anatomy((("conv1", "bn1"), ("conv2", "bn2")), shortcut="shortcut")

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = projection(inputs, outputs, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Scaled(nn.Module):
    """A learnable scale in front of the branch, the sum the other way round and not in place, layers in a Sequential."""

    fused_res_anatomy = Anatomy((("layers.0", "layers.1"), ("layers.3", "layers.4")), "skip", ("layers.2",), residual_scale="alpha")

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.skip = None if stride == 1 and inputs == outputs else projection(inputs, outputs, stride)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        skip = x if self.skip is None else self.skip(x)
        return torch.relu(skip + self.layers(x) * self.alpha)


class Unsaid(nn.Module):
    """One that says nothing of itself."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.skip = projection(inputs, outputs, stride)

    def forward(self, x):
        return torch.relu(self.bn1(self.conv1(x)) + self.skip(x))


class Network(nn.Module):
    """Three blocks: a projection and two identities."""

    def __init__(self, block, width=8, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.blocks = nn.Sequential(block(6, width, 2, **options), block(width, width, **options), block(width, width, **options))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
