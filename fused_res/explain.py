"""`explain(model, *inputs)`: how every residual block of a model runs, and why."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fused_res import planner
from fused_res.block.casting import with_dtype
from fused_res.block.dry_run import by_formula, convolutions, saved_bytes, steps
from fused_res.block.evaluation import arithmetic, places
from fused_res.block.validate import compute_dtype
from fused_res.functional import is_inductors
from fused_res.fusible import Fusible
from fused_res.fusing import find
from fused_res.geometry import numbers_of
from fused_res.internals import tree_leaves
from fused_res.network import STEM, Network, stem_of
from fused_res.notices import without_compiled
from fused_res.primitives.choice import StepCall, choose, has_step, settled_step
from fused_res.primitives.conv_bn_act import who
from fused_res.primitives.run import of
from fused_res.reading import child
from fused_res.spec import Block


@dataclass(frozen=True)
class Convolution:
    """One convolution of a block: its module, its direction, and who runs it.

    The direction is `conv_fprop`, `conv_dgrad` or `conv_wgrad`, or `conv_bn_act` in evaluation.

    `own` is true for a kernel of the backend, with the tile `config` (None: its default), and false for the library; `why` says
    why: "measured" where tuning found it, "" for the rule. `lender` names another backend whose kernel it is, where tuning found
    that to be the fastest, or is "".
    """

    unit: str
    primitive: str
    own: bool
    config: tuple[int, ...] | None
    why: str
    lender: str = ""


@dataclass(frozen=True)
class Row:
    """One block: its name and class, the x it was called with, and how it runs.

    `backend` is "eager" where it runs through its child modules, and `level` then None; `reason` says why, or why the
    shortcut runs by itself. `units` names its convolutions, main branch first; `convolutions` are those that run as such in a
    forward and, in training, in a backward to everything. `measured`: whether tuning found the level. `decided`: who gave it,
    "forced" by `use_backend` or `fuse`, "measured", "shipped" (a plan that came with the package), "model" or "rule".

    `formulas`: on a GPU, the steps beside convolutions for which `native` has no kernel, each with the reason. `lent`: the steps of
    the moment form that a kernel of another backend runs, which it names, and why.

    `saved_bytes` and `eager_saved_bytes`: what this call would keep for a backward to everything, without parameters and output,
    fused and through the child modules; None where it runs unfused or in evaluation mode.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    dtype: str
    backend: str
    level: str | None
    shortcut: str
    units: tuple[str, ...]
    convolutions: tuple[Convolution, ...]
    reason: str | None
    measured: bool = False
    saved_bytes: int | None = None
    eager_saved_bytes: int | None = None
    decided: str | None = None
    formulas: tuple[str, ...] = ()
    lent: tuple[str, ...] = ()

    def who_convolves(self) -> str:
        """For each unit, in order: "own", "library", the name of the backend that lends the kernel, how many of its directions are
        such, or "moment"; once, if all are alike.
        """
        if self.level is None:
            return "-"
        words = [_who([c for c in self.convolutions if c.unit == unit]) for unit in self.units]
        return words[0] if len(set(words)) == 1 else "/".join(words)


def _who(convolutions: list[Convolution]) -> str:
    """The convolutions of one unit in a word or two."""
    if not convolutions:
        return "moment"
    own = Counter(c.lender or "own" for c in convolutions if c.own)
    if own.total() == len(convolutions) and len(own) == 1:
        word = next(iter(own))
    else:
        word = " and ".join(f"{name} {count}" for name, count in own.items()) + f" of {len(convolutions)}" if own else "library"
    why = ", ".join(dict.fromkeys(c.why for c in convolutions if c.own == bool(own) and c.why))
    return f"{word} ({why})" if why else word


_SAID = (planner.MEASURED, planner.SHIPPED, planner.MODEL)


@dataclass(frozen=True)
class Explanation:
    """Rows in the order of the calls; `str()` gives a table."""

    rows: tuple[Row, ...]

    def to_dicts(self) -> list[dict]:
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        head = ("block", "class", "input", "dtype", "backend", "level", "convolutions", "shortcut", "saved/eager", "why")
        lines = [head]
        for row in self.rows:
            what = (row.name or "(self)", row.block, "x".join(map(str, row.shape)), row.dtype)
            level = f"{row.level} ({row.decided})" if row.decided in _SAID else row.level or "-"
            saved = "-" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:.1f}/{row.eager_saved_bytes / 1e6:.1f} MB"
            why = "; ".join([*([row.reason] if row.reason else []), *row.formulas, *row.lent])
            lines.append((*what, row.backend, level, row.who_convolves(), row.shortcut, saved, why))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _row(name: str, block: nn.Module, x: Tensor, compiled: bool) -> Row:
    dtype = compute_dtype(x)
    what = (name, type(block).__name__, tuple(x.shape), str(dtype).removeprefix("torch."))
    if not isinstance(block, Fusible):
        reason = find(block)[1] or "not fused: fused_res.fuse(model) would"
        return Row(*what, planner.EAGER, None, "-", (), (), reason)
    shortcut = block._shortcut()
    reason = block.unfused_reason(x)
    if reason is not None:
        return Row(*what, planner.EAGER, None, shortcut.kind, (), (), reason)
    x, parts = x.to(dtype), with_dtype(block.parts(), dtype)
    asked, level = planner.plan(x, parts, compiled=compiled, level=block._fused_res_level)
    backend = planner.resolve(asked, x.device, dtype)
    units = tuple(conv for conv, _ in block._anatomy.units) + ((shortcut.names.split("/")[0],) if shortcut.names else ())
    evaluated = planner.evaluation_level(parts, dtype, backend, block._fused_res_level)
    if evaluated is not None and not block.training:
        asked = block._fused_res_level is not None or planner.forced() is not None
        if compiled and not asked and is_inductors(dtype, numbers_of(x, parts)):
            return Row(
                *what, planner.EAGER, None, shortcut.kind, (), (), "Inductor freezes its weights: it prepares the same convolutions"
            )
        return Row(*what, backend, evaluated, shortcut.kind, units, _prepared(x, parts, units, backend), shortcut.reason)
    run = []
    for unit, call in convolutions(x, block._scale(), parts, level, backend, block.training):
        choice = choose(call)
        run.append(Convolution(units[unit], call.primitive, *choice))
    who = planner.RULE if compiled else planner.who_decided(x, parts, level=block._fused_res_level)
    measured = who == planner.MEASURED
    saved = saved_bytes(x, block._scale(), parts, level, block.frozen()) if block.training else (None, None)
    arguments = x, block._scale(), parts, level, backend, block.training
    formulas = tuple(f"{step}: {why}" for step, why in by_formula(*arguments).items())
    lent = _lent(steps(*arguments))
    return Row(*what, backend, level, shortcut.kind, units, tuple(run), shortcut.reason, measured, *saved, who, formulas, lent)


