"""What a recorder notes of a call (`fused_res.block.program`), and that as a Python function.

Tensors are names here: `i0`, `i1`, ... for the inputs, `t0`, `t1`, ... for what is made on the way.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Name(str):
    """A tensor, or another variable of the function."""

    __slots__ = ()

    def is_made(self) -> bool:
        return self[0] == "t"


class View(NamedTuple):
    """A view `name` of the tensor `source`, of the same dtype, that starts `offset` elements behind it in memory."""

    name: Name
    source: Name
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Noted(NamedTuple):
    """One call.

    call: an operator, or a launcher. args, kwargs: with names in place of tensors. result: names, None, and tuples of them. method:
    one of the first argument that does the same in less time, if there is one. on_stream: whether it is a launcher that takes
    addresses, and the stream; direct: what such a launcher asks of the driver, where that is all it does. views: of a call that
    makes nothing but views, these, unless they are of another dtype. spare: whether it is not needed where nobody reads what it
    makes.
    """

    call: Callable
    args: tuple | list
    kwargs: dict
    result: object
    method: str | None = None
    on_stream: bool = False
    direct: tuple | None = None
    views: tuple[View, ...] | None = None
    spare: bool = False

    def reads(self) -> list[Name]:
        return names_in([*self.args, *self.kwargs.values()])

    def makes(self) -> list[Name]:
        return names_in(self.result)


class Kept(NamedTuple):
    """A step of a program, and the names that nobody needs after it."""

    step: Noted
    last: frozenset[Name]


def names_in(value: object) -> list[Name]:
    """Those in a value that may be a list or a tuple of values."""
    if isinstance(value, Name):
        return [value]
    return [name for part in value for name in names_in(part)] if isinstance(value, (list, tuple)) else []


def needed(steps: Sequence[Noted], results: object) -> list[Kept]:
    """The steps that results need, or whose effects do."""
    later, kept = set(names_in(results)), []
    for step in reversed(steps):
        reads, makes = step.reads(), step.makes()
        if step.spare and later.isdisjoint(makes):
            continue
        kept.append(Kept(step, frozenset([name for name in (*reads, *makes) if name not in later and name.is_made()])))
        later.update(reads)
    return kept[::-1]


class _Source:
    """Values as source text; what has none is a constant of the function."""

    def __init__(self) -> None:
        self.constants: dict[str, object] = {}

    def constant(self, value: object) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def of(self, value: object, addresses: bool = False) -> str:
        if isinstance(value, Name):
            return f"{value}.data_ptr()" if addresses else str(value)
        if isinstance(value, list):
            return f"[{', '.join([self.of(v, addresses) for v in value])}]"
        if isinstance(value, tuple):
            inside = ", ".join([self.of(v, addresses) for v in value])
            plain = type(value) is tuple or type(value) is torch.Size
            return f"({inside}{',' if len(value) == 1 else ''})" if plain else f"{self.constant(type(value))}({inside})"
        return repr(value) if value is None or type(value) in (bool, int, str) else self.constant(value)

    def call(self, step: Noted) -> str:
        arguments = [self.of(value, step.on_stream) for value in step.args]
        arguments += [f"{name}={self.of(value)}" for name, value in step.kwargs.items()]
        arguments += ["stream=stream"] if step.on_stream else []
        if step.method is None:
            return f"{self.constant(step.call)}({', '.join(arguments)})"
        return f"{arguments[0]}.{step.method}({', '.join(arguments[1:])})"


def _target(result: object) -> str:
    """The left side of an assignment."""
    if isinstance(result, Name):
        return str(result)
    return f"({', '.join(map(_target, result))},)" if isinstance(result, (list, tuple)) and result else "_"


class Instead(NamedTuple):
    """A function that is called in place of a program: where `now()`, and where the program ends with an error that is `meant`."""

    function: Callable
    now: Callable[[], bool]
    meant: Callable[[RuntimeError], bool]


def written(
    steps: Sequence[Kept],
    inputs: int,
    results: object,
    stream: Callable[[Tensor], int] | None = None,
    instead: Instead | None = None,
) -> Callable:
    """A function of the inputs that makes these steps and returns what stands for the results.

    stream: what finds the stream of launches by the first input, where there are any.
    """
    names = ", ".join(f"i{n}" for n in range(inputs))
    source, lines, body = _Source(), [f"def program({names}):"], []
    if instead is not None:
        other = f"return {source.constant(instead.function)}({names})"
        lines.append(f"    if {source.constant(instead.now)}(): {other}")
    if stream is not None:
        lines.append(f"    stream = {source.constant(stream)}(i0)")
    for step, last in steps:
        body.append(f"    {_target(step.result)} = {source.call(step)}")
        body += [f"    del {', '.join(sorted(last))}"] if last else []
    if instead is not None:  # which is called after the handler, so that its own error has no other behind it
        handler = [f"        if not {source.constant(instead.meant)}(error): raise", "        fails = True"]
        body = ["    fails = False", "    try:", *[f"    {line}" for line in body], "    except RuntimeError as error:", *handler]
        body.append(f"    if fails: {other}")
    lines += [*body, f"    return {source.of(results)}"]
    space = dict(source.constants)
    exec(compile("\n".join(lines), "<a program of fused_res>", "exec"), space)
    return space.pop("program")  # which then is in no cycle with what it calls
