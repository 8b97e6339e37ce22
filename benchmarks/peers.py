"""What is timed against what: every peer does the same step of the same case, each on its own copy of the block.

A peer is a function from a `Setup` to a `Peer`, registered under the name that tables and plots show.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_res import explain, use_backend
from fused_res.benchmarks.cases import Case

MODES = {
    "train": "forward and backward, gradients to x and all parameters",
    "forward": "forward in training mode, saving what backward needs",
    "eval": "forward in evaluation mode, without gradients",
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
_PATH = re.compile(r"(/[^\s/:'\"]+){2,}")
Step = Callable[[int], list[Tensor]]


@dataclass
class Setup:
    """One case at one batch size, dtype and mode, with `sets` input sets that the peers share."""

    case: Case
    batch: int
    dtype: torch.dtype
    device: torch.device
    mode: str = "train"
    sets: int = 3
    _inputs: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")

    def module(self, layout: str) -> nn.Module:
        block = self.case.build(self.dtype, FORMATS[layout], self.device)
        return block.train(self.mode != "eval")

    def inputs(self, layout: str) -> list[tuple[Tensor, Tensor]]:
        """The input sets (x, incoming gradient) in a layout, the same values in each."""
        if layout not in self._inputs:
            sets = [self.case.input(self.batch, self.dtype, FORMATS[layout], self.device, seed) for seed in range(self.sets)]
            for x, _ in sets:
                x.requires_grad_(self.mode != "eval")
            self._inputs[layout] = sets
        return self._inputs[layout]

    def release(self) -> None:
        """Let go of the inputs."""
        self._inputs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class Peer:
    """`step(i)` runs input set i and returns [out], or in train mode [out, dx, gradients in the order of `parameters()`].

    `module` is None where the step is not the whole block, and its results are then not comparable. `layout` is that of x.
    """

    step: Step
    layout: str
    module: nn.Module | None = None
    forward: Callable[[int], Tensor] | None = None
    backend: str | None = None


REGISTRY: dict[str, Callable[[Setup], Peer]] = {}


def register(name: str) -> Callable:
    def add(make: Callable[[Setup], Peer]) -> Callable[[Setup], Peer]:
        REGISTRY[name] = make
        return make

    return add


def block_peer(
    setup: Setup, module: nn.Module, layout: str, call: Callable[[Tensor], Tensor] | None = None, backend: str | None = None
) -> Peer:
    """The step of a whole block: `call(x)`, by default `module(x)`, under `use_backend(backend)` where one is named."""
    inputs, parameters = setup.inputs(layout), list(module.parameters())
    call = module if call is None else call

    def forward(i: int) -> Tensor:
        with use_backend(backend) if backend else nullcontext(), torch.set_grad_enabled(setup.mode != "eval"):
            return call(inputs[i][0])

    def step(i: int) -> list[Tensor]:
        out = forward(i)
        if setup.mode != "train":
            return [out]
        return [out, *torch.autograd.grad(out, [inputs[i][0], *parameters], inputs[i][1])]

    return Peer(step, layout, module, forward, backend)


@register("eager NCHW")
def eager_nchw(setup: Setup) -> Peer:
    return block_peer(setup, setup.module("NCHW"), "NCHW", backend="eager")


@register("eager channels_last")
def eager_channels_last(setup: Setup) -> Peer:
    return block_peer(setup, setup.module("channels_last"), "channels_last", backend="eager")


@register("torch.compile")
def compiled(setup: Setup) -> Peer:
    """The eager block through torch.compile in its default mode, in channels_last."""
    torch.compiler.reset()
    module = setup.module("channels_last")
    return block_peer(setup, module, "channels_last", torch.compile(module, dynamic=False), backend="eager")


@register("bare convolutions")
def bare_convolutions(setup: Setup) -> Peer:
    """The block's convolutions alone, the projection's included, each on its own random input, in eager channels_last."""
    module = setup.module("channels_last")
    sets = setup.inputs("channels_last")
    probe = sets[0][0][:2]
    calls = []

    def record(conv: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> None:
        calls.append((conv, None if inputs[0] is probe else inputs[0].shape, out.shape))

    convs = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    hooks = [conv.register_forward_hook(record) for conv in convs]
    with use_backend("eager"), torch.no_grad():
        module(probe)
    for hook in hooks:
        hook.remove()

    def random(shape: tuple[int, ...]) -> Tensor:
        full = torch.randn((setup.batch, *shape[1:]), device=setup.device).to(setup.dtype)
        return full.contiguous(memory_format=torch.channels_last)

    needs_grad = setup.mode != "eval"
    operands = [
        (conv, None if shape is None else random(shape).relu_().requires_grad_(needs_grad), random(out))
        for conv, shape, out in calls
    ]

    def step(i: int) -> list[Tensor]:
        results = []
        for conv, inner, grad in operands:
            data = sets[i][0] if inner is None else inner
            with torch.set_grad_enabled(needs_grad):
                y = F.conv2d(data, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            results.append(y.detach())
            if setup.mode == "train":
                results += torch.autograd.grad(y, [data, conv.weight], grad)
        return results

    return Peer(step, "channels_last")


@register("fused_res")
def fused(setup: Setup) -> Peer:
    """The block as fused_res runs it by itself, in channels_last."""
    module = setup.module("channels_last")
    peer = block_peer(setup, module, "channels_last")
    row = explain(module, setup.inputs("channels_last")[0][0]).rows[0]
    peer.backend = row.backend if row.level is None else f"{row.backend}, {row.level}"
    return peer


def make(name: str, setup: Setup) -> Peer | str:
    """The named peer after one warm-up step, or why it cannot run here. Errors of fused_res itself are raised."""
    try:
        peer = REGISTRY[name](setup)
        peer.step(0)
    except Exception as error:
        if name == "fused_res":
            raise
        message = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {_PATH.sub('<path>', message)[:200]}"
    return peer
