"""What is run and compiled before it is timed, and the kernels of a step, one by one."""

import json

import pytest
import torch

from fused_res.benchmarks import peers, profiling, warm
from fused_res.benchmarks.cases import Case
from fused_res.benchmarks.peers import Setup

CASE = Case("small", "bottleneck", 16, 4, 6)
OTHER = Case("other", "bottleneck", 16, 4, 6)
CPU = torch.device("cpu")
PEERS = ("eager channels_last", "bare convolutions")


@pytest.fixture
def small_suite(monkeypatch):
    for module in (profiling, warm):
        monkeypatch.setitem(module.SUITES, "resnet18", (CASE, OTHER))


def fails(monkeypatch, name, error=None):
    def make(setup):
        raise error or RuntimeError("no such thing")

    monkeypatch.setitem(peers.REGISTRY, name, peers.REGISTRY[name]._replace(make=make))


def test_profile_lists_what_takes_the_time():
    found = profiling.kernels(Setup(CASE, 2, torch.float32, CPU), "fused_res", steps=2)
    assert any("convolution_backward" in kernel.name for kernel in found)
    assert [kernel.ms for kernel in found] == sorted((kernel.ms for kernel in found), reverse=True)
    lines = profiling.table(found, shown=3)
    assert len(lines) == 2 + 3 + 1
    assert f"`{len(found) - 3} more`" in lines[-1]


def test_a_sequence_is_in_the_order_of_the_step():
    found = profiling.sequence(Setup(CASE, 2, torch.float32, CPU, "forward"), "bare convolutions", steps=3)
    names = [name for name, _ in found]
    assert names.count("aten::conv2d") == 3
    assert all(us > 0 for _, us in found)


def test_steps_that_differ_have_no_sequence(monkeypatch):
    calls = []

    def make(setup):
        x = torch.ones(4)

        def step(i):
            calls.append(1)
            return {"out": x + 1 if len(calls) % 2 else x * 2}

        return peers.Peer(step, "NCHW")

    monkeypatch.setitem(peers.REGISTRY, "fused_res", peers.REGISTRY["fused_res"]._replace(make=make))
    with pytest.raises(RuntimeError, match="expected the same kernels in every step"):
        profiling.sequence(Setup(CASE, 2, torch.float32, CPU), "fused_res")


def sequences(path, *more):
    command = ["--suite", "resnet18", "--batch", "2", "--dtype", "fp32", "--mode", "forward", "--output", str(path), "--resume"]
    return profiling.main([*command, "--peers", *PEERS, *more]), [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("small_suite")
def test_sequences_of_a_suite_and_the_reasons_of_those_that_have_none(tmp_path, monkeypatch):
    fails(monkeypatch, PEERS[0])
    code, lines = sequences(tmp_path / "a.jsonl")
    assert code == 1
    assert [(line["case"], line["peer"]) for line in lines] == [(case.name, name) for case in (CASE, OTHER) for name in PEERS]
    assert lines[0]["reason"] == f"RuntimeError: {PEERS[0]}: RuntimeError: no such thing"
    assert lines[1]["kernels"]
    assert sequences(tmp_path / "a.jsonl") == (0, lines)


@pytest.mark.usefixtures("small_suite")
def test_sequences_go_on_where_they_were_cut_or_after_what_took_the_gpu_with_it(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        fails(patch, PEERS[1])
        patch.setattr(peers, "is_lost", lambda device: True)
        code, lines = sequences(path, "--cases", "small")
    assert code == 3
    assert [line["peer"] for line in lines] == list(PEERS)
    with path.open("a") as file:
        file.write('{"case": "oth')
    code, all_lines = sequences(path)
    assert code == 0
    assert all_lines[:2] == lines
    assert [line["case"] for line in all_lines] == 2 * ["small"] + 2 * ["other"]
    assert all(line["kernels"] for line in all_lines[2:])


@pytest.mark.usefixtures("small_suite")
def test_warm_runs_a_step_of_each_peer_and_fails_by_ours_alone(monkeypatch, capsys):
    command = ["--suite", "resnet18", "--batch", "2", "--dtype", "fp32", "--cases", "small", "--peers"]
    assert warm.main([*command, "fused_res", "eager NCHW"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said] == ["small, fused_res", "small, eager NCHW"]
    assert all("ready" in line for line in said)
    fails(monkeypatch, "eager NCHW")
    assert warm.main([*command, "fused_res", "eager NCHW"]) == 0
    fails(monkeypatch, "fused_res")
    assert warm.main([*command, "fused_res", "bare convolutions"]) == 1
    assert "small, fused_res: RuntimeError: no such thing" in capsys.readouterr().out