def _lent(calls: list[StepCall]) -> tuple[str, ...]:
    """The steps that others' kernels run, each with the backends' names, how many of its calls these run, and why."""
    found: dict[str, Counter] = {}
    for call in calls:
        choice = settled_step(call) if has_step(call) else None
        found.setdefault(call.primitive, Counter())[(choice.lender, choice.why) if choice is not None else ("", "")] += 1
    words = []
    for step, counted in found.items():
        for (lender, why), count in counted.items():
            if lender:
                some = "" if count == counted.total() else f" {count} of {counted.total()}"
                words.append(f"{step}: {lender}{some} ({why})")
    return tuple(words)


def _prepared(x: Tensor, parts: Block, units: tuple[str, ...], backend: str) -> tuple[Convolution, ...]:
    """The convolutions of evaluation without gradients."""
    dtype = arithmetic(x.dtype)
    found = [who(unit, place, of(backend)) for unit, place in places(with_dtype(parts, dtype), tuple(x.shape))]
    return tuple(Convolution(unit, "conv_bn_act", c.own, c.config, c.why) for unit, c in zip(units, found, strict=True))


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """The model's residual blocks and fused stems with their names, and whether torch.compile runs them; unfused blocks, too."""
    modules = list(model.named_modules())
    compiled = [name for name, module in modules if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None]
    # A chain that is part of a block is not called, and a hook on it would have that run unfused.
    parts = {
        id(child(module, part))
        for _, module in modules
        if isinstance(module, Fusible) and module._anatomy is not None
        for part, _ in module._containers
    }
    for name, module in modules:
        if id(module) in parts:
            continue
        front = stem_of(module) if isinstance(module, Network) else None
        if front is not None:
            inside = any(name == outer or name.startswith(f"{outer}." if outer else "") for outer in compiled)
            yield without_compiled(f"{name}.{STEM}" if name else STEM), front, inside
        if isinstance(module, Fusible) or find(module) != (None, None):
            inside = any(name == outer or name.startswith(f"{outer}." if outer else "") for outer in compiled)
            yield without_compiled(name), module, inside


def explain(model: nn.Module, *inputs: object, **keywords: object) -> Explanation:
    """How each residual block of the model runs when the model is called with these inputs here and now.

    Ours, those that `fuse` has fused, and those that it knows and has left alone or was not asked to fuse, with the reason.

    Runs `model(*inputs, **keywords)` once without gradients and restores buffers and the random state, so that nothing remains of
    the call. `use_backend` and autocast are obeyed. What torch.compile runs is called uncompiled, and explained as it runs
    in the graph for these sizes or, where there is none yet, as it would in one.

    Args:
        model: any module, a block itself included, compiled or not.
        inputs, keywords: what the model takes.

    Returns:
        One row for every call of a block: backend, level, who runs its convolutions, its shortcut, and how many bytes it keeps for
        backward beside eager; or why it runs unfused.
    """
    rows: list[Row] = []
    visit(model, inputs, keywords, lambda *call: rows.append(_row(*call)))
    return Explanation(tuple(rows))


def visit(model: nn.Module, inputs: tuple, keywords: dict, saw: Callable[[str, nn.Module, Tensor, bool], object]) -> None:
    """Run the model once, of which nothing remains, and tell `saw` of every call of a residual block: its name, the block, its x,
    and whether torch.compile runs it.
    """

    def record(name: str, compiled: bool):
        def hook(block, args, kwargs=None):  # without, where torch is still registering it for another thread's call
            x = args[0] if args else next(iter((kwargs or {}).values()), None)
            if isinstance(x, Tensor):
                saw(name, block, x, compiled)

        return hook

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    handles = [
        block.register_forward_pre_hook(record(name, compiled), prepend=True, with_kwargs=True)
        for name, block, compiled in _blocks(model)
    ]
    tensors = [leaf for leaf in tree_leaves((inputs, keywords, list(model.parameters()))) if isinstance(leaf, Tensor)]
    devices = list({tensor.device for tensor in tensors if tensor.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), _uncompiled():
            model(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


_lock, _stance, _asking = threading.Lock(), ExitStack(), 0


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled code runs as it was written, as long as any thread is inside: torch keeps one stance for all of them.

    Without importing the compiler where nobody has.
    """
    global _asking
    with _lock:
        if not _asking and "torch._dynamo" in sys.modules:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _asking += 1
    try:
        yield
    finally:
        with _lock:
            _asking -= 1
            if not _asking:
                _stance.close()
