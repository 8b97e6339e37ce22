"""What the compiler made of the kernels: docs/kernels.csv, a line for each variant, and the worst cases in docs/kernels.md.

Both are written by `python -m fused_res.aot --update docs/kernels.md`. What stands in the page between the comments
`kernels:begin worst` and `kernels:end` is computed from the lines.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SECTION = re.compile(r"(?P<begin><!-- kernels:begin worst -->\n).*?(?P<end><!-- kernels:end -->)", re.DOTALL)


class Line(NamedTuple):
    """One kernel as compiled for one architecture, with the heads of its columns.

    file: of kernels/, without its ending. arch: 80 for compute capability 8.0. registers: of a thread. shared_kib: shared memory
    of a block. matrix: the instruction it multiplies with, or nothing. local: bytes of local memory of a thread.
    """

    file: str
    kernel: str
    variant: str
    dtype: str
    arch: int
    registers: int
    shared_kib: float
    matrix: str
    local: int

    @classmethod
    def of(cls, file: str, row: Any) -> "Line":
        """From a `fused_res.aot.Row`."""
        measured = row.registers, row.shared / 1024, row.matrix, row.local
        return cls(file, row.kernel, row.variant, row.dtype, row.arch, *measured)


def data(document: Path) -> Path:
    """Where the lines of a page are: beside it."""
    return document.with_suffix(".csv")


def read(path: Path) -> list[Line]:
    """Raises ValueError where the file has other columns."""
    with path.open(newline="") as file:
        head, *lines = list(csv.reader(file)) or [[]]
    if tuple(head) != Line._fields:
        raise ValueError(f"{path.name}: expected the columns {','.join(Line._fields)}, got {','.join(head)}")
    types = Line.__annotations__.values()
    return [Line(*(type_(value) for type_, value in zip(types, line, strict=True))) for line in lines]


def write(path: Path, lines: Iterable[Line]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Line._fields)
        writer.writerows(line._replace(shared_kib=f"{line.shared_kib:.6g}") for line in lines)


def replaced(lines: Sequence[Line], compiled: Mapping[str, Iterable[Any]]) -> list[Line]:
    """The lines with these rows, by file, in place of all that the file had for their architectures.

    The architectures of a variant stand next to each other, variants in the order of the rows, and files in that of their names.
    """
    by_file: dict[str, list[Line]] = {}
    for line in lines:
        by_file.setdefault(line.file, []).append(line)
    for file, rows in compiled.items():
        new = [Line.of(file, row) for row in rows]
        archs = {line.arch for line in new}
        groups: dict[tuple[str, ...], list[Line]] = {}
        for line in [*new, *(line for line in by_file.get(file, ()) if line.arch not in archs)]:
            groups.setdefault(line[1:4], []).append(line)
        by_file[file] = [line for group in groups.values() for line in sorted(group, key=lambda line: line.arch)]
    return [line for file in sorted(by_file) for line in by_file[file]]


def documented(lines: Iterable[Line]) -> set[tuple[str, ...]]:
    """File, kernel, variant and dtype of every line."""
    return {line[:4] for line in lines}


def _cell(lines: Sequence[Line]) -> str:
    """The most registers, shared and local memory of all these lines, and every matrix instruction; "none" where some lack one."""
    if not lines:
        return ""
    matrix = sorted({line.matrix or "none" for line in lines})
    local = max(line.local for line in lines)
    parts = [str(max(line.registers for line in lines)), f"{max(line.shared_kib for line in lines):.4g}"]
    parts += [] if matrix == ["none"] else [" or ".join(matrix)]
    return ", ".join([*parts, *([f"{local} B local"] if local else [])])


def worst(lines: Sequence[Line]) -> str:
    """A Markdown table of the worst case of each kernel on each architecture, over all its variants and dtypes."""
    archs = sorted({line.arch for line in lines})
    groups: dict[str, dict[int, list[Line]]] = {}
    for line in lines:
        groups.setdefault(line.kernel, {}).setdefault(line.arch, []).append(line)
    table = [["kernel", "variants", *(f"sm_{arch}" for arch in archs)], ["---"] * (2 + len(archs))]
    for kernel, found in groups.items():
        variants = {line[2:4] for group in found.values() for line in group}
        table.append([kernel, str(len(variants)), *(_cell(found.get(arch, [])) for arch in archs)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def rewritten(text: str, lines: Sequence[Line]) -> str:
    """The page with the worst cases of these lines.

    Raises:
        ValueError: it has no place for them.
    """
    if len(_SECTION.findall(text)) != 1:
        raise ValueError("expected one pair of <!-- kernels:begin worst --> and <!-- kernels:end -->")
    return _SECTION.sub(lambda match: f"{match['begin']}\n{worst(lines)}\n\n{match['end']}", text)


def update(document: Path, compiled: Mapping[str, Iterable[Any]]) -> None:
    """Put these rows, by file, into the data of a page, and the worst cases into the page."""
    path = data(document)
    lines = replaced(read(path) if path.is_file() else [], compiled)
    document.write_text(rewritten(document.read_text(), lines))
    write(path, lines)
