"""Programs: what a schedule calls for one plan, recorded once and replayed as it was, without asking anything again.

The first call of a plan runs its schedule (`fused_res.block.forward` or `backward`) under a recorder, which sees every operator of
torch's and of ours and every launch of a Triton kernel. From that a function is written that calls the same, in the same order,
with the same numbers, and lets go of each tensor after its last use; views that are there already are not made again. What a
schedule decides in Python (who runs a convolution, which tile, whether something has to be copied) follows from the plan, from its
tensors' strides and from torch's switches, and those are a program's key. Where a decision follows from values that a kernel has
computed, nothing is recorded.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fused_res import backends, settings
from fused_res.internals import disable_modes, float32_precisions, storage

_BY_VALUES = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "fused_res::moments_finalize",
    "fused_res::pointwise_tail_backward_finalize",
}
"""Operators that return numbers, or sizes, that depend on values: the last two how many channels need another pass."""
_METHODS = {
    "aten::select.int": "select",
    "aten::unbind.int": "unbind",
}
"""Views that start elsewhere in memory than what they are made of, and take less time as methods."""
_MOST = 64
_NEVER = "never"
"""Stands where there can be no program."""


class _Refused(Exception):  # noqa: N818, no error
    """What was called cannot be replayed."""


class _Known(NamedTuple):
    """A tensor's name, and the names of all views of its storage by what they see of it; the first is made of no other."""

    name: str
    family: dict[tuple, str]


def _is_view(operator: object, source: object, result: object) -> bool:
    """Whether an operator that may return a view has done so."""
    if not getattr(operator, "is_view", False) or not isinstance(source, Tensor):
        return False
    made = result if isinstance(result, (list, tuple)) else (result,)
    return all(storage(tensor) == storage(source) for tensor in made)


def _sees(tensor: Tensor) -> tuple:
    if tensor.layout != torch.strided:  # in the library's own order, without strides
        return (tensor.layout,)
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


