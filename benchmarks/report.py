"""What is drawn from a result document: a terminal table, a markdown section, and the parts of both."""

from collections import Counter
from collections.abc import Iterator, Sequence

from fused_res.benchmarks import ceiling, sums
from fused_res.benchmarks.peers import BARE, OURS, is_ours
from fused_res.benchmarks.results import device_name
from fused_res.console import require


def measured(document: dict) -> Iterator[tuple[tuple, dict[str, dict]]]:
    """`(case, batch, dtype, mode)` and its rows by peer, in the order of the file, ours and the bare convolutions last."""
    for key, peers in sums.measured(document):
        yield key, {name: peers[name] for name in sorted(peers, key=lambda name: (name == BARE, is_ours(name)))}


def ran(peers: dict[str, dict]) -> dict[str, dict]:
    return {name: row for name, row in peers.items() if row["reason"] is None}


def conditions(document: dict) -> str:
    """One line: where and with what this was measured."""
    versions, git = document["versions"], document.get("git") or {}
    parts = [device_name(document), f"torch {versions['torch']}", f"fused_res {versions['fused_res']}"]
    if document["gpu"] is not None:
        parts[1:1] = [f"driver {document['gpu'].get('driver_version', 'unknown')}"]
        parts += [f"Triton {versions['triton']}"] if versions["triton"] else []
    if git.get("commit"):
        parts.append(f"commit {git['commit'][:12]}{' with local changes' if git['dirty'] else ''}")
    return ", ".join([*parts, document["created"][:10]])


def interval(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['median']:.{digits}f} [{value['q20']:.{digits}f}-{value['q80']:.{digits}f}]"


COLUMNS = ("peer", "ms", "x bare", "x eager", "graph ms", "wall ms", "img/s", "roofline", "saved MB", "peak MB", "error")
_GAP = 2
PLOTTED = "Time over the time of the bare convolutions"


def _milliseconds(row: dict, column: str = "ms") -> str:
    if column not in row:
        return ""
    value = row[column]["median"]
    return f"{value:.{1 if value >= 10 else 3}f}"


def cells(name: str, peers: dict[str, dict], highest: dict | None = None) -> tuple[str, ...]:
    """A row of the table, under COLUMNS, of a peer that ran; what does not apply is empty. `highest` is the ceiling."""
    row, eager, others = peers[name], sums.eager_of(peers), ran(peers)

    def ratio(other: str | None) -> str:
        if other == name:
            return "1"
        return interval(sums.ratio(row, others[other])) if other in others else ""

    memory = ["" if row[k] is None else f"{row[k] / 1e6:.1f}" for k in ("saved_bytes", "peak_bytes")]
    errors = [error for error in row["max_relative_error"].values() if error is not None]
    error = f"{max(errors):.0e}" if errors and max(errors) > 0 else ""
    images = f"{row['batch'] / row['ms']['median'] * 1e3:.0f}" if row["is_network"] else ""
    placed = ceiling.place(row, highest) if highest else {"share": None, "refused": None}
    share = "refused" if placed["refused"] else "" if placed["share"] is None else f"{100 * placed['share']:.0f} %"
    times = [_milliseconds(row, column) for column in ("graph_ms", "wall_ms")]
    return (name, _milliseconds(row), ratio(BARE), ratio(eager), *times, images, share, *memory, error)


def title(key: tuple, peers: dict[str, dict]) -> str:
    """What a case is, and how often it was measured."""
    rounds = max((row["rounds"] for row in ran(peers).values()), default=0)
    return "{}, batch {}, {}, {}".format(*key) + f", {rounds} rounds"


