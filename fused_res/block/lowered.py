"""A recorded call as the compiled library runs it, from its first operator to its last (`csrc/program.cpp`).

On small tensors Python's call of an operator takes longer than the operator. On a GPU that holds for large ones, too: the host only
has to enqueue their kernels.
"""

import struct
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_res.backends import native
from fused_res.block.noted import Instead, Kept, Name, Noted, names_in, written
from fused_res.internals import disable_modes

_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
"""In the order of their numbers in C++."""
_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
"""Their numbers there."""
_DEVICES = ("cpu", "cuda", "meta")
_VIEW, _CALL, _LAUNCH = range(3)
_NONE, _PLAIN, _PLAINS, _TENSOR, _TENSORS = range(5)
_INTEGER, _FLAG, _NUMBER, _MEMORY_FORMAT, _DTYPE, _DEVICE = range(6)
_NO_TENSOR, _ONE, _PERHAPS_ONE = range(3)
_NOWHERE = -1
_INTEGERS = {f"{sign}{bits}" for sign in "iu" for bits in (1, 8, 16, 32, 64)}
"""Types of kernels' parameters, which are handed on as the bits of a 64-bit integer."""
_FAILED = "program: an operator of torch's failed"
"""What the library's error says; csrc/program.cpp has the same words."""


def _is_torchs(error: RuntimeError) -> bool:
    return _FAILED in str(error)


class _Unknown(Exception):  # noqa: N818, no error
    """What the library has no way to call."""


class _Code:
    """A program in numbers, of which a tensor is the place where it is kept.

    on_cpu: whether our operators are the CPU's kernels.
    """

    def __init__(self, inputs: Sequence[Name], on_cpu: bool) -> None:
        self.places = {name: i for i, name in enumerate(inputs)}
        self._on_cpu = on_cpu
        self._inputs = set(inputs)  # and views of them
        self._writes_inputs = False
        """Whether an operator has written to an input: no other that may fail is called after that."""
        self.code: list[int] = []
        self.steps = 0
        self.numbers: list[float] = []
        self.names: list[str] = []

    def views_of_inputs(self) -> set[Name]:
        return {name for name in self._inputs if name.is_made()}

    def add(self, kept: Kept) -> None:
        step, last = kept
        self.steps += 1
        if step.direct is not None:
            self._launch(step, last)
            return
        if step.views is None:
            self._call(step, last)
            return
        views = [view for view in step.views if view.name not in last]
        self.steps += len(views) - 1
        for view in views:
            source = self._read(view.source, Counter(last if view is views[-1] else ()))
            shape = [len(view.shape), *view.shape, len(view.strides), *view.strides, view.offset]
            self.code += [_VIEW, *source, self._new(view.name), *shape]
            if view.source in self._inputs:
                self._inputs.add(view.name)

    def _launch(self, step: Noted, last: frozenset[Name]) -> None:
        function, programs, threads, shared, parameters = step.direct
        found = [number for kind, value in parameters for number in self._parameter(kind, value)]
        released = [self.places[name] for name in last]
        self.code += [_LAUNCH, function, programs, threads, shared, len(parameters), *found, len(released), *released]

    def _parameter(self, kind: str, value: object) -> list[int]:
        if isinstance(value, Name):
            return [1, self.places[value]]
        if kind[0] == "*" and value is None:
            return [0, 0]
        if kind in _INTEGERS and type(value) in (int, bool):
            return [0, value if value < 2**63 else value - 2**64]
        if kind in ("fp32", "fp64") and type(value) in (int, float):
            try:
                bits = struct.pack("<f" if kind == "fp32" else "<d", value)
            except OverflowError:
                raise _Unknown from None
            return [0, *struct.unpack("<q", bits.ljust(8, b"\0"))]
        raise _Unknown

    def _call(self, step: Noted, last: frozenset[Name]) -> None:
        schema = getattr(step.call, "_schema", None)
        if schema is None:
            raise _Unknown
        arguments, results = [len(schema.arguments)], [len(schema.returns)]
        ends = Counter({name: count for name, count in Counter(step.reads()).items() if name in last})
        for i, argument in enumerate(schema.arguments):
            value = step.args[i] if i < len(step.args) else step.kwargs.get(argument.name, argument.default_value)
            arguments += self._argument(value, str(argument.real_type), ends)
        found = step.result if len(schema.returns) > 1 else (step.result,)
        for value, returned in zip(found, schema.returns, strict=False):
            results += self._result(value, str(returned.real_type), last)
        name = schema.name.removeprefix("fused_res::")
        own = self._on_cpu and name != schema.name
        if (own and not native.has_kernel(name)) or (self._writes_inputs and not own):
            raise _Unknown
        self._writes_inputs = self._writes_inputs or not self._inputs.isdisjoint(_written(step))
        if step.call.is_view and not self._inputs.isdisjoint(step.reads()):
            self._inputs.update(step.makes())
        self.code += [_CALL, len(self.names), *arguments, *results]
        self.names.append(name if own else f"{schema.name}.{schema.overload_name}")

    def _read(self, name: Name, last: Counter[Name]) -> list[int]:
        """Its place, and whether this is the last time: `last` has how often it is read in this step, if nobody reads it later."""
        if not isinstance(name, Name):  # a number in a tensor's place
            raise _Unknown
        last[name] -= 1
        return [self.places[name], int(last[name] == 0)]

    def _new(self, name: Name) -> int:
        return self.places.setdefault(name, len(self.places))

    def _argument(self, value: object, kind: str, last: Counter[Name]) -> list[int]:
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
        if value is None and optional:
            return [_NONE, 1]
        if kind == "Tensor":
            return [_TENSOR, int(optional), *self._read(value, last)]
        if kind == "List[Tensor]":
            places = [number for name in value for number in self._read(name, last)]
            return [_TENSORS, int(optional), len(value), *places]
        if kind.startswith("List["):
            items = [number for item in value for number in self._plain(item, kind[len("List[") : -1])]
            return [_PLAINS, int(optional), len(value), *items]
        return [_PLAIN, int(optional), *self._plain(value, kind)]

    def _plain(self, value: object, kind: str) -> list[int]:
        if kind in ("int", "SymInt") and type(value) is int:
            return [_INTEGER, value]
        if kind == "bool" and type(value) is bool:
            return [_FLAG, int(value)]
        if kind == "float" and type(value) in (int, float):
            self.numbers.append(float(value))
            return [_NUMBER, len(self.numbers) - 1]
        if kind == "MemoryFormat":
            return [_MEMORY_FORMAT, value if type(value) is int else _MEMORY_FORMATS.index(value)]
        if kind == "ScalarType" and (value if type(value) is int else _DTYPES.get(value)) in _DTYPES.values():
            return [_DTYPE, value if type(value) is int else _DTYPES[value]]
        if kind == "Device" and value.type in _DEVICES:
            return [_DEVICE, _DEVICES.index(value.type), 0 if value.index is None else 1 + value.index]
        raise _Unknown

    def _result(self, value: object, kind: str, last: frozenset[Name]) -> list[int]:
        if kind not in ("Tensor", "Optional[Tensor]"):
            if names_in(value):
                raise _Unknown
            return [_NO_TENSOR, _NOWHERE]
        # What has a name already is the same tensor, which was written to.
        goes = isinstance(value, Name) and value not in self.places and value not in last
        return [_ONE if kind == "Tensor" else _PERHAPS_ONE, self._new(value) if goes else _NOWHERE]


