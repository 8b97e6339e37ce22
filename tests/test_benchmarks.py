"""The benchmark: its statistics, its refusal to time wrong results, its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fused_res
from fused_res import planner, use_backend
from fused_res.benchmarks import (
    agreement,
    ceiling,
    clocks,
    digits,
    memory,
    peers,
    plot,
    readme,
    report,
    results,
    runner,
    suite,
    sums,
    traffic,
)
from fused_res.benchmarks.cases import NETWORKS, SUITES, Case, Network, occurrences
from fused_res.benchmarks.clocks import Timing
from fused_res.benchmarks.peers import Setup

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = Case("small.identity", "bottleneck", 16, 4, 6)
TINY = Network("tiny", "basic", (1, 1, 1, 1))
FAST = ("eager NCHW", "eager channels_last", "bare convolutions", "fused_res")


class FakeClock(clocks.CpuClock):
    """Runs the steps and reads their times off a list."""

    def __init__(self, times):
        self.times = times

    def time(self, call):
        return Timing(self.times[call()])


@pytest.fixture
def setup():
    return Setup(SMALL, 2, torch.float32, CPU)


def new_document():
    return results.new("fused-res bench --suite small", CPU) | {"suite": "small", "conditions": clocks.CpuClock.conditions}


def spoiled(monkeypatch, name, make):
    monkeypatch.setitem(peers.REGISTRY, name, peers.REGISTRY[name]._replace(make=make))


@pytest.fixture
def document(setup):
    return new_document() | {"rows": runner.run_case(setup, FAST, rounds=5)}


@pytest.mark.parametrize("case", [*SUITES["full"], *SUITES["resnetv2_50"]], ids=lambda case: case.name)
def test_cases_are_blocks_as_their_class_makes_them(case):
    with torch.device("meta"):
        block = case.module()
    assert block.conv1.in_channels == case.inplanes
    assert block.conv1.out_channels == case.width
    assert block.conv2.groups == case.groups
    assert case.outplanes == case.planes * block.expansion
    assert case.projection == ("projection" in case.name) == (block.downsample is not None)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_torchvisions_parameters(name):
    count = {
        "resnet18": 11_689_512,
        "resnet34": 21_797_672,
        "resnet50": 25_557_032,
        "resnet101": 44_549_160,
        "wide_resnet50_2": 68_883_240,
        "resnext50_32x4d": 25_028_904,
    }
    with torch.device("meta"):
        network = NETWORKS[name].module()
    assert sum(parameter.numel() for parameter in network.parameters()) == count[name]
    assert sum(occurrences(name).values()) == sum(NETWORKS[name].layers)


def test_suites_chain():
    for name in NETWORKS:
        for before, after in zip(SUITES[name], SUITES[name][1:], strict=False):
            assert (before.outplanes, before.output_size) == (after.inplanes, after.size)
    assert {case.kind for case in SUITES["quick"]} == {"basic", "bottleneck"}
    assert {case.projection for case in SUITES["quick"]} == {True, False}
    assert len({case.name for case in SUITES["full"]}) == len(SUITES["full"]) == 31


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
    assert sums.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "q20": 2.0, "q80": 5.0}
    assert sums.summary([2.0]) == {"median": 2.0, "q20": 2.0, "q80": 2.0}
    # A machine that slows down tenfold half way leaves the ratios alone, where medians of times would not.
    a, b = {"times": [1.0, 1.0, 10.0, 10.0]}, {"times": [2.0, 2.0, 20.0, 20.0]}
    assert sums.ratio(a, b) == {"median": 0.5, "q20": 0.5, "q80": 0.5}
    assert sums.ratio(b, a)["median"] == 2.0


def timed(case, peer, times):
    head = {"case": case, "batch": 2, "dtype": "fp32", "mode": "train", "peer": peer, "reason": None}
    return head | {"times": times, "ms": sums.summary(times)}


def test_sums_weigh_the_blocks_and_take_the_faster_eager():
    first, second = "resnet18.1.identity", "resnet18.2.projection"
    rows = []
    for case, ours, nchw, nhwc, bare in ((first, 3.0, 5.0, 6.0, 2.0), (second, 12.0, 40.0, 14.0, 10.0)):
        for peer, ms in (("fused_res", ours), ("eager NCHW", nchw), ("eager channels_last", nhwc), ("bare convolutions", bare)):
            rows.append(timed(case, peer, [ms, 2 * ms, ms]))
    once, often = sums.sums({"rows": rows}, "resnet18")
    assert once["counting"] == sums.ONCE
    assert once["value"]["ratio"] == pytest.approx((1 + 2) / (3 + 4))
    assert once["value"]["q20"] == pytest.approx(once["value"]["q80"])
    assert often["value"]["ratio"] == pytest.approx((2 * 1 + 2) / (2 * 3 + 4))


def test_sums_say_nothing_where_eager_costs_nothing_or_a_case_is_missing():
    case = "resnet18.1.identity"
    rows = [timed(case, peer, [1.0, 1.0]) for peer in ("fused_res", "eager NCHW", "bare convolutions")]
    assert [row["value"] for row in sums.sums({"rows": rows}, "quick")] == [None]
    failed = [*rows, timed("other", "eager NCHW", [1.0]) | {"reason": "no"}, timed("other", "fused_res", [1.0])]
    assert sums.sums({"rows": failed}, "quick") == []


def test_rounds_interleave_in_changing_order_on_common_inputs():
    calls = []
    steps = {name: lambda i, name=name: calls.append((name, i)) or name for name in "abc"}
    timings = runner.interleave(steps, FakeClock({"a": 1.0, "b": 2.0, "c": 3.0}).time, rounds=12, sets=3)
    rounds = [calls[n : n + 3] for n in range(0, len(calls), 3)]
    assert len(rounds) == 12
    assert all({name for name, _ in round_} == set("abc") for round_ in rounds)
    assert [{i for _, i in round_} for round_ in rounds] == [{n % 3} for n in range(12)]
    assert len({tuple(name for name, _ in round_) for round_ in rounds}) > 2
    assert [timing.ms for timing in timings["b"]] == [2.0] * 12


def test_time_budget_cuts_rounds_but_not_below_the_least():
    now = iter(range(1000))
    steps, clock = {"a": lambda i: "a"}, FakeClock({"a": 1.0}).time
    cut = runner.interleave(steps, clock, rounds=30, deadline=4.5, now=lambda: next(now))
    assert runner.MIN_ROUNDS <= len(cut["a"]) < 30
    spent = runner.interleave(steps, clock, rounds=30, deadline=-1.0)
    assert len(spent["a"]) == runner.MIN_ROUNDS


@pytest.mark.parametrize("mode", peers.MODES)
def test_a_case_gives_a_row_per_peer(mode):
    rows = {row["peer"]: row for row in runner.run_case(Setup(SMALL, 2, torch.float32, CPU, mode), FAST, rounds=5)}
    assert list(rows) == list(FAST)
    for row in rows.values():
        assert row["reason"] is None
        assert row["rounds"] == 5
        assert row["ms"]["q20"] <= row["ms"]["median"] <= row["ms"]["q80"]
        assert len(row["times"]) == 5
        assert row["flops"] > 0
        assert row["bytes"] > 0
    assert max(rows["fused_res"]["max_relative_error"].values()) < 1e-3
    assert (rows["fused_res"]["saved_bytes"] is None) == (mode == "eval")


def test_a_peer_that_cannot_run_says_why(setup, monkeypatch):
    def broken(setup):
        raise RuntimeError("no compiler at /some/secret/path found\nmore")

    spoiled(monkeypatch, "torch.compile", broken)
    rows = runner.run_case(setup, ("torch.compile", *FAST), rounds=1)
    assert rows[0]["reason"] == "RuntimeError: no compiler at <path> found"
    assert "ms" not in rows[0]
    text = report.markdown(new_document() | {"rows": rows})
    assert "torch.compile not run anywhere: RuntimeError: no compiler" in text
    assert "| torch.compile |" not in text


def test_a_peer_may_have_run_more_often_than_the_others(setup, monkeypatch):
    """As one that warms up by itself, or that was replayed as a graph: its running statistics are further on."""

    def make(setup):
        peer = peers.eager_channels_last(setup)
        for _ in range(5):
            peer.step(0)
        return peer

    spoiled(monkeypatch, "torch.compile", make)
    rows = runner.run_case(setup, ("torch.compile", *FAST), rounds=1)
    assert rows[0]["reason"] is None


def test_saved_bytes_counts_each_storage_once_without_parameters_and_output():
    linear = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def forward():
        hidden = linear(x)  # saves x and the weight
        return (hidden * hidden).exp()  # saves hidden twice and the output

    assert memory.saved_bytes(forward, linear) == 2 * x.numel() * 4


def write(document, path):
    results.begin(document, path)
    results.append(document | {"rows": []}, path, "rows", document["rows"])


def test_result_file_round_trip(document, tmp_path):
    path = tmp_path / "result.jsonl"
    write(document, path)
    loaded = results.load(path)
    assert loaded["machine"] == document["machine"]
    assert [row["peer"] for row in loaded["rows"]] == list(FAST)
    assert loaded["rows"][0]["times"] == pytest.approx(document["rows"][0]["times"], rel=1e-5)
    path.write_text(json.dumps(document | {"schema": 0}) + "\n")
    with pytest.raises(ValueError, match="schema"):
        results.load(path)
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="JSON lines"):
        results.load(path)


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
    write(document, tmp_path / "results" / "small.jsonl")
    path = tmp_path / "README.md"
    sections = [f"<!-- {kind}:begin results/small.jsonl -->\nstale\n<!-- {kind}:end -->\n" for kind in ("results", "summary")]
    path.write_text(f"before\n{''.join(sections)}after\n")
    assert readme.main([str(path), "--check"]) == 1
    assert "stale" in path.read_text()
    assert readme.main([str(path)]) == 0
    assert readme.main([str(path), "--check"]) == 0
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| eager NCHW |" in text
    assert "x best other" in text
    assert "stale" not in text
    picture = tmp_path / "results" / "small.png"
    drawn = picture.read_bytes()
    assert readme.main([str(path)]) == 0
    assert picture.read_bytes() == drawn
    plot.draw(document, picture, "of other results")
    assert readme.main([str(path), "--check"]) == 1
    assert readme.main([str(path)]) == 0
    assert readme.main([str(path), "--check"]) == 0
    other = tmp_path / "other.md"
    other.write_text("<!-- plot:begin results/small.jsonl -->\n<!-- plot:end -->\n")
    capsys.readouterr()
    assert readme.main([str(path), str(other), "--check"]) == 1
    err = capsys.readouterr().err
    assert str(other) in err
    assert str(path) not in err
    assert readme.main([str(path), str(other)]) == 0
    assert "](results/small.png)" in other.read_text()
    assert readme.shown(path.read_text(), tmp_path) == readme.shown(other.read_text(), tmp_path) == [picture.with_suffix(".jsonl")]
    assert readme.main([str(path), str(other), "--check"]) == 0
    path.write_text(text.replace("results:end", "results:ended"))
    assert readme.main([str(path), "--check"]) == 2
    assert "pairs" in capsys.readouterr().err


@pytest.fixture
def small_suite(monkeypatch):
    monkeypatch.setitem(ceiling.BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(ceiling.SIDE, "cpu", 64)
    monkeypatch.setitem(suite.SUITES, "resnet18", tuple(replace(SMALL, name=f"small.{n}") for n in range(3)))


@pytest.mark.usefixtures("small_suite")
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    options = suite.Options("resnet18", dtype="fp32", batches=(2,), rounds=1, device=CPU, peers=FAST, output=tmp_path).resolved()
    run_case, ran = suite.run_case, []

    def interrupted(setup, *rest):
        ran.append(setup.case.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run_case(setup, *rest)

    monkeypatch.setattr(suite, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.run(options)
    with options.file.open("a") as file:
        file.write('{"rows": [{"case": "small.1"')  # a write that was cut off
    before = options.file.read_text()
    document = suite.run(replace(options, resume=True))
    assert ran == ["small.0", "small.1", "small.1", "small.2"]
    assert options.file.read_text().startswith(before[: before.rfind("\n") + 1])
    assert [row["case"] for row in document["rows"]] == [name for name in ("small.0", "small.1", "small.2") for _ in FAST]
    assert results.load(options.file) == json.loads(json.dumps(document))
    assert "finished" in document


@pytest.mark.usefixtures("small_suite")
def test_a_run_stops_in_time_and_then_goes_on(tmp_path):
    options = suite.Options(
        "resnet18", dtype="fp32", batches=(2,), rounds=1, device=CPU, peers=FAST, output=tmp_path, stop_after=0.0
    )
    assert "finished" not in suite.run(options)
    assert "finished" in suite.run(replace(options, resume=True, stop_after=None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "another"),
        ("git", {"commit": "0", "dirty": False}),
        ("command", "another"),
        ("machine", {"cpu": "x", "threads": 1}),
    ],
)
def test_resume_refuses_the_results_of_another_run(document, tmp_path, field, value):
    path = tmp_path / "result.jsonl"
    write(document, path)
    assert results.resume(path, new_document())["rows"]
    with pytest.raises(results.StaleResultError, match=field):
        results.resume(path, new_document() | {field: value})


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_network_is_measured_like_a_block(mode, monkeypatch):
    monkeypatch.setattr("fused_res.benchmarks.cases.IMAGE", 32)
    rows = runner.run_case(Setup(TINY, 2, torch.float32, CPU, mode), FAST, rounds=1)
    assert [row["reason"] for row in rows] == [None] * len(FAST)
    assert rows[0]["is_network"]
    assert rows[0]["bytes"] is None
    assert rows[0]["flops"] > 0
    assert "img/s" in report.markdown(new_document() | {"rows": rows})


def test_limits_of_a_network():
    limits = {"out": 0.01, "d a": 0.01, "d b": 0.01}
    assert agreement.network_limits(limits, {"out": 0.001, "d a": 0.001, "d b": 0.002}) == limits
    found = agreement.network_limits(limits, {"out": 0.02, "d a": 0.001, "d b": 0.1})
    assert found["out"] == pytest.approx(agreement.DRIFT * 0.02)
    assert found["d a"] == found["d b"] == pytest.approx(agreement.DRIFT * 0.1)
    assert max(agreement.network_limits(limits, {"out": 2.0, "d a": 2.0, "d b": 0.1}).values()) < 1


class GpuLikeClock(clocks.CpuClock):
    """Has the further times of a GPU."""

    def others(self):
        return {"warm_ms": lambda call: Timing(call() and 0.5), "wall_ms": lambda call: Timing(call() and 2.0)}


def test_further_times_of_a_gpu_are_in_rows_and_tables(setup):
    rows = runner.run_case(setup, FAST, rounds=1, clock=GpuLikeClock())
    assert [row["warm_ms"]["median"] for row in rows] == [0.5] * len(FAST)
    text = report.markdown(new_document() | {"rows": rows})
    assert "| wall ms |" in text
    assert "| 2.000 |" in text


@pytest.mark.parametrize("level", planner.LEVELS)
def test_levels_are_peers(setup, level):
    name = peers.level_peer(level)
    row = runner.run_case(setup, (*FAST, name), rounds=1)[-1]
    assert row["peer"] == name
    assert level in (row["reason"] or row["backend"])


def test_a_level_that_a_block_does_not_have_is_reported(setup, monkeypatch):
    def make(setup):
        with use_backend("reference", planner.LEVELS[0]):
            raise RuntimeError("level 'moment' needs a pointwise last convolution")

    name = peers.level_peer(planner.LEVELS[0])
    spoiled(monkeypatch, name, make)
    assert "pointwise" in runner.run_case(setup, (*FAST, name), rounds=1)[-1]["reason"]


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


COMPILED = ("torch.compile", "fused_res compiled")


@pytest.mark.slow
def test_compiled_peers_run_beside_each_other(setup):
    rows = runner.run_case(setup, (*COMPILED, *FAST), rounds=1)
    assert [row["peer"] for row in rows[:2]] == list(COMPILED)
    for row in rows[:2]:
        assert row["reason"] is None or "compiler" in row["reason"].lower()


def test_weights_are_frozen_in_evaluation_mode_alone(setup):
    for name in COMPILED:
        assert peers.make(f"{name} freezing", setup).reason == "weights are frozen in evaluation mode alone"
        assert f"{name} freezing" not in peers.usual(CPU, "eval")


def test_a_compiled_peer_leaves_the_others_code_alone(setup, monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    for one in (setup, Setup(SMALL, 1, torch.float32, CPU)):
        for name in COMPILED:
            peers.REGISTRY[name].make(one)
    assert len(forgotten) == 2


def test_a_rate_above_the_ceiling_is_refused():
    row = timed("x", "fused_res", [10.0]) | {"flops": 2e9, "bytes": 1e8}
    found = ceiling.place(row, {"flops_per_s": 1e12, "bytes_per_s": 2e10})
    assert found["share"] == pytest.approx(0.5)
    assert found["bound"] == "bytes"
    assert found["refused"] is None
    found = ceiling.place(row, {"flops_per_s": 1e11, "bytes_per_s": 2e10})
    assert "0.2 TFLOP/s against 0.1 measured" in found["refused"]
    assert found["share"] is None
    assert found["flops_per_s"] is None
    assert found["bytes_per_s"] == pytest.approx(1e10)


def test_the_ceiling_is_measured():
    found = ceiling.measure(CPU, torch.float32, FakeCeiling(), repeats=2)
    assert found["bytes_per_s"] == pytest.approx(2 * ceiling.BYTES["cpu"] / 1e-3)
    assert ceiling.higher(found, {"bytes_per_s": 1.0, "flops_per_s": 1e30})["flops_per_s"] == 1e30


class FakeCeiling(clocks.CpuClock):
    def time(self, call):
        return Timing(1.0)


def megabytes(network, way, mode):
    """Bytes of activations of a whole network for one image, 2 bytes each, in MB."""
    return (
        sum(
            count * sum((found.read + found.written) * 2 + found.signs * traffic.SIGN for found in traffic.passes(case, way, mode))
            for case, count in occurrences(network).items()
        )
        / 1e6
    )


@pytest.mark.parametrize(
    ("network", "way", "forward", "backward"),
    [("resnet50", "eager", 171.9, 273.0), ("resnet50", "fused BN", 114.6, 231.2), ("resnet18", "eager", 28.0, 46.3)],
)
def test_traffic_of_whole_networks(network, way, forward, backward):
    """Sums worked out by hand from the lists of passes of conv, BN, ReLU and addition, each reading and writing whole tensors."""
    assert megabytes(network, way, "forward") == pytest.approx(forward, abs=0.06)
    assert megabytes(network, way, "train") - megabytes(network, way, "forward") == pytest.approx(backward, abs=0.06)


@pytest.mark.parametrize("mode", peers.MODES)
@pytest.mark.parametrize("case", [*SUITES["full"], *SUITES["resnetv2_50"]], ids=lambda case: case.name)
def test_each_level_moves_less_than_the_one_before(case, mode):
    moved = [traffic.total(case, way, mode, 64, 2).bytes for way in ("eager", *traffic.LEVELS)]
    assert moved == sorted(moved, reverse=True)
    assert traffic.total(case, "bare", mode, 64, 2).bytes < moved[0]
    flops = traffic.total(case, "bare", mode, 64, 2).flops
    assert flops == pytest.approx(traffic.convolution_flops(case, mode, 64))
    assert traffic.total(case, "prologue", mode, 64, 2).flops == pytest.approx(flops)
    assert traffic.total(case, "moment", mode, 64, 2).flops >= flops * (1 - 1e-9)


def test_flops_of_known_networks():
    """4.09 and 1.81 billion multiplications: https://pytorch.org/vision/stable/models.html, where they are called GFLOPS."""
    assert traffic.convolution_flops(NETWORKS["resnet50"], "eval", 1) == pytest.approx(2 * 4.09e9, rel=2e-3)
    assert traffic.convolution_flops(NETWORKS["resnet18"], "eval", 1) == pytest.approx(2 * 1.814e9, rel=2e-3)
