"""The tables of docs/kernels.md: what the compiler made of every kernel, a section for each file of kernels, and the worst cases.

What stands between `<!-- kernels:begin NAME -->` and `<!-- kernels:end -->` is written by `python -m fused_res.aot --update`.
"""

import re
from collections.abc import Iterable
from typing import Any

# The section that has the worst case of each kernel, computed from the cells of the other sections.
WORST = "worst"
_SECTION = re.compile(r"(?P<begin><!-- kernels:begin (?P<file>\w+) -->\n)(?P<body>.*?)(?P<end><!-- kernels:end -->)", re.DOTALL)
_CELL = re.compile(r"(?P<registers>\d+), (?P<shared>[\d.]+)(?:, (?P<matrix>[a-z][\w+ ]*))?(?:, (?P<local>\d+) B local)?")


def _cell(registers: int, shared: float, matrix: str, local: int) -> str:
    """Registers of a thread, KiB of shared memory of a block, the matrix instruction and bytes of local memory, if any."""
    return f"{registers}, {shared:.4g}{f', {matrix}' if matrix else ''}{f', {local} B local' if local else ''}"


def _table(heads: list[str], lines: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


def section(rows: Iterable[Any]) -> str:
    """A folded Markdown table of `fused_res.aot.Row`s: a line for each kernel, variant and dtype, a column for each `arch`."""
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        cell = _cell(row.registers, row.shared / 1024, row.matrix, row.local)
        lines.setdefault((row.kernel, row.variant, row.dtype), {})[row.arch] = cell
    archs = sorted({arch for cells in lines.values() for arch in cells})
    heads = ["kernel", "variant", "dtype", *(f"sm_{arch}" for arch in archs)]
    table = _table(heads, ((*names, *(cells[arch] for arch in archs)) for names, cells in lines.items()))
    return f"<details><summary>{len(lines)} variants</summary>\n\n{table}\n\n</details>"


def files(text: str) -> list[str]:
    """The files of kernels that the document has sections for."""
    return [match["file"] for match in _SECTION.finditer(text) if match["file"] != WORST]


def _lines(body: str) -> list[list[str]]:
    """Cells of the lines of a table, its head and rule left out."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("| ")]
    return lines[2:]


def documented(text: str) -> set[tuple[str, ...]]:
    """File, kernel, variant and dtype of every line of the tables."""
    sections = [match for match in _SECTION.finditer(text) if match["file"] != WORST]
    return {(match["file"], *cells[:3]) for match in sections for cells in _lines(match["body"])}


def _worst(cells: Iterable[str]) -> str:
    """The most registers, shared and local memory of all these cells, and every matrix instruction; "none" where some lack one."""
    found = [_CELL.fullmatch(cell) for cell in cells]
    matrix = sorted({match["matrix"] or "none" for match in found})
    return _cell(
        max(int(match["registers"]) for match in found),
        max(float(match["shared"]) for match in found),
        "" if matrix == ["none"] else " or ".join(matrix),
        max(int(match["local"] or 0) for match in found),
    )


def worst(text: str) -> str:
    """A Markdown table of the worst case of each kernel on each architecture, over all its variants and dtypes in the document."""
    groups: dict[str, list[list[str]]] = {}
    archs: list[str] = []
    for match in _SECTION.finditer(text):
        if match["file"] != WORST and (lines := _lines(match["body"])):
            archs = re.findall(r"sm_\d+", match["body"])[: len(lines[0]) - 3]
            for kernel, _, _, *cells in lines:
                groups.setdefault(kernel, []).append(cells)
    table = ((kernel, str(len(lines)), *map(_worst, zip(*lines, strict=True))) for kernel, lines in groups.items())
    return _table(["kernel", "variants", *archs], table)


def rewritten(text: str, sections: dict[str, str]) -> str:
    """The document with these sections, by file, in place of what they were, and the worst cases of what it has then.

    Raises:
        ValueError: for a file that it has no section for.
    """

    def replaced(text: str, sections: dict[str, str]) -> str:
        if missing := sorted(sections.keys() - {match["file"] for match in _SECTION.finditer(text)}):
            raise ValueError(f"expected <!-- kernels:begin {missing[0]} --> and <!-- kernels:end -->")

        def fresh(match: re.Match) -> str:
            body = sections.get(match["file"])
            return match[0] if body is None else f"{match['begin']}\n{body}\n\n{match['end']}"

        return _SECTION.sub(fresh, text)

    text = replaced(text, sections)
    return replaced(text, {WORST: worst(text)})
