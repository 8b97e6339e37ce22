"""What is timed against what: every peer does the same step of the same case, each on its own copy of the block.

A peer is a function from a `Setup` to a `Peer`, registered under the name that tables and plots show. Peers that need other
packages are in `foreign` and `cudnn_graphs`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_res import explain, fuse, internals, planner, use_backend
from fused_res.benchmarks.cases import Case, Network

MODES = {
    "train": "forward and backward, gradients to x and all parameters",
    "forward": "forward in training mode, saving what backward needs",
    "eval": "forward in evaluation mode, without gradients",
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
OURS, BARE = "fused_res", "bare convolutions"
_PATH = re.compile(r"(/[^\s/:'\"]+){2,}")


class CannotRunError(RuntimeError):
    """A peer cannot run a case as it is; the message says why."""


class DeviceLostError(RuntimeError):
    """A peer has left the GPU's context in a state in which nothing runs any more in this process."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer, self.reason = peer, reason


class StepFailedError(RuntimeError):
    """A peer that ran before has failed in a later step; the GPU still works."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer, self.reason = peer, reason


class Refusal(NamedTuple):
    """Why a peer gives no time. failed: it is ours, and ought to have run, or to have computed something else."""

    reason: str
    failed: bool = False


@dataclass
class Setup:
    """One case at one batch size, dtype and mode, with `sets` input sets that the peers share."""

    case: Case | Network
    batch: int
    dtype: torch.dtype
    device: torch.device
    mode: str = "train"
    sets: int = 3
    _inputs: dict = field(default_factory=dict, repr=False)
    _forgotten: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")

    @property
    def input_gradient(self) -> bool:
        """Whether x wants a gradient: a block's in training does, a network's images do not."""
        return self.mode != "eval" and not self.case.is_network

    def module(self, layout: str) -> nn.Module:
        block = self.case.build(self.dtype, FORMATS[layout], self.device)
        return block.train(self.mode != "eval")

    def inputs(self, layout: str) -> list[tuple[Tensor, Tensor]]:
        """The input sets (x, incoming gradient) in a layout, the same values in each."""
        if layout not in self._inputs:
            sets = [self.case.input(self.batch, self.dtype, FORMATS[layout], self.device, seed) for seed in range(self.sets)]
            for x, _ in sets:
                x.requires_grad_(self.input_gradient)
            self._inputs[layout] = sets
        return self._inputs[layout]

    def forget_compiled(self) -> None:
        """Forget the code that was compiled for other cases, but never that of another peer of this one."""
        if not self._forgotten:
            torch.compiler.reset()
            self._forgotten = True

    def release(self) -> None:
        """Let go of the inputs."""
        self._inputs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class Peer:
    """`step(i)` runs input set i and returns tensors by name: "out", in train mode also "d x" and "d <parameter>".

    `module` is None where there is none in torch, `comparable` False where the step is not the whole block. `layout` is that
    of x. `capturable` says whether the step may be captured in a CUDA graph.
    """

    step: Callable[[int], dict[str, Tensor]]
    layout: str
    module: nn.Module | None = None
    forward: Callable[[int], Tensor] | None = None
    backend: str | None = None
    comparable: bool = True
    capturable: bool = True


class Entry(NamedTuple):
    """How a peer is made, and where it is timed unless it is asked for by name."""

    make: Callable[[Setup], Peer]
    devices: tuple[str, ...]
    modes: tuple[str, ...]


REGISTRY: dict[str, Entry] = {}


def register(name: str, devices: tuple[str, ...] = ("cpu", "cuda"), modes: tuple[str, ...] = tuple(MODES)) -> Callable:
    def add(make: Callable[[Setup], Peer]) -> Callable[[Setup], Peer]:
        REGISTRY[name] = Entry(make, devices, modes)
        return make

    return add


def usual(device: torch.device, mode: str) -> tuple[str, ...]:
    """The peers that are timed on a device in a mode unless others are asked for."""
    return tuple(name for name, entry in REGISTRY.items() if device.type in entry.devices and mode in entry.modes)


def level_peer(level: str) -> str:
    """The name of fused_res at a forced level."""
    return f"{OURS} {level}"


def is_ours(name: str) -> bool:
    return name == OURS or name.startswith(f"{OURS} ")


def block_peer(
    setup: Setup,
    module: nn.Module,
    layout: str,
    call: Callable[[Tensor], Tensor] | None = None,
    backend: str | None = None,
    within: Callable[[], AbstractContextManager] = nullcontext,
) -> Peer:
    """The step of a whole block: `call(x)`, by default `module(x)`, in the context `within()`.

    `backend` is what a row says ran.
    """
    inputs, names = setup.inputs(layout), [name for name, _ in module.named_parameters()]
    call = module if call is None else call

    def forward(i: int) -> Tensor:
        with within(), torch.set_grad_enabled(setup.mode != "eval"):
            return call(inputs[i][0])

    def step(i: int) -> dict[str, Tensor]:
        out = forward(i)
        if setup.mode != "train":
            return {"out": out}
        x, grad = inputs[i]
        wanted = {"x": x} if setup.input_gradient else {}
        wanted |= dict(zip(names, module.parameters(), strict=True))
        found = torch.autograd.grad(out, list(wanted.values()), grad)
        return {"out": out, **{f"d {name}": value for name, value in zip(wanted, found, strict=True)}}

    return Peer(step, layout, module, forward, backend)


def eager() -> AbstractContextManager:
    return use_backend(planner.EAGER)


@register("eager NCHW")
def eager_nchw(setup: Setup) -> Peer:
    return block_peer(setup, setup.module("NCHW"), "NCHW", backend="eager", within=eager)


@register("eager channels_last")
def eager_channels_last(setup: Setup) -> Peer:
    return block_peer(setup, setup.module("channels_last"), "channels_last", backend="eager", within=eager)


def _compiled(setup: Setup, within: Callable[[], AbstractContextManager] = nullcontext, freezing: bool = False) -> Peer:
    if freezing and setup.mode != "eval":
        raise CannotRunError("weights are frozen in evaluation mode alone")
    setup.forget_compiled()
    module = setup.module("channels_last")
    peer = block_peer(setup, module, "channels_last", torch.compile(module, dynamic=False), "inductor", within)
    if freezing:
        with internals.freezing():
            peer.step(0)
    return peer


@register("torch.compile")
def compiled(setup: Setup) -> Peer:
    """The eager block through torch.compile in its default mode, in channels_last."""
    return _compiled(setup, eager)


@register("torch.compile freezing", devices=())
def compiled_freezing(setup: Setup) -> Peer:
    """The same with weights as constants: BNs are folded into them, and they are packed ahead."""
    return _compiled(setup, eager, freezing=True)


@register(f"{OURS} compiled", devices=())
def fused_compiled(setup: Setup) -> Peer:
    """fused_res through torch.compile."""
    return _compiled(setup)


@register(f"{OURS} compiled freezing", devices=())
def fused_compiled_freezing(setup: Setup) -> Peer:
    return _compiled(setup, freezing=True)


@register("torch.compile max-autotune", devices=("cuda",))
def compiled_max_autotune(setup: Setup) -> Peer:
    """The same with max-autotune, which also replays CUDA graphs."""
    setup.forget_compiled()
    module = setup.module("channels_last")
    optimised = torch.compile(module, dynamic=False, mode="max-autotune")

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return optimised(x)

    peer = block_peer(setup, module, "channels_last", call, "inductor", eager)
    peer.capturable = False
    return peer


@register(BARE)
def bare_convolutions(setup: Setup) -> Peer:
    """The convolutions alone, projections included, each on its own random input, in eager channels_last."""
    module = setup.module("channels_last")
    sets = setup.inputs("channels_last")
    probe = sets[0][0][:2]
    calls = []

    def record(conv: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> None:
        calls.append((conv, None if inputs[0] is probe else inputs[0].shape, out.shape))

    hooks = [child.register_forward_hook(record) for child in module.modules() if isinstance(child, nn.Conv2d)]
    with eager(), torch.no_grad():
        module(probe)
    for hook in hooks:
        hook.remove()

    def random(shape: tuple[int, ...]) -> Tensor:
        full = torch.randn((setup.batch, *shape[1:]), device=setup.device).to(setup.dtype)
        return full.contiguous(memory_format=torch.channels_last)

    training = setup.mode != "eval"
    operands = [
        (conv, None if shape is None else random(shape).relu_().requires_grad_(training), random(out)) for conv, shape, out in calls
    ]

    def step(i: int) -> dict[str, Tensor]:
        results = {}
        for n, (conv, inner, grad) in enumerate(operands):
            data = sets[i][0] if inner is None else inner
            with torch.set_grad_enabled(training):
                y = F.conv2d(data, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
            results[f"y{n}"] = y.detach()
            if setup.mode == "train":
                wanted = [tensor for tensor in (data, conv.weight) if tensor.requires_grad]
                for k, value in enumerate(torch.autograd.grad(y, wanted, grad)):
                    results[f"d{k} y{n}"] = value
        return results

    return Peer(step, "channels_last", comparable=False)


def _ran_as(setup: Setup, module: nn.Module) -> list[tuple[str, str | None]]:
    """Backend and level of every block, in the order of the calls."""
    rows = explain(module, setup.inputs("channels_last")[0][0]).rows
    return list(dict.fromkeys((row.backend, row.level) for row in rows))


def _said(ran: Iterable[tuple[str, str | None]]) -> str:
    return "; ".join(backend if level is None else f"{backend}, {level}" for backend, level in ran)


@register(OURS)
def fused(setup: Setup) -> Peer:
    """The block as fused_res runs it by itself, in channels_last, or the network that `fuse` was called with."""
    module = setup.module("channels_last")
    module = fuse(module) if setup.case.is_network else module
    return block_peer(setup, module, "channels_last", backend=_said(_ran_as(setup, module)))


def _forced(level: str) -> Callable[[Setup], Peer]:
    def make(setup: Setup) -> Peer:
        """The block at a forced level, on the backend that fused_res chooses by itself."""
        module = setup.module("channels_last")
        backend = planner.resolve("auto", setup.device, setup.dtype)

        def within() -> AbstractContextManager:
            return use_backend(backend, level)

        with within():
            ran = _ran_as(setup, module)
        other = [pair for pair in ran if pair != (backend, level)]
        if other:
            raise CannotRunError(f"asked for {level}, it runs as {_said(other)}")
        return block_peer(setup, module, "channels_last", backend=_said(ran), within=within)

    return make


for _level in planner.LEVELS:
    register(level_peer(_level), devices=())(_forced(_level))


def first_line(error: Exception) -> str:
    """The first telling line of an error's message, without paths; and its type, where the message is not ours."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("Exception from")]
    message = _PATH.sub("<path>", next(iter(lines), ""))[:200]
    return message if isinstance(error, CannotRunError) else f"{type(error).__name__}: {message}"


def is_lost(device: torch.device) -> bool:
    """Whether nothing runs on the device any more in this process, after an error."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@contextmanager
def blamed(name: str, device: torch.device) -> Iterator[None]:
    """Whatever goes wrong inside is the named peer's.

    Raises:
        DeviceLostError: and has taken the GPU's context with it.
        StepFailedError: and has not.
    """
    try:
        yield
    except (DeviceLostError, StepFailedError):
        raise
    except Exception as error:
        kind = DeviceLostError if is_lost(device) else StepFailedError
        raise kind(name, first_line(error)) from error


def make(name: str, setup: Setup) -> Peer | Refusal:
    """The named peer after one warm-up step, or why it cannot run here.

    Raises:
        DeviceLostError: its error has taken the GPU's context with it.
    """
    try:
        with blamed(name, setup.device):
            peer = REGISTRY[name].make(setup)
            peer.step(0)
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
    except StepFailedError as error:
        return Refusal(error.reason, is_ours(name) and not isinstance(error.__cause__, CannotRunError))
    return peer