class _Recorder(TorchDispatchMode):
    """Writes down what is called inside, line by line. It keeps no tensor alive, so that a recorded call needs no more memory."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.refused = False
        self._known = WeakTensorKeyDictionary()
        self._count = 0
        self._inputs = len(inputs)
        self._constants: dict[str, object] = {}
        self._stream: Callable[[Tensor], int] | None = None
        # The text of a line, the names that it reads and makes, and whether it makes views alone.
        self._lines: list[tuple[str, list[str], list[str], bool]] = []
        for i, tensor in enumerate(inputs):
            if tensor is not None:
                self._known[tensor] = _Known(f"i{i}", {_sees(tensor): f"i{i}"})

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.name()
        result = operator(*args, **kwargs)
        self.refused = self.refused or name in _BY_VALUES
        if not self._is_known(operator, args, result):
            self._write(operator, args, kwargs, result, None if kwargs else _METHODS.get(name))
        return result

    def _is_known(self, operator: torch._ops.OpOverload, args: tuple, result: object) -> bool:
        """Whether the result is one of the arguments, or a view that there is already."""
        if operator._schema.is_mutable or not args or not isinstance(result, Tensor) or not isinstance(args[0], Tensor):
            return False
        source = self._known.get(args[0])
        if source is None or result is args[0]:
            return source is not None
        if not _is_view(operator, args[0], result):
            return False
        sees, (first, root) = _sees(result), next(iter(source.family.items()))
        name = source.family.get(sees)
        if name is None and (sees[0], sees[3]) == (first[0], first[3]):
            # Of all ways to a view the shortest: of the first of its family, wherever that starts.
            made: list[str] = []
            name = self._target(result, made, source.family)
            self._lines.append((f"{name} = {root}.as_strided({tuple(sees[1])}, {sees[2]})", [root], made, True))
        if name is not None:
            self._known[result] = _Known(name, source.family)
        return name is not None

    def launch(self, call: Callable, again: Callable) -> None:
        """A kernel's launch, whose insides are its own; `again` says how it is launched with other tensors."""
        with disable_modes():
            function, args, kwargs, stream = again(call())
        self._stream = self._stream or stream
        self._write(function, args, kwargs, None, None, on_stream=stream is not None)

    def _write(
        self, call: Callable, args: Sequence, kwargs: dict, result: object, method: str | None, on_stream: bool = False
    ) -> None:
        if self.refused:
            return
        read: list[str] = []
        made: list[str] = []
        try:
            arguments = [self._expression(value, read, on_stream) for value in args]
            keywords = [f"{name}={self._expression(value, read)}" for name, value in kwargs.items()]
            keywords += ["stream=stream"] if on_stream else []
        except _Refused:
            self.refused = True
            return
        if method is None:
            function = self._constant(call)
        else:
            function, arguments = f"{arguments[0]}.{method}", arguments[1:]
        text = f"{function}({', '.join([*arguments, *keywords])})"
        family = self._known[args[0]].family if _is_view(call, args[0] if args else None, result) else None
        self._lines.append((f"{self._target(result, made, family)} = {text}", read, made, family is not None))

    def _constant(self, value: object) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _expression(self, value: object, read: list[str], addresses: bool = False) -> str:
        if isinstance(value, Tensor):
            known = self._known.get(value)
            if known is None:
                raise _Refused  # a tensor from elsewhere
            read.append(known.name)
            return f"{known.name}.data_ptr()" if addresses else known.name
        if isinstance(value, list):
            return f"[{', '.join([self._expression(v, read, addresses) for v in value])}]"
        if isinstance(value, tuple):
            inside = ", ".join([self._expression(v, read, addresses) for v in value])
            plain = type(value) is tuple or type(value) is torch.Size
            return f"({inside}{',' if len(value) == 1 else ''})" if plain else f"{self._constant(type(value))}({inside})"
        return repr(value) if value is None or type(value) in (bool, int, str) else self._constant(value)

    def _target(self, value: object, made: list[str], family: dict | None) -> str:
        if isinstance(value, Tensor):
            known = self._known.get(value)
            if known is None:
                known = self._known[value] = _Known(f"t{self._count}", {} if family is None else family)
                known.family[_sees(value)] = known.name
                self._count += 1
            made.append(known.name)
            return known.name
        if isinstance(value, (list, tuple)) and value:
            return f"({', '.join([self._target(v, made, family) for v in value])},)"
        return "_"

    def function(self, results: object) -> Callable | None:
        """The function of the inputs that calls what was called, and returns what stands for these results."""
        if self.refused:
            return None
        read: list[str] = []
        try:
            end = self._expression(results, read)
        except _Refused:
            return None
        later, body = set(read), [f"    return {end}"]
        for text, reads, made, is_view in reversed(self._lines):
            if is_view and later.isdisjoint(made):
                continue
            last = sorted({name for name in (*reads, *made) if name not in later and name[0] == "t"})
            body += [f"    del {', '.join(last)}"] if last else []
            body.append(f"    {text}")
            later.update(reads)
        head = f"def program({', '.join(f'i{n}' for n in range(self._inputs))}):"
        first = [] if self._stream is None else [f"    stream = {self._constant(self._stream)}(i0)"]
        source = "\n".join([head, *first, *reversed(body)])
        space = dict(self._constants)
        exec(compile(source, "<a program of fused_res>", "exec"), space)
        return space.pop("program")  # which then is in no cycle with what it calls


def switches(device_type: str) -> tuple:
    """What decides who runs a convolution, and how, beside a plan and its tensors' strides."""
    return *float32_precisions(device_type), torch.are_deterministic_algorithms_enabled(), settings.convolutions()


def run(programs: dict, key: tuple, schedule: Callable, inputs: Sequence[Tensor | None], backend: str) -> object:
    """`schedule(*inputs)`, or what was recorded of it under this key.

    Args:
        programs: those of one plan.
        schedule: returns tensors, None, and lists and tuples of them. It reads no tensors but its arguments.
        inputs: plain tensors on one device.
        backend: whose kernels run.
    """
    program = programs.get(key)
    if program is None:
        return _record(programs, key, schedule, inputs, backend)
    return schedule(*inputs) if program is _NEVER else replay(program, inputs)


def recorded(programs: dict, key: tuple) -> Callable | None:
    """What was recorded under this key, or None where nothing was, or could be."""
    program = programs.get(key)
    return None if program is _NEVER else program


def replay(program: Callable, inputs: Sequence[Tensor | None]) -> object:
    """What was recorded, with other tensors: on their GPU."""
    if not inputs[0].is_cuda:
        return program(*inputs)
    with torch.cuda.device_of(inputs[0]):
        return program(*inputs)


def _record(programs: dict, key: tuple, schedule: Callable, inputs: Sequence[Tensor | None], backend: str) -> object:
    given = [id(tensor) for tensor in inputs if tensor is not None]
    if len(set(given)) < len(given):  # with one tensor in two places, which of them is meant cannot be told
        return schedule(*inputs)
    recorder = _Recorder(inputs)
    with recorder, backends.watched(backend, recorder.launch):
        found = schedule(*inputs)
    if len(programs) >= _MOST:
        programs.clear()
    programs[key] = recorder.function(found) or _NEVER
    return found
