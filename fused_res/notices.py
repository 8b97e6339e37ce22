"""Warnings for users: once for each matter, under the block's name in their model, at the line of theirs that called it."""

import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch import nn

_said: set[str] = set()
_LIBRARIES = (str(Path(sysconfig.get_path("stdlib"))), "<eval_with_key>", "<frozen ")
_PACKAGE = str(Path(__file__).parent)
_INSTALLED = ("/site-packages/", "/dist-packages/")


def say_once(matter: str, message: str, block: nn.Module | None = None) -> None:
    """Warn of something, of the block if one is given, unless the same matter has been spoken of before."""
    if matter in _said:
        return
    _said.add(matter)
    frames = list(_frames())
    if block is not None:
        name, kind = _name(block, frames), type(block).__name__
        message = f"{f'{name} ({kind})' if name else kind} {message}"
    frame = next((f for f in frames if _is_users(f)), None) or next((f for f in frames if not _is_ours(f)), frames[-1])
    warnings.warn_explicit(
        f"fused_res: {message}",
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _frames() -> Iterator[FrameType]:
    """From the caller of `say_once` outwards."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    # A fused block's forward has the globals of the original's.
    return frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_globals.get("__name__", "").partition(".")[0] in (
        "torch",
        "fused_res",
    )


def _is_users(frame: FrameType) -> bool:
    """Whether the code is neither ours nor torch's nor of any other library."""
    file = frame.f_code.co_filename.replace("\\", "/")
    return not (_is_ours(frame) or file.startswith(_LIBRARIES) or any(part in file for part in _INSTALLED))


def _name(block: nn.Module, frames: list[FrameType]) -> str:
    """The block's name in the outermost of the modules that are being called."""
    calls = [f for f in frames if f.f_code.co_name == "_call_impl" and f.f_globals.get("__name__") == "torch.nn.modules.module"]
    for frame in reversed(calls):
        root = frame.f_locals.get("self")
        if isinstance(root, nn.Module):
            name = next((name for name, module in root.named_modules() if module is block), None)
            if name is not None:
                return without_compiled(name)
    return ""


def without_compiled(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
