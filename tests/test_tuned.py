"""`fused_res.tune`, who decides about a level in which order, and the plans that come with the package."""

import json
from pathlib import Path

import pytest
import torch
from compare import same
from torch import nn

import fused_res
from blocks import image, make
from fused_res import console, explain, planner, plans, shipped, use_backend
from fused_res.benchmarks import shipping
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.results import load
from fused_res.block.levels import LEVELS
from fused_res.geometry import numbers_of
from fused_res.tuning import files, tuner

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu" / "nvidia-h200" / "resnet50-train-bf16.jsonl"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "_known", {})
    monkeypatch.setattr(tuner, "_times", {})
    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setenv("FUSED_RES_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_RES_TUNE", raising=False)
    with plans.afresh():
        yield


@pytest.fixture
def asked(monkeypatch):
    """Planted timings: level `epilogue` takes half the time of the first, everything else as long; what was asked, in order."""
    found = []

    def measure(runs, device, queued):
        found.append(list(runs))
        return {name: 0.5 if name == "epilogue" else 1.0 for name in runs}

    monkeypatch.setattr(tuner, "measure", measure)
    return found


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(make("bottleneck", dtype), make("bottleneck", dtype), nn.ReLU())


def batch(dtype=torch.float32):
    return image(make("bottleneck"), dtype=dtype)


def state(model):
    return [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]


