"""Text for terminals: a table that needs no package, a progress bar where rich is installed, and what to install where not."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

Advance = Callable[[str], None]


class UsageError(RuntimeError):
    """A command cannot be run as it was asked for."""


class MissingPackageError(UsageError):
    """A package of the extra `bench` is not installed."""


def require(module: str, package: str | None = None) -> ModuleType:
    """Import a module of the extra `bench`, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        name = package or error.name
        raise MissingPackageError(f"this needs the package {name}: pip install 'fused-res[bench]'") from error


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, under a rule."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(str(cell).ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@contextmanager
def progress(total: int, title: str) -> Iterator[Advance]:
    """A bar on stderr if that is a terminal; yields `advance(label)`, to be called when a step with this label starts."""
    if not sys.stderr.isatty():
        yield lambda label: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield lambda label: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("done, left:"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[label]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, label="")
        started = 0

        def advance(label: str) -> None:
            nonlocal started
            bar.update(task, completed=min(started, total), label=label)
            started += 1

        yield advance