def _written(step: Noted) -> list[Name]:
    """The names of tensors that an operator writes to."""
    schema = step.call._schema
    values = {argument.name: value for argument, value in zip(schema.arguments, step.args, strict=False)} | step.kwargs
    changed = (argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write)
    return [name for argument in changed for name in names_in(values.get(argument))]


def lowered(
    steps: Sequence[Kept],
    inputs: Sequence[Tensor | None],
    results: object,
    stream: Callable[[Tensor], int] | None,
    observed: Callable[[], bool],
) -> Callable | None:
    """As `noted.written`, run by the library; None where a step is none of those that it can call.

    Where an operator of torch's fails, Python makes all calls once more: the stable ABI takes the error's type and words away. So
    nothing may have been written to an input by then. Of operators that is made sure of here; kernels that are launched write to
    running statistics alone, and a schedule moves these when all else is done.

    Args:
        inputs: those of the recorded call.
        stream: as for `written`.
        observed: whether somebody looks on: then Python makes the calls, so that each is seen.
    """
    given = [Name(f"i{i}") for i, tensor in enumerate(inputs) if tensor is not None]
    outputs = list(dict.fromkeys([name for name in names_in(results) if name.is_made()]))
    code = _Code(given, next(tensor.device.type == "cpu" for tensor in inputs if tensor is not None))
    try:
        for kept in steps:
            code.add(kept)
    except _Unknown:
        return None
    if not code.views_of_inputs().isdisjoint(outputs):  # which autograd and inference mode tell from other tensors
        return None
    ends = [number for name in outputs for number in (code.places[name], 1)]
    numbers = [len(given), len(code.places), code.steps, *code.code, len(outputs), *ends]
    with disable_modes():
        made = torch.ops.fused_res.make_program(" ".join(code.names), numbers, code.numbers)
    arguments = (made, given) if stream is None else (made, given, Name("stream"))
    whole = Noted(torch.ops.fused_res.run_program.default, arguments, {}, tuple(outputs))
    instead = Instead(written(steps, len(inputs), results, stream), observed, _is_torchs)
    function = written([Kept(whole, frozenset())], len(inputs), results, stream, instead)
    weakref.finalize(function, native.free_program, made).atexit = False
    if stream is None:
        function.number = made
    return function


def number_of(program: Callable) -> int | None:
    """By which the library knows what it runs for this function of tensors on a CPU, as long as that lives; None if Python does."""
    return getattr(program, "number", None)


def run_programs(programs: Sequence[Callable], counts: Sequence[int], x: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
    """Programs of one result, all of which have a number, one after the other.

    Each gets what the one before has returned, x the first, and so many of the tensors as `counts` says.

    Returns:
        None where an operator of torch's failed, which is to be called by Python once more, for its error's type and words.
    """
    try:
        return torch.ops.fused_res.run_programs.default([p.number for p in programs], counts, x, tensors)
    except RuntimeError as error:
        if not _is_torchs(error):
            raise
    return None
