"""The tables of docs/kernels.md: what the compiler made of every kernel, one section for each file of kernels.

What stands between `<!-- kernels:begin FILE -->` and `<!-- kernels:end -->` is written by `python -m fused_res.aot --update`.
"""

import re
from collections.abc import Iterable
from typing import Any

# float16 compiles to what bfloat16 does, conversions apart.
DTYPES = ("bfloat16", "float32")
_SECTION = re.compile(r"(?P<begin><!-- kernels:begin (?P<file>\w+) -->\n)(?P<body>.*?)(?P<end><!-- kernels:end -->)", re.DOTALL)


def _cell(row: Any) -> str:
    spilt = f", {row.local} B local" if row.local else ""
    return f"{row.registers}, {row.shared / 1024:.4g}{f', {row.matrix}' if row.matrix else ''}{spilt}"


def section(rows: Iterable[Any], archs: Iterable[int]) -> str:
    """A Markdown table of `fused_res.aot.Row`s: a line for each kernel, variant and dtype, a column for each architecture."""
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row.kernel, row.variant, row.dtype), {})[row.arch] = _cell(row)
    heads = ["kernel", "variant", "dtype", *(f"sm_{arch}" for arch in archs)]
    table = [heads, ["---"] * len(heads), *([*names, *(cells[arch] for arch in archs)] for names, cells in lines.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def files(text: str) -> list[str]:
    """The files of kernels that the document has sections for."""
    return [match["file"] for match in _SECTION.finditer(text)]


def rewritten(text: str, sections: dict[str, str]) -> str:
    """The document with these sections, by file, in place of what they were.

    Raises:
        ValueError: for a file that it has no section for.
    """
    if missing := sorted(sections.keys() - set(files(text))):
        raise ValueError(f"expected <!-- kernels:begin {missing[0]} --> and <!-- kernels:end -->")

    def fresh(match: re.Match) -> str:
        body = sections.get(match["file"])
        return match[0] if body is None else f"{match['begin']}\n{body}\n\n{match['end']}"

    return _SECTION.sub(fresh, text)


def documented(text: str) -> set[tuple[str, ...]]:
    """File, kernel, variant and dtype of every line of the tables."""
    return {
        (match["file"], *(cell.strip() for cell in line.split("|")[1:4]))
        for match in _SECTION.finditer(text)
        for line in match["body"].splitlines()
        if line.startswith("| ") and not line.startswith(("| kernel |", "| --- |"))
    }
