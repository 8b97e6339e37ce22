"""What is measured: one table of residual blocks and networks, shared by the command, the tests and pytest-benchmark."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import fused_res
from fused_res.geometry import Convolution, Geometry
from fused_res.modules import ResidualBlock

BATCHES = {"cpu": (8,), "cuda": (16, 64, 256)}
"""Default batch sizes of a device type."""
IMAGE = 224
"""Height and width of a network's input."""
LAST_GAMMA = 0.2
"""Factor of the last gamma of a network's blocks."""


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and buffer a random value, in fp64, such that activations keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    module.double()
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.Conv2d | nn.Linear):
                fan_in = child.weight[0].numel()
                child.weight.copy_(torch.randn(child.weight.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
                if child.bias is not None:
                    uniform(child.bias, -0.5, 0.5)
            elif isinstance(child, nn.BatchNorm2d):
                uniform(child.weight, 0.5, 1.5)
                uniform(child.bias, -0.5, 0.5)
                uniform(child.running_mean, -0.5, 0.5)
                uniform(child.running_var, 0.5, 1.5)
    return module


def convert(module: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device) -> nn.Module:
    """Convolutions and linear layers in `dtype`, BN in fp32 as under autocast (fp64 for fp64)."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Linear):
            child.to(dtype)
        elif isinstance(child, nn.BatchNorm2d):
            child.to(torch.promote_types(dtype, torch.float32))
    return module.to(device, memory_format=memory_format)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Case:
    """One residual block at one input size, as it stands in a ResNet at 224 x 224. `size` is the input's height and width.

    kind: "basic" or "bottleneck", or one of them behind "preact " for a pre-activation block.
    """

    name: str
    kind: str
    inplanes: int
    planes: int
    size: int
    stride: int = 1
    groups: int = 1
    base_width: int = 64

    is_network = False

    @property
    def block(self) -> type[nn.Module]:
        return {
            "basic": fused_res.BasicBlock,
            "bottleneck": fused_res.Bottleneck,
            "preact basic": fused_res.PreActBasicBlock,
            "preact bottleneck": fused_res.PreActBottleneck,
        }[self.kind]

    @property
    def basic(self) -> bool:
        return self.kind.endswith("basic")

    @property
    def preactivated(self) -> bool:
        return self.kind.startswith("preact ")

    @property
    def outplanes(self) -> int:
        return self.planes * self.block.expansion

    @property
    def width(self) -> int:
        """Channels of the inner activations."""
        return self.planes if self.basic else int(self.planes * (self.base_width / 64.0)) * self.groups

    @property
    def projection(self) -> bool:
        return self.stride != 1 or self.inplanes != self.outplanes

    @property
    def output_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    def geometry(self, batch: int, training: bool = True) -> Geometry:
        """What a plan for the block depends on. training: whether its BNs take the batch's statistics."""

        def unit(k: int, c: int, taps: int, step: int = 1, groups: int = 1) -> Convolution:
            edge = (taps // 2, taps // 2)
            return Convolution((k, c // groups, taps, taps), (step, step), edge, (1, 1), groups, training)

        width, out = self.width, self.outplanes
        if self.kind == "basic":
            main = unit(width, self.inplanes, 3, self.stride), unit(width, width, 3)
        else:
            main = unit(width, self.inplanes, 1), unit(width, width, 3, self.stride, self.groups), unit(out, width, 1)
        projection = unit(out, self.inplanes, 1, self.stride) if self.projection else None
        return Geometry(main, projection, None, False, (batch, self.size, self.size))

    def describe(self) -> dict:
        """What a row of a result file says about the case."""
        return asdict(self) | {"case": self.name, "projection": self.projection, "is_network": False}

    def module(self) -> nn.Module:
        """The block as its class makes it."""
        downsample = None
        if self.projection:
            conv = nn.Conv2d(self.inplanes, self.outplanes, 1, self.stride, bias=False)
            downsample = nn.Sequential(conv) if self.preactivated else nn.Sequential(conv, nn.BatchNorm2d(self.outplanes))
        return self.block(self.inplanes, self.planes, self.stride, downsample, self.groups, self.base_width)

    def build(self, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device, seed: int = 0) -> nn.Module:
        """The block in training mode, every value random. One seed gives the same values, up to rounding, everywhere."""
        return convert(randomise(self.module(), seed), dtype, memory_format, device)

    def input(
        self, batch: int, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """A block input (non-negative where it comes from a ReLU) and an incoming gradient, made on the device from the seed."""
        generator = torch.Generator(device).manual_seed(seed)
        x = _random((batch, self.inplanes, self.size, self.size), generator)
        x = x if self.preactivated else x.relu_()
        grad = _random((batch, self.outplanes, self.output_size, self.output_size), generator)
        return tuple(tensor.to(dtype).contiguous(memory_format=memory_format) for tensor in (x, grad))


class ResNet(nn.Module):
    """torchvision's ResNet with our blocks: stem, blocks, pooling and classifier, which it calls in the order of its children."""

    fused_res_stem = ("conv1", "bn1", "relu", "maxpool")

    def __init__(self, blocks: Sequence[ResidualBlock], kind: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(*blocks)
        channels = (blocks[-1].bn2 if kind == "basic" else blocks[-1].bn3).num_features
        self.avgpool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.flatten(self.avgpool(self.blocks(x))))


@dataclass(frozen=True)
class Network:
    """A ResNet for 1000 classes; `layers` blocks in its four stages. Blocks that recur are one case."""

    name: str
    kind: str
    layers: tuple[int, int, int, int]
    groups: int = 1
    base_width: int = 64

    is_network = True
    projection = False

    def describe(self) -> dict:
        return {"case": self.name, "kind": self.kind, "size": IMAGE, "is_network": True}

    def blocks(self, prefix: str | None = None) -> Iterator[tuple[Case, int]]:
        """The distinct blocks and how often each occurs: the first of a stage (where it projects), and the further ones."""
        inplanes, size = 64, 56
        for stage, (planes, count) in enumerate(zip((64, 128, 256, 512), self.layers, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            shape = (self.groups, self.base_width)
            name = f"{prefix or self.name}.{stage}"
            first = Case(f"{name}.projection", self.kind, inplanes, planes, size, stride, *shape)
            inplanes, size = first.outplanes, first.output_size
            further = count
            if first.projection:
                yield first, 1
                further -= 1
            if further:
                yield Case(f"{name}.identity", self.kind, inplanes, planes, size, 1, *shape), further

    def module(self) -> nn.Module:
        return ResNet([case.module() for case, count in self.blocks() for _ in range(count)], self.kind)

    def build(self, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device, seed: int = 0) -> nn.Module:
        """As `Case.build`, but the last gamma of every block is small, as in a network that trains well.

        With a large one roundings grow from block to block until the gradients of eager's own layouts have nothing in common.
        """
        network = randomise(self.module(), seed)
        with torch.no_grad():
            for block in network.blocks:
                getattr(block, f"bn{block.depth}").weight.mul_(LAST_GAMMA)
        return convert(network, dtype, memory_format, device)

    def input(
        self, batch: int, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Images and the incoming gradient of the logits, made on the device from the seed."""
        generator = torch.Generator(device).manual_seed(seed)
        x = _random((batch, 3, IMAGE, IMAGE), generator).to(dtype).contiguous(memory_format=memory_format)
        return x, (_random((batch, 1000), generator) / batch).to(dtype)


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet18", "basic", (2, 2, 2, 2)),
        Network("resnet34", "basic", (3, 4, 6, 3)),
        Network("resnet50", "bottleneck", (3, 4, 6, 3)),
        Network("resnet101", "bottleneck", (3, 4, 23, 3)),
        Network("wide_resnet50_2", "bottleneck", (3, 4, 6, 3), base_width=128),
        Network("resnext50_32x4d", "bottleneck", (3, 4, 6, 3), groups=32, base_width=4),
    )
}
_SAME_BLOCKS = {"resnet34": "resnet18", "resnet101": "resnet50"}
"""Networks whose distinct blocks are those of another; they bear its name."""
_QUICK = ("resnet18.1.identity", "resnet50.1.identity", "resnet50.3.projection")


def occurrences(network: str) -> dict[Case, int]:
    """A network's distinct blocks and how often each occurs."""
    return dict(NETWORKS[network].blocks(_SAME_BLOCKS.get(network)))


SUITES: dict[str, tuple[Case | Network, ...]] = {name: tuple(occurrences(name)) for name in NETWORKS}
SUITES["full"] = tuple(dict.fromkeys(case for name in NETWORKS for case in SUITES[name]))
SUITES["quick"] = tuple(case for case in SUITES["full"] if case.name in _QUICK)
SUITES["resnetv2_50"] = tuple(case for case, _ in Network("resnetv2_50", "preact bottleneck", (3, 4, 6, 3)).blocks())
"""The blocks of a pre-activation ResNet-50, the stride on the 3x3 as in timm."""
SUITES["networks"] = tuple(NETWORKS.values())
_SERVED = ("resnet18", "resnet50", "resnext50_32x4d")
SUITES["served"] = tuple(NETWORKS[name] for name in _SERVED)
"""Networks that are served often."""
SUITES["serving"] = (*(case for name in _SERVED for case in SUITES[name]), *SUITES["served"])
"""The same block by block and whole."""
SUITES["host"] = (
    Case("host.basic.identity", "basic", 16, 16, 4),
    Case("host.basic.projection", "basic", 16, 32, 4, 2),
    Case("host.bottleneck.identity", "bottleneck", 64, 16, 4),
    Case("host.bottleneck.projection", "bottleneck", 64, 32, 4, 2),
)
"""Blocks so small that at batch 1 their time is the host's: what calling them costs. What they call is counted on a CPU."""
