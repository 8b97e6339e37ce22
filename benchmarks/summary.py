"""One page about a run on a GPU: what passed, the sums of every suite, and fused_res against the others, case by case."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from fused_res.benchmarks import outcomes, report, results, sums
from fused_res.benchmarks.peers import BARE, OURS, is_ours
from fused_res.benchmarks.void import Way, by_rows, by_tests, is_void

SHOWN = 40
"""Failed tests that are named."""


def check_line(path: Path) -> str:
    """What `fused-res check --json` found."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return "Numerical check: FAILED, it wrote no result."
    worst = "not finite" if found["worst"] is None else f"at {found['worst']:.2f} of its limit"
    verdict = "passed" if found["passed"] else "FAILED"
    return f"Numerical check on {found['device']}: {verdict}, {found['compared']} comparisons, worst {worst}."


def _fastest(ran: dict[str, dict], names: Sequence[str]) -> str | None:
    return min(names, key=lambda name: ran[name]["ms"]["median"], default=None)


def _case(case: str, batch: int, ran: dict[str, dict], void: Collection[Way]) -> str:
    """fused_res in one case: its level, over its bare convolutions, over eager and the best other peer, and the best level.

    Void levels are not the best.
    """
    ours = ran[OURS]

    def over(name: str | None) -> str:
        return "" if name not in ran else report.interval(sums.ratio(ours, ran[name]))

    other = _fastest(ran, [name for name in ran if not is_ours(name) and name != BARE])
    level = _fastest(ran, [name for name in ran if is_ours(name) and name != OURS and not is_void(ran[name], void)])
    best = "" if other is None else f"{over(other)} ({other})"
    chosen = "" if level is None else f"{over(level)} ({level.removeprefix(f'{OURS} ')})"
    ran_at, median = ", ".join(way.split(", ")[-1] for way in (ours["backend"] or "").split("; ")), ours["ms"]["median"]
    shown = f"{median:.{0 if median >= 100 else 1}f}"
    shown += " VOID" if is_void(ours, void) else ""
    cells = (case, str(batch), ran_at, shown, over(BARE), over(sums.eager_of(ran)), best, chosen)
    return f"| {' | '.join(cells)} |"


def case_lines(document: dict, void: Collection[Way] = ()) -> list[str]:
    """A markdown table of fused_res in every case it ran in; `void` are backends and levels whose times mean nothing."""
    head = ("case", "batch", "level", "ms", "x bare", "x eager", "x best other", "x best level")
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | --- | ---: | ---: | ---: | --- | --- |"]
    found = ((key, report.ran(everyone)) for key, everyone in report.measured(document))
    return lines + [_case(*key[:2], ran, void) for key, ran in found if OURS in ran]


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
    """What a document shows of a suite: conditions, a line for each case, the sums, what was counted, and the command."""
    lines = [f"{report.conditions(document)}.", "", *case_lines(document)]
    if table := sum_table(document):
        lines += ["", *table]
    for note in (*report.reasons(document), *report.call_lines(document), f"`{document['command']}`"):
        lines += ["", note]
    return "\n".join(lines)


def test_lines(found: dict[str, dict]) -> list[str]:
    """How many of the tests passed, and which failed; nothing where there are none."""
    if not found:
        return []
    count = {kind: sum(line["outcome"] == kind for line in found.values()) for kind in ("passed", "failed", "skipped")}
    failed = [test.split("/")[-1] for test, line in found.items() if line["outcome"] == "failed"]
    lines = ["", f"Tests: {', '.join(f'{number} {kind}' for kind, number in count.items())}.", ""]
    lines += [f"- failed: `{test}`" for test in failed[:SHOWN]]
    return lines + ([f"- and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else [])


def void_lines(found: dict[Way, list[str]]) -> list[str]:
    """Which times are void, and why."""
    lines = []
    for (backend, level), reasons in found.items():
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        why = ", ".join(f"`{reason.split('/')[-1]}`" for reason in reasons[:3])
        lines += ["", f"**{backend}, {level} is VOID**, wherever it was timed: {why}{more} failed."]
    return lines


def peer_table(document: dict, void: Collection[Way]) -> list[str]:
    """A markdown table of every case: milliseconds of all peers, by events and, after a stroke, replayed as a CUDA graph."""
    names = list(dict.fromkeys(row["peer"] for row in document["rows"]))

    def cell(row: dict | None) -> str:
        if row is None or row["reason"] is not None:
            return "" if row is None else "FAILED" if row.get("failed") else "not run"
        graph = f" / {row['graph_ms']['median']:.3f}" if "graph_ms" in row else ""
        return f"{row['ms']['median']:.3f}{graph}{' VOID' if is_void(row, void) else ''}"

    lines = [f"| case | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for key, everyone in report.measured(document):
        lines.append(f"| {key[0]}, batch {key[1]} | {' | '.join(cell(everyone.get(name)) for name in names)} |")
    return lines


def _sum_lines(document: dict, void: Collection[Way]) -> list[str]:
    unsound = {row["peer"] for row in document["rows"] if row["reason"] is None and is_void(row, void)}
    rows = sums.sums(document, document["suite"])
    return [
        f"{'VOID: ' if row['peer'] in unsound else ''}{line}" for row, line in zip(rows, report.sum_lines(document), strict=True)
    ]


def _documents(output: Path) -> Iterator[tuple[str, dict | str]]:
    """The name of every result file and what it holds, or why it cannot be read."""
    for path in sorted(output.glob("*-*-*.jsonl")):
        if not path.name.endswith(".outcomes.jsonl"):
            try:
                yield path.stem, results.load(path)
            except ValueError as error:
                yield path.stem, f"not readable: {error}"


def page(output: Path, steps: Sequence[tuple[str, str, str, str]]) -> str:
    """The page of the results in a folder; `steps` are names, what became of them, and seconds, as estimated and as they were."""
    lines = ["# fused_res on this machine", "", "| step | status | estimate [s] | seconds |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {' | '.join(step)} |" for step in steps]
    for path in sorted(output.glob("check*.json")):
        lines += ["", f"{path.stem}: {check_line(path)}"]
    found = {test: line for path in sorted(output.glob("*.outcomes.jsonl")) for test, line in outcomes.load(path).items()}
    documents, unsound = dict(_documents(output)), by_tests(found)
    for document in documents.values():
        for way, where in by_rows(document["rows"] if isinstance(document, dict) else ()):
            unsound.setdefault(way, []).append(where)
    lines += [*test_lines(found), *void_lines(unsound)]
    for name, document in documents.items():
        if isinstance(document, str):
            lines += ["", f"## {name}", "", document]
            continue
        unfinished = "" if "finished" in document else " (unfinished)"
        lines += ["", f"## {name}{unfinished}", "", f"{report.conditions(document)}.", "", *peer_table(document, unsound)]
        lines += ["", *case_lines(document, unsound)]
        notes = [*_sum_lines(document, unsound), *report.reasons(document)]
        lines += ["", *(f"- {note}" for note in notes), "", f"`{document['command']}`"]
    lines += ["", "Every figure: `report.html`. Kernel by kernel, the worst cases: `profile.md`."]
    return "\n".join(lines) + "\n"
