"""What a step asks of the host: Python functions called, the files that these are in, and torch's operators, views among them."""

import sys
import types
from collections.abc import Callable

import torch

_VIEWS = {f"aten::{name}" for name in ("alias", "as_strided", "detach", "expand", "narrow", "permute", "select", "slice", "split")}
_VIEWS |= {f"aten::{name}" for name in ("squeeze", "t", "transpose", "unbind", "unsqueeze", "view")}
_OPERATORS = ("aten::", "fused_res::", "mkldnn::")


def count(step: Callable[[], object]) -> dict[str, int]:
    """Of one step: calls, files, operators and views.

    Operators are counted as torch's profiler sees them, those that others call, too, and those of programs, which the compiled
    library calls at any other time.
    """
    step()
    calls, files = 0, set()

    def note(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal calls
        if event == "call":
            calls += 1
            files.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        step()
    names = [event.name for event in watched.events() if event.name.startswith(_OPERATORS)]
    return {"calls": calls, "files": len(files), "operators": len(names), "views": sum(name in _VIEWS for name in names)}
