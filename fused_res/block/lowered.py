"""A recorded call as the compiled library runs it, from its first operator to its last (`csrc/cpu/program.cpp`).

On a CPU an operator on few elements takes less time than Python needs to call it.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fused_res.block.recorded import Kept, Name, Step, names_in, written
from fused_res.internals import is_profiled

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
_VIEW, _CALL = range(2)
_NONE, _PLAIN, _PLAINS, _TENSOR, _TENSORS = range(5)
_INTEGER, _FLAG, _NUMBER, _MEMORY_FORMAT, _DTYPE, _CPU = range(6)
_NO_TENSOR, _ONE, _PERHAPS_ONE = range(3)
_NOWHERE = -1


class _Unknown(Exception):  # noqa: N818, no error
    """What the library has no way to call."""


class _Code:
    """A program in numbers, of which a tensor is the place where it is kept."""

    def __init__(self, inputs: Sequence[Name]) -> None:
        self.places = {name: i for i, name in enumerate(inputs)}
        self.code: list[int] = []
        self.steps = 0
        self.numbers: list[float] = []
        self.names: list[str] = []

    def add(self, kept: Kept) -> None:
        step, last = kept
        if step.views is None:
            self._call(step, last)
            return
        for view in step.views:
            source = self._read(view.source, last if view is step.views[-1] else ())
            shape = [len(view.shape), *view.shape, len(view.strides), *view.strides, view.offset]
            self.code += [_VIEW, *source, self._new(view.name), *shape]
            self.steps += 1

    def _call(self, step: Step, last: frozenset[Name]) -> None:
        schema = getattr(step.call, "_schema", None)
        if schema is None:
            raise _Unknown
        reads, arguments, results = step.reads(), [len(schema.arguments)], [len(schema.returns)]
        ends = {name for name in last if reads.count(name) == 1}  # of others it is not said which reading is the last
        for i, argument in enumerate(schema.arguments):
            value = step.args[i] if i < len(step.args) else step.kwargs.get(argument.name, argument.default_value)
            arguments += self._argument(value, str(argument.real_type), ends)
        found = step.result if len(schema.returns) > 1 else (step.result,)
        for value, returned in zip(found, schema.returns, strict=False):
            results += self._result(value, str(returned.real_type), last)
        name = schema.name.removeprefix("fused_res::")
        self.code += [_CALL, len(self.names), *arguments, *results]
        self.names.append(name if name != schema.name else f"{name}.{schema.overload_name}")
        self.steps += 1

    def _read(self, name: Name, last: Iterable[Name]) -> list[int]:
        if not isinstance(name, Name):  # a number in a tensor's place
            raise _Unknown
        return [self.places[name], int(name in last)]

    def _new(self, name: Name) -> int:
        return self.places.setdefault(name, len(self.places))

    def _argument(self, value: object, kind: str, last: set[Name]) -> list[int]:
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
        if kind == "Device" and value == torch.device("cpu"):
            return [_CPU]
        raise _Unknown

    def _result(self, value: object, kind: str, last: frozenset[Name]) -> list[int]:
        if kind not in ("Tensor", "Optional[Tensor]"):
            if names_in(value):
                raise _Unknown
            return [_NO_TENSOR, _NOWHERE]
        # What has a name already is the same tensor, which was written to.
        goes = isinstance(value, Name) and value not in self.places and value not in last
        return [_ONE if kind == "Tensor" else _PERHAPS_ONE, self._new(value) if goes else _NOWHERE]


def lowered(steps: Sequence[Kept], inputs: Sequence[Tensor | None], results: object) -> Callable | None:
    """As `recorded.written`, run by the library; None where a step is none of those that it can call.

    While a profiler runs, Python makes the calls, so that it sees each.

    Args:
        inputs: those of the recorded call.
    """
    given = [Name(f"i{i}") for i, tensor in enumerate(inputs) if tensor is not None]
    outputs = list(dict.fromkeys([name for name in names_in(results) if name.is_made()]))
    code = _Code(given)
    try:
        for kept in steps:
            code.add(kept)
    except _Unknown:
        return None
    ends = [number for name in outputs for number in (code.places[name], 1)]
    numbers = [len(given), len(code.places), code.steps, *code.code, len(outputs), *ends]
    made = torch.ops.fused_res.make_program(" ".join(code.names), numbers, code.numbers)
    whole = Step(torch.ops.fused_res.run_program.default, (made, given), {}, tuple(outputs))
    instead = is_profiled, written(steps, len(inputs), results)
    function = written([Kept(whole, frozenset())], len(inputs), results, instead=instead)
    weakref.finalize(function, torch.ops.fused_res.free_program, made).atexit = False
    return function
