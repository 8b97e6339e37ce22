"""Peers that are wrong, fail or take the GPU's context with them: rows with their reasons, and the others are timed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_res import cli
from fused_res.benchmarks import agreement, ceiling, clocks, lines, peers, results, runner, suite, summary
from fused_res.benchmarks.cases import Case, Network
from fused_res.benchmarks.peers import Setup

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CASES = (Case("small.0", "bottleneck", 16, 4, 6), Case("small.1", "bottleneck", 16, 4, 6))
TINY = Network("tiny", "basic", (1, 1, 1, 1))
WRONG = peers.level_peer("prologue")
PEERS = ("eager NCHW", "eager channels_last", "bare convolutions", "fused_res", WRONG)


@pytest.fixture
def plant(monkeypatch):
    """Replaces the module of a peer by one whose output is spoiled."""

    def plant(name, spoil):
        def make(setup):
            module = setup.module("channels_last")
            return peers.block_peer(setup, module, "channels_last", lambda x: spoil(module(x)), backend="eager")

        monkeypatch.setitem(peers.REGISTRY, name, peers.REGISTRY[name]._replace(make=make))

    return plant


@pytest.fixture(autouse=True)
def a_quick_ceiling(monkeypatch):
    monkeypatch.setitem(ceiling.BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(ceiling.SIDE, "cpu", 64)


@pytest.fixture
def options(monkeypatch, tmp_path):
    monkeypatch.setitem(suite.SUITES, "resnet18", CASES)
    return suite.Options("resnet18", dtype="fp32", batches=(2,), rounds=1, device=CPU, peers=PEERS, output=tmp_path, resume=True)


def measure(case=CASES[0], dtype=torch.float32, names=PEERS, **options):
    return {row["peer"]: row for row in runner.run_case(Setup(case, 2, dtype, CPU), names, rounds=1, **options)}


def late(spoil, times=8):
    """Spoils the results after so many of them."""
    calls = []

    def spoiled(out):
        calls.append(1)
        return out if len(calls) < times else spoil(out)

    return spoiled


def broken(out):
    raise RuntimeError("out of memory, say")


SPOILERS = {
    "scaled": lambda out: out * 1.001,
    "clipped": lambda out: out.clamp(max=2.0),
    "wrong gradient": lambda out: out.detach() + out * 1e-3,
    "not a number": lambda out: out * float("nan"),
    "wrong during the timing": late(lambda out: out * 2),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_wrong_results_are_a_row_without_times_and_the_others_are_timed(plant, spoil):
    plant("fused_res", spoil)
    rows = measure()
    assert list(rows) == list(PEERS)
    assert rows["fused_res"]["failed"]
    assert "differs from eager channels_last: " in rows["fused_res"]["reason"]
    assert not {"ms", "times"} & rows["fused_res"].keys()
    assert all(rows[name]["reason"] is None and rows[name]["ms"] for name in PEERS[:3])


def test_another_peer_that_is_wrong_has_not_failed_us(plant):
    plant("torch.compile", lambda out: out * 2)
    row = measure(names=("torch.compile", *PEERS))["torch.compile"]
    assert "differs from eager" in row["reason"]
    assert not row["failed"]


@pytest.mark.parametrize("times", [3, 6, 8])
def test_a_peer_that_fails_in_the_midst_of_it_is_left_out_and_the_others_measured_again(plant, times):
    plant(WRONG, late(broken, times))
    rows = measure()
    assert rows[WRONG]["failed"]
    assert rows[WRONG]["reason"] == "RuntimeError: out of memory, say"
    assert all(rows[name]["ms"] for name in PEERS[:3])


@pytest.mark.parametrize(("dtype", "spoil"), [(torch.float32, "scaled"), (torch.bfloat16, "wrong gradient")], ids=str)
def test_a_wrong_network_is_never_timed(plant, monkeypatch, dtype, spoil):
    monkeypatch.setattr("fused_res.benchmarks.cases.IMAGE", 32)
    plant("fused_res", {"scaled": lambda out: out * 1.01}.get(spoil, SPOILERS[spoil]))
    row = measure(TINY, dtype, PEERS[:4])["fused_res"]
    assert row["failed"]
    assert "d conv1.weight" in row["reason"] or spoil == "scaled"


def test_without_eager_nothing_is_timed(monkeypatch):
    for name in ("eager NCHW", "eager channels_last"):
        monkeypatch.setitem(peers.REGISTRY, name, peers.REGISTRY[name]._replace(make=broken))
    with pytest.raises(agreement.NoOracleError, match="out of memory, say"):
        measure()


def test_a_wrong_level_is_named_as_failed_and_void(options, plant, tmp_path):
    """In one case: its row there is FAILED, and its times in the other are void."""
    module = peers.REGISTRY[WRONG].make
    plant(WRONG, lambda out: out * 1.01)
    suite.run(replace(options, cases=["small.0"]))
    peers.REGISTRY[WRONG] = peers.REGISTRY[WRONG]._replace(make=module)
    document = suite.run(options)
    assert suite.failures(document) == [
        f"small.0, batch 2: {WRONG} {next(row['reason'] for row in document['rows'] if row['peer'] == WRONG)}"
    ]
    assert suite.failures(document, ["small.1"]) == []
    page = summary.page(tmp_path, [("resnet18-train-fp32 small.0", "failed with exit code 1", "15", "3")])
    table = {line.split(" | ")[0]: line.split(" | ") for line in page.splitlines() if line.startswith("| small")}
    column = next(line for line in page.splitlines() if line.startswith("| case | eager")).split(" | ").index(f"{WRONG} |")
    assert table["| small.0, batch 2"][column] == "FAILED |"
    assert re.fullmatch(r"\d+\.\d+ VOID \|", table["| small.1, batch 2"][column])
    assert "**native, prologue is VOID**, wherever it was timed: `small.0, batch 2` failed." in page
    assert "| 15 | 3 |" in page


@pytest.fixture
def lost(monkeypatch):
    """The GPU's context is gone from the first failure on; returns a switch that is a new process's."""
    state = {"lost": False}

    def is_lost(device):
        state["lost"] = True
        return True

    monkeypatch.setattr(peers, "is_lost", is_lost)
    return state


@pytest.mark.parametrize("times", [1, 7], ids=["at once", "during the timing"])
def test_a_peer_that_takes_the_gpu_with_it_ends_the_process_and_is_passed_over_by_the_next(options, plant, lost, times, capsys):
    spoil = late(broken, times)
    plant(WRONG, spoil)
    command = ["bench", "--suite", "resnet18", "--dtype", "fp32", "--batch", "2", "--rounds", "1", "--device", "cpu", "--resume"]
    command += ["--output", str(options.output), "--peers", *PEERS]
    assert cli.main([*command, "--cases", "small.0"]) == 3
    assert lost["lost"]
    assert "unfinished" in capsys.readouterr().err
    assert cli.main([*command, "--cases", "small.0"]) == 1
    assert f"FAILED: small.0, batch 2: {WRONG} took the GPU with it: RuntimeError: out of memory" in capsys.readouterr().err
    rows = {row["peer"]: row for row in results.load(options.resolved().file)["rows"]}
    assert rows[WRONG]["failed"]
    assert rows["fused_res"]["reason"] is None
    assert cli.main(command) == 3  # in another case it is tried again


def test_a_failed_case_does_not_fail_the_next(options, plant, monkeypatch, capsys):
    command = ["bench", "--suite", "resnet18", "--dtype", "fp32", "--batch", "2", "--rounds", "1", "--device", "cpu", "--resume"]
    command += ["--output", str(options.output), "--peers", *PEERS, "--cases"]
    right = peers.REGISTRY[WRONG]
    plant(WRONG, lambda out: out * 1.01)
    assert cli.main([*command, "small.0"]) == 1
    monkeypatch.setitem(peers.REGISTRY, WRONG, right)
    capsys.readouterr()
    assert cli.main([*command, "small.1"]) == 0
    assert "FAILED" not in capsys.readouterr().err


def test_a_header_that_was_cut_off_is_never_there(tmp_path, monkeypatch):
    path, document = tmp_path / "a.jsonl", results.new("command", CPU) | {"conditions": clocks.CpuClock.conditions}
    results.begin(document, path)
    whole, write = path.read_text(), Path.write_text

    def cut(self, text):
        write(self, text[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(KeyboardInterrupt):
            results.begin(document, path)
    assert path.read_text() == whole


def test_lines_without_an_end_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    assert lines.read(path) == []
    lines.mend(path)
    assert not path.exists()
    path.write_text('{"a": 1}\n{"a"')
    assert lines.read(path) == [{"a": 1}]
    lines.mend(path)
    with path.open("a") as file:
        file.write(json.dumps({"a": 2}) + "\n")
    assert lines.read(path) == [{"a": 1}, {"a": 2}]
