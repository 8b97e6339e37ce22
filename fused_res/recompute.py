"""Under `torch.utils.checkpoint` without reentry a recompute runs each block as its forward did, whatever has changed around it.

Such a checkpoint expects the recompute to save just what the forward saved. A hook, a mode or a `use_backend` that is there in one
of the two alone would make a block save something else.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from fused_res.eligibility import Shortcut
from fused_res.planner import Forced


class Way(NamedTuple):
    """How a block runs: what `use_backend` and `fuse` asked for, why it runs unfused if it does, and its shortcut."""

    forced: Forced | None
    level: str | None
    reason: str | None
    shortcut: Shortcut


class _Record:
    """The ways of the blocks in one checkpoint, in the order of their calls."""

    def __init__(self) -> None:
        self.ways: list[tuple[nn.Module, Way]] = []
        self.replay: Callable | None = None
        self.next = 0


_records: WeakKeyDictionary[object, _Record] = WeakKeyDictionary()


def settle(pack: Callable, block: nn.Module, decide: Callable[[], Way]) -> Way:
    """The way of this call: in a checkpoint's forward what `decide` says, in its recompute what it said then.

    Args:
        pack: of `fused_res.internals.pack_hook`; where it is none of torch.utils.checkpoint's, `decide` has the word.
    """
    variables = _closure(pack)
    if "frame" in variables:
        way = decide()
        _records.setdefault(variables["frame"], _Record()).ways.append((block, way))
        return way
    frame = variables["target_frame_ref"]() if "target_frame_ref" in variables else None
    record = None if frame is None else _records.get(frame)
    if record is None:
        return decide()
    if record.replay is not pack:
        record.replay, record.next = pack, 0
    at, record.next = record.next, record.next + 1
    # Another order than the forward's is for torch to complain about.
    same = at < len(record.ways) and record.ways[at][0] is block
    return record.ways[at][1] if same else decide()


def _closure(pack: Callable) -> dict[str, object]:
    """The variables that a hook of torch.utils.checkpoint was made with."""
    function = inspect.unwrap(pack)
    if getattr(function, "__module__", None) != "torch.utils.checkpoint":
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    return {name: cell.cell_contents for name, cell in cells}
