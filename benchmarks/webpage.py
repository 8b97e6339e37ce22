"""An HTML report of result documents in one file that needs no network: sums, speed-ups, roofline, memory, a sortable table."""

from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from fused_res.benchmarks import ceiling, charts, report, sums
from fused_res.benchmarks.peers import BARE, is_ours
from fused_res.benchmarks.plot import colour

COLUMNS = (
    "case",
    "batch",
    "peer",
    "ms",
    "20 %",
    "80 %",
    "x bare",
    "x eager",
    "warm ms",
    "graph ms",
    "wall ms",
    "host ms",
    "img/s",
    "TFLOP/s",
    "GB/s",
    "roofline %",
    "saved MB",
    "peak MB",
    "error",
    "runs as",
)


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _median(row: dict, name: str) -> float | None:
    return row[name]["median"] if row.get(name) else None


def _cells(key: tuple, name: str, peers: dict[str, dict], highest: dict | None) -> list[object]:
    """A row of the table under COLUMNS."""
    row, eager = peers[name], sums.eager_of(peers)
    placed = ceiling.place(row, highest) if highest else {}
    errors = [error for error in row["max_relative_error"].values() if error is not None]
    over = {other: sums.ratio(row, peers[other])["median"] for other in (BARE, eager) if other in peers}
    times = [_median(row, column) for column in ("warm_ms", "graph_ms", "wall_ms", "host_ms")]
    images = row["batch"] / row["ms"]["median"] * 1e3 if row["is_network"] else None
    share = "refused" if placed.get("refused") else _scaled(placed.get("share"), 0.01)
    return [
        key[0],
        key[1],
        name,
        row["ms"]["median"],
        row["ms"]["q20"],
        row["ms"]["q80"],
        over.get(BARE),
        over.get(eager),
        *times,
        images,
        _scaled(placed.get("flops_per_s"), 1e12),
        _scaled(placed.get("bytes_per_s"), 1e9),
        share,
        _scaled(row["saved_bytes"], 1e6),
        _scaled(row["peak_bytes"], 1e6),
        max(errors, default=None),
        row["backend"],
    ]


def _table(document: dict) -> str:
    rows = []
    for key, peers in report.measured(document):
        ran = report.ran(peers)
        rows += [_cells(key, name, ran, document.get("ceiling")) for name in ran]
    used = [c for c in range(len(COLUMNS)) if any(row[c] is not None for row in rows)]
    head = "".join(f'<th scope="col"><button type="button">{escape(COLUMNS[c])}</button></th>' for c in used)
    body = []
    for row in rows:
        cells = []
        for c in used:
            value = row[c]
            number = f' class="n" data-v="{value!r}"' if isinstance(value, int | float) else ""
            cells.append(f"<td{number}>{escape(_shown(value))}</td>")
        ours = ' class="ours"' if is_ours(row[2]) else ""
        body.append(f"<tr{ours}>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _label(key: tuple, several: bool) -> str:
    return f"{key[0]}, {key[1]}" if several else key[0]


def _speedups(groups: list, several: bool) -> str:
    found = []
    for key, peers in groups:
        eager = sums.eager_of(peers)
        bars = []
        for name, row in peers.items():
            if eager is None or name == BARE:
                continue
            value = sums.ratio(peers[eager], row)
            hint = f"{name}: {row['ms']['median']:.4g} ms, {report.interval(value)} times as fast as {eager}"
            bars.append(charts.Bar(value["median"], (value["q20"], value["q80"]), colour(name), hint, is_ours(name)))
        found.append((_label(key, several), bars))
    return charts.bars(found, "times as fast as the faster eager layout: medians, 20 % to 80 % of the rounds", mark=1.0)


def _memory(groups: list, several: bool, field: str, what: str) -> str | None:
    found = [
        (
            _label(key, several),
            [
                charts.Bar(row[field] / 1e6, None, colour(name), f"{name}: {row[field] / 1e6:.4g} MB", is_ours(name))
                for name, row in peers.items()
                if row[field] is not None
            ],
        )
        for key, peers in groups
    ]
    found = [(name, bars) for name, bars in found if bars]
    return charts.bars(found, what, digits=1) if found else None


def _roofline(document: dict, groups: list) -> str | None:
    points, refused = [], 0
    for key, peers in groups:
        for name, row in peers.items():
            placed = ceiling.place(row, document["ceiling"]) if "ceiling" in document else {}
            refused += bool(placed.get("refused"))
            if placed.get("flops_per_s") is None or placed.get("bytes_per_s") is None:
                continue
            share = f", {100 * placed['share']:.0f} % of the roofline"
            hint = f"{key[0]}, batch {key[1]}, {name}: {placed['flops_per_s'] / 1e12:.3g} TFLOP/s{share}"
            points.append(charts.Point(row["flops"] / row["bytes"], placed["flops_per_s"], colour(name), hint))
    if not points:
        return None
    top = document["ceiling"]
    note = f"<p>{refused} rates above the measured ceiling are refused, not drawn.</p>" if refused else ""
    return charts.roofline(points, top["flops_per_s"], top["bytes_per_s"]) + note


def _legend(groups: list) -> str:
    names = dict.fromkeys(name for _, peers in groups for name in peers)
    return " ".join(f'<span class="key"><i style="background:{colour(name)}"></i>{escape(name)}</span>' for name in names)


def _section(document: dict) -> str:
    groups = [(key, report.ran(peers)) for key, peers in report.measured(document)]
    several = len({key[1] for key, _ in groups}) > 1
    first = document["rows"][0] if document["rows"] else {"dtype": "", "mode": ""}
    title = f"{document['suite']}, {first['mode']}, {first['dtype']}"
    parts = [f"<h2>{escape(title)}</h2>", f"<p>{escape(report.conditions(document))}</p>"]
    if "finished" not in document:
        parts.append("<p><strong>This run is not finished.</strong></p>")
    parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in report.summaries(document)) + "</ul>")
    charted = (
        ("Speed-up", _speedups(groups, several)),
        ("Roofline", _roofline(document, groups)),
        ("Activations kept for backward", _memory(groups, several, "saved_bytes", "MB, without the output")),
        ("Most GPU memory held by a step", _memory(groups, several, "peak_bytes", "MB beyond what was held before")),
    )
    for title, chart in charted:
        if chart is not None:
            parts.append(f"<h3>{title}</h3><div class='keys'>{_legend(groups)}</div><div class='wide'>{chart}</div>")
    parts.append(f"<h3>All figures</h3><div class='wide'>{_table(document)}</div>")
    notes = [*report.reasons(document), report.caption(document), f"Reproduce with: {document['command']}"]
    parts += [f"<p class='note'>{escape(note)}</p>" for note in notes]
    return f"<section>{''.join(parts)}</section>"


def page(documents: Sequence[dict]) -> str:
    """The whole page."""
    template = Template(resources.files("fused_res.benchmarks").joinpath("page.html").read_text())
    return template.substitute(sections="".join(map(_section, documents)))
