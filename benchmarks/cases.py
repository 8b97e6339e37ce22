"""The blocks that are measured: one table, shared by the benchmark and its tests."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_res

BATCHES = {"cpu": (4,), "cuda": (64, 256)}
"""Default batch sizes of a device type."""


@dataclass(frozen=True)
class Case:
    """One residual block at one input size, as it stands in a ResNet at 224 x 224. `size` is the input's height and width."""

    name: str
    kind: str
    inplanes: int
    planes: int
    size: int
    stride: int = 1

    @property
    def block(self) -> type[nn.Module]:
        return {"basic": fused_res.BasicBlock, "bottleneck": fused_res.Bottleneck}[self.kind]

    @property
    def outplanes(self) -> int:
        return self.planes * {"basic": 1, "bottleneck": 4}[self.kind]

    @property
    def projection(self) -> bool:
        return self.stride != 1 or self.inplanes != self.outplanes

    @property
    def output_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    def build(self, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device, seed: int = 0) -> nn.Module:
        """The block in training mode: convolutions in `dtype`, BN in fp32 as under autocast (fp64 for fp64), every value random.

        One seed gives the same values, up to rounding, in every dtype and layout.
        """
        generator = torch.Generator().manual_seed(seed)
        downsample = None
        if self.projection:
            conv = nn.Conv2d(self.inplanes, self.outplanes, 1, self.stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(self.outplanes))
        block = self.block(self.inplanes, self.planes, self.stride, downsample).double()
        with torch.no_grad():
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    fan_in = module.weight[0].numel()
                    module.weight.copy_(torch.randn(module.weight.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
                elif isinstance(module, nn.BatchNorm2d):
                    for tensor, low, high in (
                        (module.weight, 0.5, 1.5),
                        (module.bias, -0.5, 0.5),
                        (module.running_mean, -0.5, 0.5),
                        (module.running_var, 0.5, 1.5),
                    ):
                        uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                        tensor.copy_(low + (high - low) * uniform)
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
            elif isinstance(module, nn.BatchNorm2d):
                module.to(torch.promote_types(dtype, torch.float32))
        return block.to(device, memory_format=memory_format)

    def input(
        self, batch: int, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """A block input (non-negative, as after a ReLU) and an incoming gradient, made on the device from the seed."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(batch, self.inplanes, self.size, self.size, generator=generator, device=device).relu_()
        shape = batch, self.outplanes, self.output_size, self.output_size
        grad = torch.randn(shape, generator=generator, device=device)
        return tuple(tensor.to(dtype).contiguous(memory_format=memory_format) for tensor in (x, grad))


def _stages(kind: str, prefix: str) -> tuple[Case, ...]:
    """First (where it projects) and further blocks of the four stages of ResNet-18 (basic) or ResNet-50 (bottleneck)."""
    expansion = {"basic": 1, "bottleneck": 4}[kind]
    cases, inplanes, size = [], 64, 56
    for stage, planes in enumerate((64, 128, 256, 512), start=1):
        stride = 1 if stage == 1 else 2
        first = Case(f"{prefix}.{stage}.projection", kind, inplanes, planes, size, stride)
        if first.projection:
            cases.append(first)
        inplanes, size = planes * expansion, first.output_size
        cases.append(Case(f"{prefix}.{stage}.identity", kind, inplanes, planes, size))
    return tuple(cases)


_RESNET18 = _stages("basic", "resnet18")
_RESNET50 = _stages("bottleneck", "resnet50")
_QUICK = ("resnet18.1.identity", "resnet50.1.identity", "resnet50.3.projection")

SUITES: dict[str, tuple[Case, ...]] = {
    "quick": tuple(case for case in _RESNET18 + _RESNET50 if case.name in _QUICK),
    "resnet18": _RESNET18,
    "resnet50": _RESNET50,
}
