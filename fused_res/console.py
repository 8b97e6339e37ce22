"""Text for terminals: a table that needs no package, a progress bar, and what to install where not."""

import importlib
import shutil
import sys
import textwrap
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


def width() -> int:
    """Columns of the terminal; 80 where the output is none, unless COLUMNS says otherwise."""
    return shutil.get_terminal_size(fallback=(80, 24)).columns


def wrapped(text: str) -> str:
    """A paragraph in lines that fit the terminal."""
    return textwrap.fill(text, width(), break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], shared: int = 0) -> str:
    """Left-aligned columns, two spaces apart, under a rule.

    Where that is too wide for the terminal, as many as it takes of the first `shared` columns become a line above the rows that
    have them in common. What is then still too wide in the last column is wrapped.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

    def needed(above: int) -> int:
        return sum(widths[above:]) + 2 * (len(widths) - above - 1)

    above = next((n for n in range(shared + 1) if needed(n) <= width()), shared)
    widths[-1] = min(widths[-1], max(20, width() - needed(above) + widths[-1]))

    def lines(row: Sequence[str]) -> Iterator[str]:
        last = textwrap.wrap(row[-1], max(1, widths[-1]), break_on_hyphens=False) or [""]
        for n, text in enumerate(last):
            shown = (*(cell if n == 0 else "" for cell in row[above:-1]), text)
            yield "  ".join(cell.ljust(w) for cell, w in zip(shown, widths[above:], strict=True)).rstrip()

    found = [*lines(header), "  ".join("-" * w for w in widths[above:])]
    title: list[str] = []
    for row in cells:
        if row[:above] != title:
            title = row[:above]
            found += ["", ", ".join(filter(None, title))]
        found += lines(row)
    return "\n".join(found)


def _plain_progress(total: int, title: str) -> Iterator[Advance]:
    """One line on stderr that is written over, for want of rich."""
    started = 0

    def advance(label: str) -> None:
        nonlocal started
        line = f"{title}: {min(started, total)} of {total} done, {label}"
        sys.stderr.write(f"\r{line[: width() - 1].ljust(width() - 1)}")
        sys.stderr.flush()
        started += 1

    try:
        yield advance
    finally:
        sys.stderr.write(f"\r{' ' * (width() - 1)}\r")


@contextmanager
def progress(total: int, title: str) -> Iterator[Advance]:
    """A bar on stderr if that is a terminal, or a line without rich; yields `advance(label)`, to be called when a step starts."""
    if not sys.stderr.isatty():
        yield lambda label: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield from _plain_progress(total, title)
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
