"""The benchmark: its statistics, its refusal to time wrong results, its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fused_res
from fused_res.benchmarks import agreement, digits, memory, peers, plot, readme, report, runner, suite
from fused_res.benchmarks.cases import SUITES, Case
from fused_res.benchmarks.clocks import Timing
from fused_res.benchmarks.peers import Setup

CPU = torch.device("cpu")
SMALL = Case("small.identity", "bottleneck", 16, 4, 6)
FAST = ("eager NCHW", "eager channels_last", "bare convolutions", "fused_res")


class FakeClock:
    """Runs the steps and reads their times off a list."""

    def __init__(self, times):
        self.times = times

    def time(self, call):
        return Timing(self.times[call()])


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def setup():
    return Setup(SMALL, 2, torch.float32, CPU)


@pytest.fixture
def document(setup):
    document = report.new("fused-res bench --suite small", CPU)
    document["rows"] = runner.run_case(setup, FAST, rounds=5)
    return document


@pytest.mark.parametrize("case", SUITES["resnet18"] + SUITES["resnet50"], ids=lambda case: case.name)
def test_cases_are_those_of_the_network(case):
    with torch.device("meta"):
        block = case.block(case.inplanes, case.planes, case.stride)
    assert block.conv1.in_channels == case.inplanes
    assert case.outplanes == case.planes * block.expansion
    assert case.projection == ("projection" in case.name)
    assert case.size * case.inplanes in (56 * 64, 56 * 256, 28 * 128, 28 * 512, 14 * 256, 14 * 1024, 7 * 512, 7 * 2048)


def test_suites_chain():
    for name in ("resnet18", "resnet50"):
        for before, after in zip(SUITES[name], SUITES[name][1:], strict=False):
            assert (before.outplanes, before.output_size) == (after.inplanes, after.size)
    assert {case.kind for case in SUITES["quick"]} == {"basic", "bottleneck"}
    assert {case.projection for case in SUITES["quick"]} == {True, False}


def test_build_is_the_same_in_every_dtype_and_layout():
    case = Case("small.projection", "basic", 4, 6, 5, 2)
    one = case.build(torch.float32, torch.contiguous_format, CPU, seed=3)
    two = case.build(torch.bfloat16, torch.channels_last, CPU, seed=3)
    assert two.conv1.weight.dtype == torch.bfloat16
    assert two.bn1.weight.dtype == torch.float32
    assert two.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(one.conv1.weight.bfloat16(), two.conv1.weight.contiguous())
    x, grad = case.input(2, torch.bfloat16, torch.channels_last, CPU)
    assert two(x).shape == grad.shape


def test_summary_and_ratios():
    assert runner.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
    assert runner.summary([2.0]) == {"median": 2.0, "q20": 2.0, "q80": 2.0}
    # A machine that slows down tenfold half way leaves the ratios alone, where medians of times would not.
    found = runner.ratios({"a": [1.0, 1.0, 10.0, 10.0], "b": [2.0, 2.0, 20.0, 20.0]})
    assert found["a"]["b"] == {"median": 0.5, "q20": 0.5, "q80": 0.5}
    assert found["b"]["a"]["median"] == 2.0


def test_rounds_interleave_in_changing_order_on_common_inputs():
    calls = []
    steps = {name: lambda i, name=name: calls.append((name, i)) or name for name in "abc"}
    timings = runner.interleave(steps, FakeClock({"a": 1.0, "b": 2.0, "c": 3.0}), rounds=12, sets=3)
    rounds = [calls[n : n + 3] for n in range(0, len(calls), 3)]
    assert len(rounds) == 12
    assert all({name for name, _ in round_} == set("abc") for round_ in rounds)
    assert [{i for _, i in round_} for round_ in rounds] == [{n % 3} for n in range(12)]
    assert len({tuple(name for name, _ in round_) for round_ in rounds}) > 2
    assert [timing.ms for timing in timings["b"]] == [2.0] * 12


def test_time_budget_cuts_rounds_but_not_below_the_least():
    now = iter(range(1000))
    steps, clock = {"a": lambda i: "a"}, FakeClock({"a": 1.0})
    cut = runner.interleave(steps, clock, rounds=30, deadline=4.5, now=lambda: next(now))
    assert runner.MIN_ROUNDS <= len(cut["a"]) < 30
    spent = runner.interleave(steps, clock, rounds=30, deadline=-1.0)
    assert len(spent["a"]) == runner.MIN_ROUNDS


@pytest.mark.parametrize("mode", peers.MODES)
def test_a_case_gives_a_row_per_peer(mode):
    rows = {row["peer"]: row for row in runner.run_case(Setup(SMALL, 2, torch.float32, CPU, mode), FAST, rounds=5)}
    assert list(rows) == list(FAST)
    for name, row in rows.items():
        assert row["reason"] is None
        assert row["rounds"] == 5
        assert row["ms"]["q20"] <= row["ms"]["median"] <= row["ms"]["q80"]
        assert set(row["ratio_to"]) == set(FAST) - {name}
    assert max(rows["fused_res"]["max_relative_error"].values()) < 1e-3
    assert (rows["fused_res"]["saved_bytes"] is None) == (mode == "eval")


def test_a_peer_that_cannot_run_says_why(setup, monkeypatch):
    def broken(setup):
        raise RuntimeError("no compiler at /some/secret/path found\nmore")

    monkeypatch.setitem(peers.REGISTRY, "torch.compile", broken)
    rows = runner.run_case(setup, ("torch.compile", *FAST), rounds=1)
    assert rows[0]["reason"] == "RuntimeError: no compiler at <path> found"
    assert "ms" not in rows[0]
    document = report.new("x", CPU) | {"rows": rows}
    assert "torch.compile not run: RuntimeError: no compiler" in report.markdown(document)


def wrong_block(setup, spoil):
    module = setup.module("channels_last")
    return peers.block_peer(setup, module, "channels_last", lambda x: spoil(module(x)), backend="eager")


SPOILERS = {
    "scaled": lambda out: out * 1.001,
    "clipped": lambda out: out.clamp(max=2.0),
    "wrong gradient": lambda out: out.detach() + out * 1e-3,
    "not a number": lambda out: out * float("nan"),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_wrong_results_are_never_timed(setup, monkeypatch, spoil):
    monkeypatch.setitem(peers.REGISTRY, "fused_res", lambda setup: wrong_block(setup, spoil))
    with pytest.raises(agreement.ResultMismatchError, match="fused_res differs from eager"):
        runner.run_case(setup, FAST, rounds=1)


def test_results_that_go_wrong_during_the_timing_are_caught(setup, monkeypatch):
    calls = []

    def spoil(out):
        calls.append(1)
        return out if len(calls) < 8 else out * 2

    monkeypatch.setitem(peers.REGISTRY, "fused_res", lambda setup: wrong_block(setup, spoil))
    with pytest.raises(agreement.ResultMismatchError):
        runner.run_case(setup, FAST, rounds=5)


def test_another_peer_that_is_wrong_becomes_a_reason(setup, monkeypatch):
    monkeypatch.setitem(peers.REGISTRY, "torch.compile", lambda setup: wrong_block(setup, lambda out: out * 2))
    rows = runner.run_case(setup, ("torch.compile", *FAST), rounds=1)
    assert "differs from eager" in rows[0]["reason"]


def test_saved_bytes_counts_each_storage_once_without_parameters_and_output():
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def forward():
        hidden = linear(x)  # saves x and the weight
        return (hidden * hidden).exp()  # saves hidden twice and the output

    assert memory.saved_bytes(forward, linear) == 2 * x.numel() * 4


def test_result_file_round_trip(document, tmp_path):
    path = tmp_path / "result.json"
    report.save(document, path)
    assert report.load(path) == json.loads(json.dumps(document))
    path.write_text(json.dumps(document | {"schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        report.load(path)


def test_result_file_names_conditions_but_nobody(document):
    text = json.dumps(document)
    assert document["machine"]["cpu"]
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"]["fused_res"] == fused_res.__version__
    assert str(Path.home()) not in text
    assert str(Path(fused_res.__file__).resolve().parents[1]) not in text


def test_plot(document, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    losses = {"eager": [2.0, 1.0], "fused": [2.0, 1.0]}
    for name, extra in (("blocks", {}), ("both", {"digits": {"losses": losses, "accuracy": {"eager": 1.0, "fused": 1.0}}})):
        path = tmp_path / f"{name}.png"
        plot.draw(document | extra, path)
        assert image.imread(path)[..., :3].std() > 0.05


def test_readme_sections_follow_their_files(document, tmp_path, capsys):
    report.save(document, tmp_path / "results" / "small.json")
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:begin results/small.json -->\nstale\n<!-- results:end -->\nafter\n")
    assert readme.main([str(path), "--check"]) == 1
    assert "stale" in path.read_text()
    assert readme.main([str(path)]) == 0
    assert readme.main([str(path), "--check"]) == 0
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| eager NCHW |" in text
    assert "stale" not in text
    path.write_text(text.replace("results:end", "results:ended"))
    assert readme.main([str(path), "--check"]) == 2
    assert "pairs" in capsys.readouterr().err


def test_resume_keeps_rows_of_the_same_run_only(document, tmp_path):
    options = suite.Options(suite="resnet18", device=CPU, output=tmp_path, resume=True).resolved()
    document["command"] = options.command
    report.save(document, options.file)
    assert suite.begin(options)["rows"] == json.loads(json.dumps(document["rows"]))
    assert suite.begin(replace(options, resume=False))["rows"] == []
    report.save(document | {"source": "another"}, options.file)
    assert suite.begin(options)["rows"] == []


def test_few_training_steps_agree_with_eager():
    pytest.importorskip("sklearn")
    calls = []
    result = digits.run(CPU, steps=4, nudges=1, advance=calls.append)
    assert result["passed"]
    assert result["difference"]["fused"] <= result["limit"]
    assert len(result["losses"]["eager"]) == len(result["losses"]["fused"]) == 4
    assert len(calls) == digits.total_steps(steps=4, nudges=1)


def test_wrong_training_is_caught(monkeypatch):
    pytest.importorskip("sklearn")
    network = digits.network
    made = []

    def second_is_wrong(seed=0):
        model = network(seed)
        made.append(model)
        if len(made) == 2:
            model[3].bn1.eps = 1e-3
        return model

    monkeypatch.setattr(digits, "network", second_is_wrong)
    assert not digits.run(CPU, steps=4, nudges=1)["passed"]


@pytest.mark.slow
def test_compiled_peer_runs(setup):
    row = runner.run_case(setup, ("torch.compile", *FAST), rounds=1)[0]
    assert row["reason"] is None or "compiler" in row["reason"].lower()
