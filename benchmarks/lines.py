"""Files of JSON lines that a run adds to: a line without its end was cut off, and does not count."""

import json
from pathlib import Path


def read(path: Path) -> list:
    """What the whole lines of a file say; nothing where there is none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def mend(path: Path) -> None:
    """Take a line without its end off a file, so that what is added begins a line."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
