"""One page about a run on a GPU: what passed, the sums of every suite, and fused_res against the others, case by case."""

import json
from collections.abc import Sequence
from pathlib import Path

from fused_res.benchmarks import report, results, sums
from fused_res.benchmarks.peers import BARE, OURS, is_ours


def check_line(path: Path) -> str:
    """What `fused-res check --json` found."""
    found = json.loads(path.read_text())
    worst = "not finite" if found["worst"] is None else f"at {found['worst']:.2f} of its limit"
    verdict = "passed" if found["passed"] else "FAILED"
    return f"Numerical check on {found['device']}: {verdict}, {found['compared']} comparisons, worst {worst}."


def _fastest(ran: dict[str, dict], names: Sequence[str]) -> str | None:
    return min(names, key=lambda name: ran[name]["ms"]["median"], default=None)


def _case(case: str, batch: int, ran: dict[str, dict]) -> str:
    """fused_res in one case: its level, over its bare convolutions, over eager and the best other peer, and the best level."""
    ours = ran[OURS]

    def over(name: str | None) -> str:
        return "" if name not in ran else report.interval(sums.ratio(ours, ran[name]))

    other = _fastest(ran, [name for name in ran if not is_ours(name) and name != BARE])
    level = _fastest(ran, [name for name in ran if is_ours(name) and name != OURS])
    best = "" if other is None else f"{over(other)} ({other})"
    chosen = "" if level is None else f"{over(level)} ({level.removeprefix(f'{OURS} ')})"
    ran_at, median = ", ".join(way.split(", ")[-1] for way in (ours["backend"] or "").split("; ")), ours["ms"]["median"]
    shown = f"{median:.{0 if median >= 100 else 1}f}"
    cells = (case, str(batch), ran_at, shown, over(BARE), over(sums.eager_of(ran)), best, chosen)
    return f"| {' | '.join(cells)} |"


def case_lines(document: dict) -> list[str]:
    """A markdown table of fused_res in every case it ran in."""
    head = ("case", "batch", "level", "ms", "x bare", "x eager", "x best other", "x best level")
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | --- | ---: | ---: | ---: | --- | --- |"]
    found = ((key, report.ran(everyone)) for key, everyone in report.measured(document))
    return lines + [_case(*key[:2], ran) for key, ran in found if OURS in ran]


def sum_table(document: dict) -> list[str]:
    """A markdown table of `sums.sums`: a line for what ran, a column for how the cases are counted."""
    values: dict[str, dict[str, str]] = {}
    for row in sums.sums(document, document["suite"]):
        shown = "" if row["value"] is None else report.interval(row["value"] | {"median": row["value"]["ratio"]})
        values.setdefault(f"{row['peer']} | {row['batch']}", {})[row["counting"]] = shown
    if not values:
        return []
    columns = list(dict.fromkeys(counting for found in values.values() for counting in found))
    head = ("time beyond the bare convolutions, over eager's", "batch", *columns)
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return lines + [f"| {name} | {' | '.join(found.get(column, '') for column in columns)} |" for name, found in values.items()]


def section(document: dict) -> str:
    """What a document shows of a suite: conditions, a line for each case, the sums, and the command."""
    lines = [f"{report.conditions(document)}.", "", *case_lines(document)]
    if table := sum_table(document):
        lines += ["", *table]
    for note in (*report.reasons(document), f"`{document['command']}`"):
        lines += ["", note]
    return "\n".join(lines)


def page(output: Path, slices: Sequence[tuple[str, str, str]]) -> str:
    """The page of the results in a folder; `slices` are names, what became of them, and seconds."""
    lines = ["# fused_res on this machine", "", "| slice | status | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {name} | {status} | {seconds} |" for name, status, seconds in slices]
    if (output / "check.json").is_file():
        lines += ["", check_line(output / "check.json")]
    for path in sorted(output.glob("*.jsonl")):
        document = results.load(path)
        unfinished = "" if "finished" in document else " (unfinished)"
        lines += ["", f"## {path.stem}{unfinished}", "", f"{report.conditions(document)}.", "", *case_lines(document)]
        notes = [*report.sum_lines(document), *report.reasons(document)]
        lines += ["", *(f"- {note}" for note in notes), "", f"`{document['command']}`"]
    lines += ["", "Every figure: `report.html`. Kernel by kernel, the worst cases: `profile.md`."]
    return "\n".join(lines) + "\n"
