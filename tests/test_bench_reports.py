"""What is made of result files: the comparison of two, and the HTML report."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from fused_res import cli
from fused_res.benchmarks import charts, clocks, compare, results, webpage
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
