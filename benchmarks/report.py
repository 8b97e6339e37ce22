"""Result files, and what is drawn from them: a terminal table, a markdown section, a plot.

A result file is one JSON document: `schema` (version of this format), `created` (UTC), `command`, `device`, `gpu` (the
one used; `gpu_after` its clocks when the timing ended), `machine`, `versions`, `git`, `source` (hash of the sources), `settings`,
`rows` (see `runner.run_case`; milliseconds and bytes), and, where they were run, `check` and `digits`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from fused_res import environment
from fused_res.console import require

SCHEMA = 1
BARE, OURS, EAGERS = "bare convolutions", "fused_res", ("eager channels_last", "eager NCHW")
PEER_ORDER = (*reversed(EAGERS), "torch.compile", OURS, BARE)


def new(command: str, device: torch.device) -> dict:
    """A result document without rows. `command` must be free of paths."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "device": device.type,
        "gpu": environment.gpu(device.index) if device.type == "cuda" else None,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "git": environment.git(),
        "source": environment.fingerprint(),
        "settings": {
            "cudnn_benchmark": True,
            "tf32_convolutions": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "rows": [],
    }


def save(document: dict, path: Path) -> None:
    """Write the document so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def load(path: Path) -> dict:
    """Read a result file. Raises ValueError for one of another schema."""
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {document.get('schema')}")
    return document


def row_key(row: dict) -> tuple:
    return row["case"], row["batch"], row["dtype"], row["mode"]


def measured(document: dict) -> Iterator[tuple[tuple, dict[str, dict]]]:
    """`(case, batch, dtype, mode)` and its rows by peer, in the order of the file, peers in the order of the tables."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in document["rows"]:
        groups.setdefault(row_key(row), {})[row["peer"]] = row
    for key, peers in groups.items():
        known = [name for name in PEER_ORDER if name in peers]
        yield key, {name: peers[name] for name in (*known, *(name for name in peers if name not in known))}


def eager_of(peers: dict[str, dict]) -> str | None:
    """The faster of the eager layouts."""
    ran = [name for name in EAGERS if name in peers and peers[name]["reason"] is None]
    return min(ran, key=lambda name: peers[name]["ms"]["median"], default=None)


def device_name(document: dict) -> str:
    machine = document["machine"]
    if document["gpu"] is not None:
        return document["gpu"]["name"]
    return f"{machine['cpu']}, {machine['threads']} threads"


def conditions(document: dict) -> str:
    """One line: where and with what this was measured."""
    versions, git = document["versions"], document.get("git") or {}
    parts = [device_name(document), f"torch {versions['torch']}", f"fused_res {versions['fused_res']}"]
    if document["gpu"] is not None:
        parts[1:1] = [f"driver {document['gpu'].get('driver_version', 'unknown')}"]
        parts += [f"Triton {versions['triton']}"] if versions["triton"] else []
    if git.get("commit"):
        parts.append(f"commit {git['commit'][:12]}{' with local changes' if git['dirty'] else ''}")
    return ", ".join([*parts, document["created"][:10]])


def interval(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['median']:.{digits}f} [{value['q20']:.{digits}f}-{value['q80']:.{digits}f}]"


COLUMNS = ("peer", "ms", "x bare", "x eager", "saved MB", "peak MB", "error")


def cells(name: str, peers: dict[str, dict]) -> tuple[str, ...]:
    """A row of the table, under COLUMNS; what does not apply is empty."""
    row, eager = peers[name], eager_of(peers)
    if row["reason"] is not None:
        return (name, "not run", *[""] * (len(COLUMNS) - 2))

    def ratio(other: str | None) -> str:
        if other == name:
            return "1"
        return interval(row["ratio_to"][other]) if other in row["ratio_to"] else ""

    milliseconds = row["ms"]["median"]
    memory = ["" if row[k] is None else f"{row[k] / 1e6:.1f}" for k in ("saved_bytes", "peak_bytes")]
    errors = [error for error in row["max_relative_error"].values() if error is not None]
    error = f"{max(errors):.0e}" if errors and max(errors) > 0 else ""
    return (name, f"{milliseconds:.{1 if milliseconds >= 10 else 3}f}", ratio(BARE), ratio(eager), *memory, error)