def reasons(document: dict) -> list[str]:
    """Why peers did not run, and their rates are refused, a line for each reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    total = Counter()
    for (case, batch, *_), peers in measured(document):
        for name, row in peers.items():
            total[name] += 1
            if row["reason"] is not None:
                groups.setdefault((name, row["reason"]), []).append(f"{case} at batch {batch}")
    lines = []
    for (name, reason), where in groups.items():
        shown = "anywhere" if len(where) == total[name] else ", ".join(where[:6]) + (", …" if len(where) > 6 else "")
        lines.append(f"{name} not run {'' if shown == 'anywhere' else 'in '}{shown}: {reason}")
    return lines


def _table(document: dict) -> tuple[list[int], list[tuple[tuple, dict, list[tuple]]]]:
    """Columns that have anything to show, and for every case its key, its rows by peer and their cells."""
    highest = document.get("ceiling")
    found = [(key, peers, [cells(name, peers, highest) for name in ran(peers)]) for key, peers in measured(document)]
    return [c for c in range(len(COLUMNS)) if any(row[c] for *_, rows in found for row in rows)], found


def stacked(widths: Sequence[int], width: int) -> list[list[int]]:
    """Columns of these widths as tables that fit `width`: the first column in each, of the others as many as there is room for."""
    tables, used = [[0]], widths[0]
    for column, needed in enumerate(widths[1:], 1):
        if used + _GAP + needed > width and len(tables[-1]) > 1:
            tables.append([0])
            used = widths[0]
        tables[-1].append(column)
        used += _GAP + needed
    return tables


def print_table(document: dict) -> None:
    """The tables on the terminal, through rich: one per case, or several below each other where one would be too wide."""
    console = require("rich.console").Console(highlight=False)
    console.print(f"{conditions(document)}\n", markup=False)
    columns, found = _table(document)
    widths = [max(len(COLUMNS[c]), *(len(row[c]) for *_, rows in found for row in rows)) for c in columns]
    tables = stacked(widths, console.width) if columns else []
    for key, peers, rows in found:
        console.print(title(key, peers), style="bold", markup=False)
        for chosen in tables:
            table = require("rich.table").Table(box=None, header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False)
            for n in chosen:
                table.add_column(COLUMNS[columns[n]], justify="right" if n else "left", no_wrap=True, min_width=widths[n])
            for row in rows:
                table.add_row(*(row[columns[n]] for n in chosen), style="bold" if is_ours(row[0]) else None)
            console.print(table)
            console.print()
    console.print(*reasons(document), caption(document), *summaries(document), sep="\n", markup=False)


def caption(document: dict) -> str:
    """How to read the table."""
    text = (
        "Medians of interleaved rounds [20 % to 80 % quantile]; ratios are taken round by round. x bare: over the "
        "convolutions alone. x eager: over the faster of the eager layouts. saved: activations kept for backward, without the "
        "output. error: largest relative L2 difference from eager in any result, before or after the timing; single ReLU signs "
        f"flip by rounding. ms: {document['conditions']}."
    )
    if "ceiling" in document:
        top = document["ceiling"]
        text += (
            " roofline: least time for the step's bytes and FLOPs at this machine's measured "
            f"{top['bytes_per_s'] / 1e9:.3g} GB/s and {top['flops_per_s'] / 1e12:.3g} TFLOP/s ({top['how']}), over its time, "
            "FLOPs as plain sums take them (docs/winograd.md saves some); refused where a rate is well above what was measured."
        )
    if sums.sums(document, document["suite"]):
        text += (
            " Time beyond the bare convolutions over eager's: the sum over the cases of fused_res less the bare convolutions, over "
            "that of the faster eager layout less the bare convolutions; 0 is all but the convolutions for free."
        )
    if document["gpu"] is not None:
        text += " graph: replayed as a CUDA graph. wall: from an idle GPU until it is idle again, the host's work included."
    return text


def summaries(document: dict) -> list[str]:
    """What fused_res ran on, the sums, and what the check and the training run found, a line each, where they were run."""
    ran_as = Counter(row["backend"] for row in document["rows"] if row["peer"] == OURS and row["reason"] is None)
    lines = []
    if ran_as:
        found = "; ".join(f"{backend} ({count} of {ran_as.total()})" for backend, count in ran_as.items())
        lines.append(f"fused_res ran as: {found}.")
    lines += sum_lines(document) + host_lines(document) + call_lines(document)
    if check := document.get("check"):
        verdict = "passed" if check["passed"] else "FAILED"
        largest = "not finite" if check["worst"] is None else f"at {check['worst']:.2f} of its limit"
        lines.append(f"Numerical check against fp64: {verdict}, {check['compared']} comparisons, worst {largest}.")
    if digits := document.get("digits"):
        verdict = "passed" if digits["passed"] else "FAILED"
        lines.append(
            f"Training on digits: {verdict}. Test accuracy {100 * digits['accuracy']['fused']:.1f} % fused, "
            f"{100 * digits['accuracy']['eager']:.1f} % eager. Losses of the first {digits['window']} steps differ by "
            f"{digits['difference']['fused']:.1e} at most, eager's own, disturbed by one ulp, by up to {digits['natural']:.1e}."
        )
    return lines


def host_lines(document: dict) -> list[str]:
    """The host's share of the wall time of a step on a GPU, `1 - ms / wall`, a line for each case whose wall time was measured."""
    lines = []
    for (case, batch, *_), peers in measured(document):
        walls = {name: row for name, row in ran(peers).items() if "wall_ms" in row}
        if walls:
            shares = {name: max(0.0, 1 - row["ms"]["median"] / row["wall_ms"]["median"]) for name, row in walls.items()}
            found = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
            lines.append(f"The host's share of the wall time, {case}, batch {batch}: {found}. A CUDA graph takes it away.")
    return lines


