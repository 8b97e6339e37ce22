"""Programs: what a schedule calls for one plan, recorded once and replayed as it was, without asking anything again.

The first call of a plan runs its schedule (`fused_res.block.forward` or `backward`) under a recorder, which sees every operator of
torch's and of ours and every launch of a Triton kernel. From that a function is made that calls the same, in the same order, with
the same numbers, and lets go of each tensor after its last use; views that are there already are not made again. On a CPU the
compiled library calls it all where it can (`fused_res.block.lowered`), and else Python does (`fused_res.block.noted`). What a
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
from fused_res.block.lowered import lowered
from fused_res.block.noted import Name, Noted, View, needed, written
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
_EMPTY = {"aten::empty.memory_format", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
"""Operators that make a tensor without values, and do nothing else."""
_MOST = 64
_NEVER = "never"
"""Stands where there can be no program."""


class _Refused(Exception):  # noqa: N818, no error
    """What was called cannot be replayed."""


class _Known(NamedTuple):
    """A tensor's name, and the names of all views of its storage by what they see of it; the first is made of no other."""

    name: Name
    family: dict[tuple, Name]


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


def _view(name: Name, made: tuple, source: Name, seen: tuple) -> View:
    """By what the view and its source see."""
    return View(name, source, tuple(made[1]), tuple(made[2]), made[3] - seen[3])


class _Recorder(TorchDispatchMode):
    """Notes what is called inside, step by step. It keeps no tensor alive, so that a recorded call needs no more memory."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.refused = False
        self._known = WeakTensorKeyDictionary()
        self._count = 0
        self._inputs = inputs
        self._stream: Callable[[Tensor], int] | None = None
        self._steps: list[Noted] = []
        for i, tensor in enumerate(inputs):
            if tensor is not None:
                name = Name(f"i{i}")
                self._known[tensor] = _Known(name, {_sees(tensor): name})

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.refused = self.refused or operator.name() in _BY_VALUES
        if not self._is_known(operator, args, result):
            self._note(operator, args, kwargs, result)
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
            name = self._named(result, source.family)
            view = _view(name, sees, root, first)
            self._steps.append(Noted(Tensor.as_strided, (root, *view[2:4]), {}, name, "as_strided", views=(view,), spare=True))
        if name is not None:
            self._known[result] = _Known(name, source.family)
        return name is not None

    def launch(self, call: Callable, again: Callable) -> None:
        """A kernel's launch, whose insides are its own; `again` says how it is launched with other tensors."""
        with disable_modes():
            function, args, kwargs, stream, direct = again(call())
        self._stream = self._stream or stream
        try:
            named = self._names(args), self._names(kwargs), None
            step = Noted(function, *named, on_stream=stream is not None, direct=self._names(direct))
        except _Refused:
            self.refused = True
        else:
            self._steps.append(step)

    def _note(self, operator: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        try:
            named, keywords = self._names(args), self._names(kwargs)
        except _Refused:
            self.refused = True
            return
        is_view = _is_view(operator, args[0] if args else None, result)
        family = self._known[args[0]].family if is_view else None
        name, views = operator.name(), None
        target = self._named(result, family)
        if is_view:
            made, sees = [result] if isinstance(result, Tensor) else result, _sees(args[0])
            if all(tensor.dtype == args[0].dtype for tensor in made):
                views = tuple([_view(self._known[tensor].name, _sees(tensor), named[0], sees) for tensor in made])
        spare = is_view or name in _EMPTY
        method = None if kwargs else _METHODS.get(name)
        self._steps.append(Noted(operator, named, keywords, target, method, views=views, spare=spare))

    def _names(self, value: object) -> object:
        """The value with names in place of tensors."""
        if isinstance(value, Tensor):
            known = self._known.get(value)
            if known is None:
                raise _Refused  # a tensor from elsewhere
            return known.name
        if isinstance(value, dict):
            return {key: self._names(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            parts = [self._names(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    def _named(self, value: object, family: dict | None) -> object:
        """Names for what has been made."""
        if isinstance(value, Tensor):
            known = self._known.get(value)
            if known is None:
                known = self._known[value] = _Known(Name(f"t{self._count}"), {} if family is None else family)
                known.family[_sees(value)] = known.name
                self._count += 1
            return known.name
        return tuple([self._named(part, family) for part in value]) if isinstance(value, (list, tuple)) else None

    def function(self, found: object, backend: str) -> Callable | None:
        """The function of the inputs that calls what was called, and returns what stands for what was found."""
        if self.refused:
            return None
        try:
            results = self._names(found)
        except _Refused:
            return None
        steps = needed(self._steps, results)
        function = None
        if backends.compiled(backend):
            function = lowered(steps, self._inputs, results, self._stream, backends.observed(backend))
        return function or written(steps, len(self._inputs), results, self._stream)


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
    programs[key] = recorder.function(found, backend) or _NEVER
    return found
