"""What is made of result files: the comparison of two, and the HTML report."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from fused_res import cli
from fused_res.benchmarks import calls, charts, clocks, compare, headline, plot, report, results, sums, webpage
from fused_res.benchmarks.cases import occurrences
from fused_res.benchmarks.sums import summary

CPU = torch.device("cpu")
TIMES = [10.0, 10.2, 9.9, 10.1, 10.0, 10.3, 9.8, 10.0]
PEERS = {"eager NCHW": 1.2, "eager channels_last": 1.0, "fused_res": 0.8, "fused_res bn_act": 0.8, "bare convolutions": 0.6}


def row(case, peer, factor):
    times = [factor * value for value in TIMES]
    return {
        "case": case,
        "batch": 8,
        "dtype": "fp32",
        "mode": "train",
        "is_network": False,
        "peer": peer,
        "reason": None,
        "layout": "channels_last",
        "backend": "native, bn_act",
        "rounds": len(times),
        "times": times,
        "ms": summary(times),
        "host_ms": None,
        "saved_bytes": 10_000_000,
        "peak_bytes": None,
        "max_relative_error": {"before": 1e-6, "after": 1e-6},
        "flops": 1e9,
        "bytes": 1e8 * factor,
    }


def make(speed=1.0, ours=1.0, rates=(1e12, 1e11)):
    """A document; the machine runs at `speed`, fused_res takes `ours` times as long as it did."""
    rows = [
        row(case, peer, factor / speed * (ours if peer == "fused_res" and case == "one" else 1.0))
        for case in ("one", "two")
        for peer, factor in PEERS.items()
    ]
    missing = {**row("two", "OpenVINO", 1.0), "reason": "<b>not installed</b>"}
    head = {"suite": "quick", "conditions": clocks.CpuClock.conditions, "finished": "now"}
    ceiling = {"flops_per_s": rates[0], "bytes_per_s": rates[1], "how": "guessed"}
    return results.new("fused-res bench --suite quick", CPU) | head | {"rows": [*rows, missing], "ceiling": ceiling}


def write(path, document):
    results.begin({key: value for key, value in document.items() if key not in ("finished", "ceiling")}, path)
    copy = document | {"rows": []}
    for key in ("rows", "ceiling", "finished"):
        results.append(copy, path, key, document[key])
    return str(path)


def verdicts(rows):
    return {(found["case"], found["peer"]): found["verdict"] for found in rows if found["verdict"]}


def test_a_slower_machine_is_no_regression():
    assert verdicts(compare.compare(make(), make(speed=0.5))) == {
        ("one", "bare convolutions"): "REGRESSED",
        ("two", "bare convolutions"): "REGRESSED",
    }


@pytest.mark.parametrize(("ours", "verdict"), [(1.2, "REGRESSED"), (0.8, "improved"), (1.02, "")])
def test_regressions_are_marked(ours, verdict):
    rows = compare.compare(make(), make(speed=2.0, ours=ours), names=["fused_res"])
    found = next(row for row in rows if row["case"] == "one")
    assert found["ratio"] == pytest.approx(ours)
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["verdict"] == verdict
    assert found["of"] == "x bare"
    assert next(row for row in rows if row["case"] == "two")["verdict"] == ""


def test_noise_is_no_regression():
    value = compare.ratio_of_medians([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.5, 2.5, 3.5, 4.5, 5.5, 6.5])
    assert value["ratio"] > 1.1
    assert compare.verdict(value, 0.03) == ""


def test_compare_on_the_command_line(tmp_path, capsys):
    old, new = write(tmp_path / "old.jsonl", make()), write(tmp_path / "new.jsonl", make(ours=1.5))
    arguments = ["bench", "compare", old, new, "--peers", "fused_res"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "REGRESSED" in text
    assert "1 regressed, 0 improved, of 2" in text
    assert cli.main([*arguments, "--fail"]) == 1
    assert cli.main([*arguments, "--fail", "--tolerance", "0.6"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert cli.main(["bench", "compare", old, new, "--peers", "nobody"]) == 2
    assert cli.main(["bench", "compare", old, str(tmp_path / "missing.jsonl")]) == 2


class Page(HTMLParser):
    """Counts tags and keeps what would be loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_well_formed():
    text = webpage.page([make(), make(speed=2.0)])
    page = Page(text)
    assert not page.open
    assert not page.links
    assert "://" not in text
    assert page.tags["section"] == 2
    assert page.tags["svg"] == 2 * 3  # speed-up, roofline, kept activations; no GPU memory on a CPU
    assert page.tags["circle"] == 2 * 2 * len(PEERS)
    assert page.tags["table"] == 2
    assert page.tags["tr"] == 2 * (1 + 2 * len(PEERS))
    assert "&lt;b&gt;not installed" in text
    assert "<b>not installed" not in text


def test_the_page_shows_what_was_measured():
    text = webpage.page([make()])
    cells = re.search(r"<tr class=\"ours\"><td>one</td>.*?</tr>", text)[0]
    assert 'data-v="8.0' in cells
    assert re.search(r">0\.8</td>", cells)
    assert ">1.25</text>" in text


def test_refused_rates_are_not_drawn():
    page = webpage.page([make(rates=(1e9, 1e6))])
    assert "<circle" not in page
    assert "refused" in page


def test_axis_steps():
    assert charts.nice_step(6.0) == 1
    assert charts.nice_step(0.7) == pytest.approx(0.2)
    assert charts.nice_step(83.5) == 20