def test_it_finds_keeps_and_says_it_and_nothing_else_changes(asked):
    model, x = network(), batch()
    before, random = state(model), torch.get_rng_state()
    assert explain(model, x).rows[0].decided == planner.RULE
    found = fused_res.tune(model, x)
    for one, other in zip(state(model), before, strict=True):
        same(one, other)
    same(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    (row,) = found.rows
    assert (row.names, row.level, row.speedup, row.left) == (("0", "1"), "epilogue", 2.0, 0)
    assert row.tried > 1
    assert asked[-1] == list(LEVELS)
    assert "epilogue" in str(found)
    assert "0 and 1 more" in str(found)
    assert {(r.level, r.decided) for r in explain(model, x).rows} == {("epilogue", planner.MEASURED)}
    asked.clear()
    assert fused_res.tune(model, x).rows[0].note == "known before"
    assert not asked


def test_another_process_runs_what_was_found_and_without_the_cache_nothing_does(asked, monkeypatch):
    model, x = network(), batch()
    fused_res.tune(model, x)
    monkeypatch.setattr(tuner, "_known", {})
    with plans.afresh():
        row = explain(model, x).rows[0]
        assert (row.level, row.decided, row.measured) == ("epilogue", planner.MEASURED, True)
    monkeypatch.setattr(tuner, "_known", {})
    monkeypatch.setenv("FUSED_RES_CACHE", "")
    with plans.afresh():
        assert explain(model, x).rows[0].decided == planner.RULE


def test_time_that_is_over_leaves_the_rules(asked):
    model, x = network(), batch()
    rule = explain(model, x).rows[0].level
    found = fused_res.tune(model, x, time_limit=0).rows[0]
    assert (found.tried, found.level, found.note) == (0, rule, "time is over")
    assert found.left > 0
    assert not asked
    assert explain(model, x).rows[0].decided == planner.RULE


def test_a_level_that_was_asked_for_stands_and_its_convolutions_are_tried(asked):
    model, x = network(), batch()
    with use_backend("native", "prologue"):
        assert {row.level for row in fused_res.tune(model, x).rows} == {"prologue"}
        assert explain(model, x).rows[0].decided == planner.FORCED
    assert all("bn_act" not in names for names in asked)


def test_what_cannot_be_tuned(asked):
    with pytest.raises(RuntimeError, match=r"model: expected one that calls a fused block: fused_res\.fuse"):
        fused_res.tune(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="time_limit: expected at least 0 seconds, got -1"):
        fused_res.tune(network(), batch(), time_limit=-1)
    assert fused_res.tune(network(torch.float64), batch(torch.float64)).rows[0].note == "float64 is not tuned"
    assert not asked


def test_a_bar_without_rich(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    with console.progress(2, "Tuning") as advance:
        advance("one")
        advance("two")
    assert "Tuning: 1 of 2 done, two" in capsys.readouterr().err


def test_who_decides_in_which_order(monkeypatch):
    block, x = make("bottleneck", torch.float32), batch()
    numbers, cuda = numbers_of(x, block.parts()), torch.device("cuda", 0)
    monkeypatch.setattr(planner, "_runs", lambda *_: True)
    said = {"measured": "prologue", "shipped": "moment", "model": "epilogue"}
    monkeypatch.setattr(tuner, "recalled", lambda *_: said["measured"])
    monkeypatch.setattr(planner, "_shipped", lambda *_: said["shipped"])
    monkeypatch.setattr(planner, "_modelled", lambda *_: said["model"])

    def found(tries=True):
        return planner._found("triton", cuda, torch.float32, numbers, tries=tries)

    assert found() == ("prologue", planner.MEASURED)
    said["measured"] = None
    assert found() == ("moment", planner.SHIPPED)
    said["shipped"] = None
    assert found() == ("epilogue", planner.MODEL)
    assert found(tries=False) == ("bn_act", planner.RULE)
    said["model"] = None
    assert found() == ("bn_act", planner.RULE)


def test_the_model_decides_for_a_gpu_of_its_generation(monkeypatch):
    pytest.importorskip("triton")
    case = next(case for case in SUITES["resnet50"] if case.name == "resnet50.1.identity")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    assert planner._modelled(cuda, torch.bfloat16, case.geometry(256)) in LEVELS
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert planner._modelled(cuda, torch.bfloat16, case.geometry(256)) is None


MEASURED_WITH = {"fused_res": "0.1.0", "triton": "3.6.1", "cudnn": 91200, "torch": "2.12.0"}


def test_shipped_plans_are_what_their_results_say_and_hold_for_what_was_measured():
    document = load(RESULTS)
    path = shipped.FOLDER / shipped.file_name(document["gpu"]["name"])
    assert path.read_text() == shipping.text(shipping.plans([document]))
    levels = {}
    for case in SUITES["resnet50"]:
        with torch.device("meta"):
            block, x = case.module().to(torch.bfloat16), torch.empty(256, case.inplanes, case.size, case.size, dtype=torch.bfloat16)
        numbers = (*numbers_of(x, block.parts())[:-1], (256, case.size, case.size))
        asked = document["gpu"]["name"], MEASURED_WITH, "bfloat16", numbers
        levels[case.name] = shipped.level(*asked)
        assert shipped.level("NVIDIA H100", *asked[1:]) is None
        assert shipped.level(asked[0], MEASURED_WITH | {"triton": "3.7.0"}, *asked[2:]) is None
        assert shipped.level(*asked[:2], "float16", numbers) is None
        assert shipped.level(*asked[:3], (*numbers[:-1], (255, case.size, case.size))) is None
    measured = {
        f"resnet50.{stage}.identity": level for stage, level in zip("1234", ("moment", "bn_act", "bn_act", "bn_act"), strict=True)
    }
    assert {name: level for name, level in levels.items() if level is not None} == measured


def test_a_file_of_another_gpu_or_format_is_refused(tmp_path):
    for change in ({"gpu": "NVIDIA A100"}, {"format": 0}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        document = {"format": shipped.FORMAT, "gpu": "NVIDIA H200", "versions": {}, "plans": []} | change
        (folder / "nvidia-h200.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match="expected format 1 and 'NVIDIA H200'"):
            shipped.level("NVIDIA H200", MEASURED_WITH, "bfloat16", (), folder)


def test_what_is_written_for_shipping(tmp_path, capsys):
    assert shipping.main([str(RESULTS), "--output", str(tmp_path / "there")]) == 0
    assert "4 plans" in capsys.readouterr().out
    document = load(RESULTS)
    failed = {"tests/test_block.py::test_it[triton-moment]": {"outcome": "failed"}}
    void = shipping.plans([document], {("triton", "moment")})
    assert [plan["level"] for plan in void["plans"]] == ["bn_act"] * 4
    outcomes = tmp_path / "outcomes.jsonl"
    outcomes.write_text("".join(json.dumps({"test": test} | found) + "\n" for test, found in failed.items()))
    assert shipping.main([str(RESULTS), "--output", str(tmp_path / "void"), "--outcomes", str(outcomes)]) == 0
    assert json.loads((tmp_path / "void" / "nvidia-h200.json").read_text()) == json.loads(shipping.text(void))
    dirty = document | {"git": document["git"] | {"dirty": True}}
    with pytest.raises(ValueError, match="without local changes"):
        shipping.plans([dirty])
    cpu = next((ROOT / "benchmarks" / "results" / "cpu").glob("resnet50-train-*.jsonl"))
    assert shipping.main([str(cpu), "--output", str(tmp_path / "cpu")]) == 0
    assert not (tmp_path / "cpu").exists()
