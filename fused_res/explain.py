"""`explain(model, x)`: how every residual block of a model runs, and why."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fused_res import planner
from fused_res.block.validate import compute_dtype
from fused_res.eligibility import shortcut_of
from fused_res.modules import ResidualBlock


@dataclass(frozen=True)
class Row:
    """One block: its name and class, the x it was called with, and how it runs.

    `backend` is "eager" where it runs through its child modules, and `level` then None; `reason` says why, or why the
    shortcut runs by itself.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    dtype: str
    backend: str
    level: str | None
    shortcut: str
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """Rows in the order of the calls; `str()` gives a table."""

    rows: tuple[Row, ...]

    def to_dicts(self) -> list[dict]:
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        head = ("block", "class", "input", "dtype", "backend", "level", "shortcut", "why")
        lines = [head]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            lines.append(
                (row.name or "(self)", row.block, shape, row.dtype, row.backend, row.level or "-", row.shortcut, row.reason or "")
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _row(name: str, block: ResidualBlock, x: Tensor) -> Row:
    dtype = compute_dtype(x)
    shortcut = shortcut_of(block.downsample)
    reason, backend, level = block.unfused_reason(x), planner.EAGER, None
    if reason is None:
        x = x.to(dtype)
        asked, level = planner.plan(x, block.parts())
        backend = planner.resolve(asked, x.device, dtype)
        reason = shortcut.reason
    kind = type(block).__name__
    return Row(name, kind, tuple(x.shape), str(dtype).removeprefix("torch."), backend, level, shortcut.kind, reason)


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """How each `BasicBlock` and `Bottleneck` of the model runs when the model is called with x here and now.

    Runs `model(x)` once without gradients and restores buffers and the random state, so that nothing remains of the call.
    `use_backend` and autocast are obeyed.

    Args:
        model: any module, a block itself included.
        x: what the model takes.

    Returns:
        One row for every call of a block: backend, level and shortcut, or why it runs unfused.
    """
    rows: list[Row] = []

    def record(name: str):
        return lambda block, inputs: rows.append(_row(name, block, inputs[0]))

    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, ResidualBlock)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    handles = [block.register_forward_pre_hook(record(name), prepend=True) for name, block in blocks]
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return Explanation(tuple(rows))