def test_report_on_the_command_line(tmp_path, capsys):
    written = tmp_path / "new" / "page.html"
    files = [write(tmp_path / f"{n}.jsonl", make()) for n in range(2)]
    assert cli.main(["bench", "report", *files, "--output", str(written)]) == 0
    assert written.read_text().startswith("<!DOCTYPE html>")
    assert cli.main(["bench", "report", str(tmp_path / "none.jsonl"), "--output", str(written)]) == 2
    assert "none.jsonl" in capsys.readouterr().err


NINE = (
    "eager NCHW",
    "eager channels_last",
    "torch.compile",
    "torch.compile max-autotune",
    "bare convolutions",
    "fused_res",
    "fused_res bn_act",
    "fused_res epilogue",
    "fused_res prologue",
    "fused_res moment",
)
"""Nine peers, and what they are compared with."""


def wide():
    """A document with every column there is."""
    document = make()
    document["rows"] = []
    for case, slow in (("one", 1.0), ("a.longer.one", 1e3)):
        for name in NINE:
            times = {column: summary([slow * value for value in TIMES]) for column in ("graph_ms", "wall_ms")}
            document["rows"].append(row(case, name, slow) | times | {"peak_bytes": 3_000_000_000, "is_network": True})
    return document


@pytest.mark.parametrize("width", [50, 80, 100, 300])
def test_tables_fit_the_terminal_and_lose_nothing(width, monkeypatch, capsys):
    document = wide()
    monkeypatch.setenv("COLUMNS", str(width))
    report.print_table(document)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    words = set(text.split())
    for column in report.COLUMNS:
        assert set(column.split()) <= words, column
    for _, peers in report.measured(document):
        for name in peers:
            for cell in report.cells(name, peers, document["ceiling"]):
                assert set(cell.split()) <= words, (name, cell)
    tables = sum(line.startswith("peer ") for line in lines)
    assert (tables == 2) == (width == 300)


def test_where_there_is_no_terminal_tables_are_80_wide(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    report.print_table(wide())
    assert 60 < max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_columns_are_spread_over_as_few_tables_as_fit():
    assert report.stacked([10, 5, 5, 5], 31) == [[0, 1, 2, 3]]
    assert report.stacked([10, 5, 5, 5], 30) == [[0, 1, 2], [0, 3]]
    assert report.stacked([10, 50, 50], 30) == [[0, 1], [0, 2]]


@pytest.mark.parametrize("losses", [False, True])
def test_the_legend_of_nine_peers_lies_within_the_plot(losses):
    pytest.importorskip("matplotlib")
    document = wide()
    if losses:
        document["digits"] = {"losses": {"eager": [2.0, 1.0], "fused": [2.0, 1.0]}, "accuracy": {"eager": 1.0, "fused": 1.0}}
    figure = plot.figure(document)
    figure.draw_without_rendering()
    legend = figure.legends[0]
    assert len(legend.get_texts()) == len(NINE)
    page = figure.bbox
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert page.x0 <= box.x0 < box.x1 <= page.x1, text.get_text()
        assert page.y0 <= box.y0 < box.y1 <= page.y1, text.get_text()


def blocks(network, mode="train"):
    """A document of a network's blocks. Ours take 1, 2, … times TIMES in turn, eager 2 more, the bare convolutions 1 less."""
    document = make()
    rows = []
    for n, case in enumerate(occurrences(network), 1):
        for name, factor in (
            ("fused_res", n),
            ("eager NCHW", n + 5),
            ("eager channels_last", n + 2),
            ("bare convolutions", n - 0.5),
        ):
            rows.append(row(case.name, name, factor) | {"mode": mode, "saved_bytes": None if mode == "eval" else 1000 * factor})
    return document | {"suite": network, "rows": rows}


def test_all_blocks_of_a_network_weigh_as_often_as_they_occur():
    counts = list(occurrences("resnet50").values())
    ours = sum(n * count for n, count in enumerate(counts, 1))
    found = sums.whole(blocks("resnet50"), "resnet50")
    assert found["blocks"] == 16
    assert found["eager"]["ratio"] == pytest.approx(ours / (ours + 2 * 16))
    assert found["bare"]["ratio"] == pytest.approx(ours / (ours - 0.5 * 16))
    assert found["eager"]["q20"] == pytest.approx(found["eager"]["q80"])
    assert found["saved"] == pytest.approx(ours / (ours + 2 * 16))
    text = headline.sentence(blocks("resnet50"), "results/some.jsonl")
    assert f"takes {ours / (ours + 32):.2f} [" in text
    assert "[some.jsonl](results/some.jsonl)" in text
    assert "kept for backward" not in headline.sentence(blocks("resnet18", "eval"), "results/some.jsonl")


def test_no_sentence_about_blocks_that_are_not_all_there():
    document = blocks("resnet18")
    with pytest.raises(ValueError, match="got the suite quick"):
        headline.sentence(document | {"suite": "quick"}, "some.jsonl")
    document["rows"] = [found for found in document["rows"] if found["case"] != "resnet18.3.identity"]
    with pytest.raises(ValueError, match=r"resnet18\.3\.identity at batch 8: expected fused_res, eager and bare convolutions"):
        headline.sentence(document, "some.jsonl")


def test_what_a_step_calls_is_counted():
    def leaf():
        return torch.ones(2).neg()

    def step():
        return leaf(), leaf().view(1, 2)

    found = calls.count(step)
    assert found["calls"] == 3
    assert found["files"] == 1
    assert found["views"] == 1
    assert found["operators"] >= 5
    document = {
        "rows": [{"peer": "fused_res", "case": "a", "batch": 1, "dtype": "fp32", "mode": "train", "reason": None, "host": found}]
    }
    line = f"a, batch 1: fused_res 3 functions in 1 files, {found['operators']} operators of which 1 make views"
    assert report.call_lines(document) == [f"Called by a step, {line}."]
