"""Running a kernel: on the current stream, through whoever watches, or only noted."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from fused_res.kernels.tiling import Tile, alignment, cdiv


class Launch(NamedTuple):
    """A kernel with everything it is launched with."""

    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]
    warps: int


class _Local(threading.local):
    """Of this thread: who launches in the kernel's place, and the list that launches are noted in."""

    call: Callable | None = None
    noted: list[Launch] | None = None


_local = _Local()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, in this thread, nothing is launched, only noted in the list."""
    before, _local.noted = _local.noted, []
    try:
        yield _local.noted
    finally:
        _local.noted = before


class Direct(NamedTuple):
    """A launch as the driver takes it: its function, blocks of so many threads and bytes of shared memory, and every parameter that
    the kernel has, as its type in the kernel's signature and its value. A pointer without a tensor is 0."""

    function: int
    programs: int
    threads: int
    shared: int
    parameters: tuple[tuple[str, Any], ...]


class Again(NamedTuple):
    """How a kernel is run once more, with other tensors in their places: of the same strides, dtypes and alignment to 16 bytes.

    stream: None, or what returns a tensor's current stream. Where there is that, the function takes it as the keyword `stream`, and
    addresses in place of tensors, which spares it to ask for either. direct: the same for whoever calls the driver, or None where
    Triton does more than that.
    """

    function: Callable
    arguments: tuple
    keywords: dict[str, Any]
    stream: Callable[[Tensor], int] | None = None
    direct: Direct | None = None


@contextmanager
def watching(call: Callable) -> Iterator[None]:
    """Inside, in this thread, launches go through `call(launch, again)`, which is to call both.

    `launch()` runs the kernel on the current device; `again(what launch returned)` is an `Again`.
    """
    before, _local.call = _local.call, call
    try:
        yield
    finally:
        _local.call = before


def _tensors(arguments: tuple) -> Iterator[Tensor]:
    """The tensors among arguments and tuples of them."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def launch(kernel: Any, programs: int, *arguments: Any, warps: int, **constants: Any) -> None:
    """Run the kernel on the current stream of the device of the first tensor among the arguments."""
    if _local.noted is not None:
        _local.noted.append(Launch(kernel, programs, arguments, constants, warps))
        return
    with torch.cuda.device_of(next(_tensors(arguments))):
        run = kernel[(programs,)]
        if _local.call is None:
            run(*arguments, **constants, num_warps=warps)
            return
        found = Launch(kernel, programs, arguments, constants, warps)
        _local.call(lambda: run(*arguments, **constants, num_warps=warps), lambda compiled: _again(found, compiled))


def _current_stream(tensor: Tensor) -> int:
    return driver.active.get_current_stream(tensor.get_device())


def _again(launch: Launch, compiled: Any) -> Again:
    """Of a compiled kernel the launcher itself, which asks for nothing that decides between kernels."""
    kernel, programs, arguments, constants, warps = launch
    if compiled is None:  # in the interpreter
        return Again(kernel[(programs,)], arguments, constants | {"num_warps": warps})
    bound = kernel.signature.bind(*arguments, **constants)
    bound.apply_defaults()
    values = tuple(bound.arguments.values())
    return Again(compiled[(programs, 1, 1)], values, {}, _current_stream, _direct(compiled, programs, values))


def is_hooked() -> bool:
    """Whether somebody asked Triton to be told of launches, as its profiler does."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


_LAST = (3, 9)
"""The last version of Triton whose way of handing on parameters is known: `tests/fake_gpu.py blocks` compares it with `Direct`."""


def _direct(compiled: Any, programs: int, values: tuple) -> Direct | None:
    if tuple(map(int, triton.__version__.split(".")[:2])) > _LAST:
        return None
    made = compiled.metadata
    special = made.num_ctas != 1 or made.launch_cooperative_grid or made.launch_pdl
    if special or made.global_scratch_size or made.profile_scratch_size or getattr(made, "instrumentation_mode", ""):
        return None
    scratch = ("*i8", None), ("*i8", None)  # which every kernel has behind its own
    parameters = (*_parameters(compiled.src.signature.values(), values), *scratch)
    return Direct(compiled.function, programs, 32 * made.num_warps, made.shared, parameters)


def _parameters(types: Iterable, values: Iterable) -> Iterator[tuple[str, Any]]:
    """The types and values that are not constants, those of tuples one by one."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value)
        elif kind != "constexpr":
            yield kind, value


def launch_tiles(kernel: Any, tiles: int, block: Tile, channels: int, *arguments: Any, **constants: Any) -> None:
    """Run the kernel over tiles of rows and blocks of channels, with the constants that follow from the block."""
    programs = tiles * cdiv(channels, block.channels)
    constants |= {"ALIGN": alignment(channels), "BLOCK_P": block.rows, "BLOCK_C": block.channels}
    launch(kernel, programs, *arguments, warps=block.warps, **constants)