def title(key: tuple, peers: dict[str, dict]) -> str:
    """What a case is, and how often it was measured."""
    rounds = max((row["rounds"] for row in peers.values() if row["reason"] is None), default=0)
    return "{}, batch {}, {}, {}".format(*key) + f", {rounds} rounds"


def reasons(peers: dict[str, dict]) -> list[str]:
    return [f"{name} not run: {row['reason']}" for name, row in peers.items() if row["reason"] is not None]


def _columns(document: dict) -> list[int]:
    """Columns that have anything to show."""
    rows = [cells(name, peers) for _, peers in measured(document) for name in peers]
    return [c for c in range(len(COLUMNS)) if any(row[c] for row in rows)]


def print_table(document: dict) -> None:
    """The tables on the terminal, one per case, through rich."""
    console = require("rich.console").Console(highlight=False)
    console.print(f"{conditions(document)}\n", markup=False)
    columns = _columns(document)
    for key, peers in measured(document):
        table = require("rich.table").Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for c in columns:
            table.add_column(COLUMNS[c], justify="right" if c else "left", no_wrap=True, min_width=(19, 5, 16, 16, 8, 7, 5)[c])
        for name in peers:
            row = cells(name, peers)
            table.add_row(*(row[c] for c in columns), style="bold" if name == OURS else "dim" if peers[name]["reason"] else None)
        console.print(title(key, peers), style="bold", markup=False)
        console.print(table)
        console.print("\n".join([*reasons(peers), ""]), markup=False)
    console.print(caption(), *summaries(document), sep="\n", markup=False)


def caption() -> str:
    return (
        "Medians of interleaved rounds [20 % to 80 % quantile]; ratios are taken round by round. x bare: over the block's "
        "convolutions alone. x eager: over the faster of the eager layouts. saved: activations kept for backward, without the "
        "output. error: largest relative L2 difference from eager in any result, before or after the timing; single ReLU signs "
        "flip by rounding."
    )


def summaries(document: dict) -> list[str]:
    """What fused_res ran on, and what the numerical check and the training run found, a line each, where they were run."""
    ran = Counter(row["backend"] for row in document["rows"] if row["peer"] == OURS and row["reason"] is None)
    lines = []
    if ran:
        found = "; ".join(f"{backend} ({count} of {ran.total()})" for backend, count in ran.items())
        lines.append(f"fused_res ran as: {found}.")
    if check := document.get("check"):
        verdict = "passed" if check["passed"] else "FAILED"
        largest = "not finite" if check["worst"] is None else f"at {check['worst']:.2f} of its limit"
        lines.append(f"Numerical check against fp64: {verdict}, {check['compared']} comparisons, worst {largest}.")
    if digits := document.get("digits"):
        verdict = "passed" if digits["passed"] else "FAILED"
        lines.append(
            f"Training on digits: {verdict}. Test accuracy {100 * digits['accuracy']['fused']:.1f} % fused, "
            f"{100 * digits['accuracy']['eager']:.1f} % eager. Losses of the first {digits['window']} steps differ by "
            f"{digits['difference']['fused']:.1e} at most, eager's own, disturbed by one ulp, by up to {digits['natural']:.1e}."
        )
    return lines


def markdown(document: dict, picture: str | None = None) -> str:
    """The section that README shows: conditions, tables, findings, the command, and the plot where there is one."""
    lines, columns = [f"{conditions(document)}.", ""], _columns(document)
    lines.append("| " + " | ".join(COLUMNS[c] for c in columns) + " |")
    lines.append("| " + " | ".join("---" if c == 0 else "---:" for c in columns) + " |")
    notes = []
    for key, peers in measured(document):
        lines.append(f"| **{title(key, peers)}** |" + " |" * (len(columns) - 1))
        for name in peers:
            row = cells(name, peers)
            lines.append("| " + " | ".join(f"**{row[c]}**" if name == OURS and row[c] else row[c] for c in columns) + " |")
        notes += [f"- {key[0]}, batch {key[1]}: {reason}" for reason in reasons(peers)]
    if notes:
        lines += ["", *notes]
    for line in (caption(), *summaries(document), f"Reproduce with `{document['command']}`."):
        lines += ["", line]
    if picture is not None:
        lines += ["", f"![Block time over the time of its bare convolutions]({picture})"]
    return "\n".join(lines)
