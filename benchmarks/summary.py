"""One page about a run on a GPU: what passed, the sums of every suite, and fused_res against the others, case by case."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fused_res.benchmarks import outcomes, report, results, sums
from fused_res.benchmarks.peers import BARE, OURS, is_ours
from fused_res.planner import LEVELS

_FIRST_LEVEL = {"conv_": "epilogue", "moment": "moment", "pointwise": "moment"}
"""The first level that uses the kernels whose test files begin so; all levels use the others."""


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


def levels_of(test: str) -> tuple[str, ...]:
    """The levels whose times a failed test makes void: the one that it names, or all that use the kernels it is about."""
    named = [level for level in LEVELS if re.search(rf"\b{level}\b", test.partition("[")[2].replace("-", " "))]
    if named:
        return tuple(named)
    stem = re.search(r"test_(\w+)\.py", test)
    first = next((level for start, level in _FIRST_LEVEL.items() if stem and stem[1].startswith(start)), LEVELS[0])
    return LEVELS[LEVELS.index(first) :]


def void_levels(found: dict[str, dict]) -> dict[str, list[str]]:
    """Of the outcomes of tests: the levels that some test found wrong, and these tests."""
    void: dict[str, list[str]] = {}
    for test, outcome in found.items():
        if outcome["outcome"] == "failed":
            for level in levels_of(test):
                void.setdefault(level, []).append(test)
    return void


def test_lines(output: Path) -> tuple[list[str], dict[str, list[str]]]:
    """What the tests found, in lines, and the levels that are void."""
    found = {test: line for path in sorted(output.glob("*.outcomes.jsonl")) for test, line in outcomes.load(path).items()}
    if not found:
        return [], {}
    count = {kind: sum(line["outcome"] == kind for line in found.values()) for kind in ("passed", "failed", "skipped")}
    void = void_levels(found)
    lines = ["", f"Tests: {', '.join(f'{number} {kind}' for kind, number in count.items())}.", ""]
    lines += [f"**Level {level} is void**: {len(tests)} tests failed that use it.\n" for level, tests in void.items()]
    lines += [f"- failed: `{test.split('/')[-1]}`" for test, line in found.items() if line["outcome"] == "failed"][:40]
    return lines, void


def peer_table(document: dict, void: dict[str, list[str]]) -> list[str]:
    """A markdown table of every case: milliseconds of all peers, by events and, after a stroke, replayed as a CUDA graph."""
    names = list(dict.fromkeys(row["peer"] for row in document["rows"]))

    def head(name: str) -> str:
        levels = {name.removeprefix(f"{OURS} ")} & set(void) if name != OURS else set(void)
        return f"{name} (VOID)" if is_ours(name) and levels else name

    lines = [f"| case | {' | '.join(map(head, names))} |", f"| --- |{' ---: |' * len(names)}"]
    for key, everyone in report.measured(document):

        def cell(name: str, everyone: dict = everyone) -> str:
            row = everyone.get(name)
            if row is None or row["reason"] is not None:
                return "" if row is None else "FAILED" if row.get("failed") else "not run"
            graph = f" / {row['graph_ms']['median']:.3f}" if "graph_ms" in row else ""
            return f"{row['ms']['median']:.3f}{graph}"

        lines.append(f"| {key[0]}, batch {key[1]} | {' | '.join(map(cell, names))} |")
    return lines


def page(output: Path, steps: Sequence[tuple[str, str, str, str]]) -> str:
    """The page of the results in a folder; `steps` are names, what became of them, and seconds, as estimated and as they were."""
    lines = ["# fused_res on this machine", "", "| step | status | estimate [s] | seconds |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {' | '.join(step)} |" for step in steps]
    for path in sorted(output.glob("check*.json")):
        lines += ["", f"{path.stem}: {check_line(path)}"]
    tests, void = test_lines(output)
    lines += tests
    for path in sorted(output.glob("*-*-*.jsonl")):
        if path.name.endswith(".outcomes.jsonl"):
            continue
        try:
            document = results.load(path)
        except ValueError as error:
            lines += ["", f"## {path.stem}", "", f"Not readable: {error}"]
            continue
        unfinished = "" if "finished" in document else " (unfinished)"
        lines += ["", f"## {path.stem}{unfinished}", "", f"{report.conditions(document)}.", "", *peer_table(document, void)]
        lines += ["", *case_lines(document)]
        notes = [*report.sum_lines(document), *report.reasons(document)]
        lines += ["", *(f"- {note}" for note in notes), "", f"`{document['command']}`"]
    lines += ["", "Every figure: `report.html`. Kernel by kernel, the worst cases: `profile.md`."]
    return "\n".join(lines) + "\n"
