"""Result files: JSON lines, appended to while a run goes on, so that an interrupted run can go on where it stopped.

The first line is the header: `schema` (version of this format), `created` (UTC), `command`, `device`, `gpu` (the one used),
`machine`, `versions`, `git`, `source` (hash of the sources), `settings`. Each further line is an object with one key: `rows`
(the rows of one case, see `runner.run_case`; milliseconds and bytes), `check`, `digits`, `ceiling`, `lost` (peers that took the
GPU's context with them), or, last, `finished` (UTC).
A line without its end, left by an interruption, is ignored.
"""

import hashlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path

import torch

from fused_res import environment
from fused_res.benchmarks import lines

SCHEMA = 2
SAME_RUN = ("command", "device", "versions", "git", "source", "settings")


class StaleResultError(RuntimeError):
    """A result file is of another run than the one that is to go on."""


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def new(command: str, device: torch.device) -> dict:
    """A result document without rows. `command` must be free of paths."""
    return {
        "schema": SCHEMA,
        "created": now(),
        "command": command,
        "device": device.type,
        "gpu": environment.gpu(device.index) if device.type == "cuda" else None,
        "machine": environment.machine(),
        "versions": environment.versions(),
        "git": environment.git(),
        "source": environment.fingerprint(),
        "settings": {
            "cudnn_benchmark": True,
            "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "rows": [],
    }


def _rounded(value: object) -> object:
    """Numbers with six significant digits: more would be noise, and make files long."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _line(value: object) -> str:
    return json.dumps(_rounded(value), allow_nan=False) + "\n"


def begin(document: dict, path: Path) -> None:
    """Write the header of a new file over whatever is there; an interruption leaves that, or a whole header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(_line({key: value for key, value in document.items() if key != "rows"}))
    os.replace(fresh, path)


def append(document: dict, path: Path, key: str, value: object) -> None:
    """Add one line to the file, and what it says to the document."""
    value = _rounded(value)
    with path.open("a") as file:
        file.write(_line({key: value}))
    _take(document, key, value)


def _take(document: dict, key: str, value: object) -> None:
    if key == "rows":
        document["rows"] += value
    else:
        document[key] = value


def load(path: Path) -> dict:
    """Read a result file. Raises ValueError for one of another schema or with a damaged line, FileNotFoundError for none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: there is no such file")
    try:
        header, *records = lines.read(path) or [{}]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: expected JSON lines: {error}") from error
    if header.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {header.get('schema')}")
    document = header | {"rows": []}
    for record in records:
        for key, value in record.items():
            _take(document, key, value)
    return document


def device_name(document: dict) -> str:
    """The GPU, or the CPU and how many of its threads."""
    machine = document["machine"]
    if document["gpu"] is not None:
        return document["gpu"]["name"]
    return f"{machine['cpu']}, {machine['threads']} threads"


def resume(path: Path, wanted: dict) -> dict:
    """The document of an interrupted run, its file cut to whole lines.

    Raises:
        StaleResultError: it is of another machine, commit, version or command line than `wanted`, a document of `new`.
    """
    found = load(path)
    names = [name for name in SAME_RUN if found.get(name) != wanted[name]]
    if device_name(found) != device_name(wanted):
        names.append("machine")
    if names:
        raise StaleResultError(
            f"{path.name} is of another run, {', '.join(names)} differ; without --resume it is measured anew and replaced"
        )
    lines.mend(path)
    return found


def digest(path: Path) -> str:
    """Of what is in the file: a plot says with it what it was drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def row_key(row: dict) -> tuple:
    return row["case"], row["batch"], row["dtype"], row["mode"]