def call_lines(document: dict) -> list[str]:
    """What a step asked of the host (`calls.count`), a line for each case in which it was counted."""
    lines = []
    for (case, batch, *_), peers in measured(document):
        counts = {name: row["host"] for name, row in ran(peers).items() if "host" in row}
        if counts:
            shown = "{calls} functions in {files} files, {operators} operators of which {views} make views"
            found = "; ".join(f"{name} {shown.format(**count)}" for name, count in counts.items())
            lines.append(f"Called by a step, {case}, batch {batch}: {found}.")
    return lines


def sum_lines(document: dict) -> list[str]:
    """The time beyond the bare convolutions, ours over eager's, a line for each of `sums.sums`."""
    lines = []
    for row in sums.sums(document, document["suite"]):
        what = f"{row['peer']}, batch {row['batch']}, {row['dtype']}, {row['mode']}, {row['cases']} cases, {row['counting']}"
        value = row["value"]
        shown = "eager's is not positive" if value is None else f"{value['ratio']:.2f} [{value['q20']:.2f}-{value['q80']:.2f}]"
        lines.append(f"Time beyond the bare convolutions over eager's ({what}): {shown}.")
    return lines


def markdown(document: dict, picture: str | None = None) -> str:
    """The section that README shows: conditions, tables, findings, the command, and the plot where there is one."""
    columns, found = _table(document)
    lines = [f"{conditions(document)}.", ""]
    lines.append("| " + " | ".join(COLUMNS[c] for c in columns) + " |")
    lines.append("| " + " | ".join("---" if c == 0 else "---:" for c in columns) + " |")
    for key, peers, rows in found:
        lines.append(f"| **{title(key, peers)}** |" + " |" * (len(columns) - 1))
        for row in rows:
            lines.append("| " + " | ".join(f"**{row[c]}**" if is_ours(row[0]) and row[c] else row[c] for c in columns) + " |")
    if notes := reasons(document):
        lines += ["", *(f"- {note}" for note in notes)]
    for line in (caption(document), *summaries(document), f"Reproduce with `{document['command']}`."):
        lines += ["", line]
    if picture is not None:
        lines += ["", f"![{PLOTTED}]({picture})"]
    return "\n".join(lines)
