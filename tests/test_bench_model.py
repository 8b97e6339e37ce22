"""The roofline on paper: sums, times, what was measured beside it, and how it is shown."""

import json

import pytest

from fused_res import cli, planner
from fused_res.benchmarks import model, readme, traffic
from fused_res.benchmarks.cases import SUITES, occurrences
from fused_res.benchmarks.model import DTYPES, GPUS, expected, least, predict
from fused_res.cost.recorded import steps

CASE = next(case for case in SUITES["resnet50"] if case.name == "resnet50.1.identity")


def test_every_level_is_modelled():
    assert tuple(traffic.LEVELS) == planner.LEVELS


def test_bytes_and_times_of_one_block_by_hand():
    """A bare training step of 256-64-64-256 at 56 x 56: each convolution's two tensors three times, and its weights."""
    pixels, batch, weights = 56 * 56, 8, 2 * 256 * 64 + 9 * 64 * 64
    rows = predict("resnet50", "train", batch, "bf16", at_least=True)
    found = next(row for row in rows if (row["case"], row["way"]) == (CASE.name, "bare"))
    assert found["bytes"] == 2 * 3 * (batch * pixels * (256 + 64 + 64 + 64 + 64 + 256) + weights)
    assert found["flops"] == 3 * 2 * batch * pixels * weights
    gpu = GPUS["H100"]
    wide = 2 * (batch * pixels * 320 + 256 * 64) / gpu.bandwidth  # memory-bound, all four 1x1 passes but the wgrads' like it
    inner = max(2 * (batch * pixels * 128 + 9 * 64 * 64) / gpu.bandwidth, 2 * batch * pixels * 9 * 64 * 64 / gpu.half)
    assert least(CASE, "bare", "train", batch, "bf16", gpu) == pytest.approx(3 * (2 * wide + inner))


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_no_prediction_beats_the_roofline(gpu):
    for case in SUITES["full"]:
        for way in traffic.WAYS:
            cost = traffic.total(case, way, "train", 16, 2)
            roofline = max(cost.bytes / gpu.bandwidth, cost.flops / gpu.half)
            assert least(case, way, "train", 16, "bf16", gpu) >= roofline * (1 - 1e-9)
            assert least(case, way, "train", 16, "fp32", gpu) > least(case, way, "train", 16, "bf16", gpu)


def test_blocks_of_a_network_add_up():
    rows = predict("resnet50", "train", 64, "bf16", ["H200"], at_least=True)
    whole = {row["way"]: row for row in rows if row["case"] == "all 16 blocks"}
    counts = {case.name: count for case, count in occurrences("resnet50").items()}
    eager = [row for row in rows if row["way"] == "eager" and row["case"] in counts]
    assert whole["eager"]["bytes"] == pytest.approx(sum(counts[row["case"]] * row["bytes"] for row in eager))
    times = [whole[way]["ms"]["H200"] for way in traffic.WAYS if way != "fused BN"]
    assert times == sorted(times, reverse=True)
    assert whole["bare"]["ms"]["H200"] < times[-1]


def test_measured_times_stand_beside_their_way(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    head = {"case": CASE.name, "batch": 8, "dtype": "fp32", "mode": "train", "reason": None, "ms": {"median": 3.0}}
    found = {"eager NCHW": "eager", "torch.compile": "inductor", "fused_res": "native, moment", "bare convolutions": None}
    rows = [head | {"peer": peer, "backend": backend} for peer, backend in {**found, "OpenVINO": "openvino 1"}.items()]
    document = {"rows": rows, "machine": {"cpu": "a CPU", "threads": 2}, "gpu": None}
    predicted = predict("resnet50", "train", 8, "fp32", ["H200"], [document], at_least=True)
    seen = {row["way"]: row["measured"] for row in predicted if row["case"] == CASE.name}
    assert [way for way, values in seen.items() if values] == ["bare", "eager", "fused BN", "moment"]
    assert seen["moment"] == [("a CPU, 2 threads", 3.0)]
    assert "3 on a CPU, 2 threads" in model.text(predicted)


def test_on_the_command_line(capsys):
    assert cli.main(["bench", "model", "--least", "--suite", "resnet18", "--gpu", "A100"]) == 0
    text = capsys.readouterr().out
    assert "Predicted, not measured: the least time" in text
    assert "all 8 blocks" in text
    assert "H200" not in text
    assert cli.main(["bench", "model", "--least", "--json"]) == 0
    assert {row["way"] for row in json.loads(capsys.readouterr().out)} == {"bare", *traffic.WAYS}


def test_what_is_to_be_expected_on_the_command_line(capsys):
    pytest.importorskip("triton")
    assert cli.main(["bench", "model", "--suite", "resnet18", "--gpu", "H200"]) == 0
    text = capsys.readouterr().out
    assert "at the shares of these that were measured" in " ".join(text.split())
    assert "of fused BN" in text
    assert cli.main(["bench", "model", "--suite", "resnet18", "--gpu", "H200", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    whole = {row["way"]: row["ms"]["H200"] for row in rows if row["case"] == "all 8 blocks"}
    assert set(whole) == {"bare", *traffic.WAYS, model.BEST}
    assert whole["bare"] < whole[model.BEST] <= min(whole[level] for level in traffic.LEVELS)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_nothing_is_expected_to_beat_the_peaks(gpu):
    pytest.importorskip("triton")
    for way in ("bare", *traffic.WAYS):
        for dtype in ("bf16", "fp32"):
            found = steps(CASE.geometry(16), way, DTYPES[dtype], gpu.capability) if way in traffic.LEVELS else ()
            bound = sum(max(step.bytes / gpu.bandwidth, 2 * step.macs / gpu.peak(dtype)) for step in found if not step.double)
            assert sum(expected(CASE, way, "train", 16, dtype, gpu)) > max(bound, 0.5 * least(CASE, way, "train", 16, dtype, gpu))


def test_readme_shows_predictions_as_such(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("<!-- predicted:begin resnet18 eval fp16 16 -->\n<!-- predicted:end -->\n")
    assert readme.main([str(path)]) == 0
    text = path.read_text()
    assert "Predicted for all 8 blocks of resnet18" in text
    assert "Predicted, not measured" in text
    assert readme.main([str(path), "--check"]) == 0
