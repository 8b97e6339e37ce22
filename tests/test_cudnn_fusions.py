"""cuDNN's fusions at ResNet-50's shapes: formulas against float64, what a trial finds out, and the command around it.

cuDNN needs a GPU; here a stand-in of its package computes with torch.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cudnn_stand_in
from fused_res.benchmarks import cudnn_fusions, results
from fused_res.benchmarks.agreement import relative_error
from fused_res.benchmarks.clocks import CpuClock
from fused_res.benchmarks.cudnn_trials import Trial
from fused_res.benchmarks.fusions import Fusion, resnet50
from fused_res.benchmarks.peers import CannotRunError

SMALL = [
    Fusion("fprop", 8, 16, 6, 3),
    Fusion("fprop", 8, 16, 6),
    Fusion("dgrad", 8, 16, 6, 3),
    Fusion("dgrad", 16, 8, 6),
    Fusion("tail", 8, 16, 6),
    Fusion("wgrad", 8, 16, 6),
    Fusion("masked", 8, 16, 6),
]
ALL_KINDS = pytest.mark.parametrize("fusion", SMALL, ids=lambda fusion: fusion.name)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_stand_in)
    monkeypatch.delenv("CUDNN_STAND_IN", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield monkeypatch
    torch.set_num_threads(before)


def trial_of(fusion, dtype=torch.float32, batch=10, plans=2):
    trial = Trial(fusion, batch, dtype, object(), plans)
    trial.allocate(torch.device("cpu"))
    return trial


@ALL_KINDS
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_right_graph_is_found_right(fusion, dtype, limit, stand_in):
    trial = trial_of(fusion, dtype)
    judgement = trial.judge("eng1_k1")
    assert judgement["overwrites"]
    assert judgement["runs_differ_in"] == []
    assert set(judgement["nan"].values()) == {"kept"}
    assert set(judgement["error"]) == set(trial.outputs)
    assert max(judgement["error"].values()) < limit
    assert judgement.get("border_error", 0) < limit
    assert ("border_error" in judgement) == (fusion.R == 3)


@ALL_KINDS
def test_pytorch_computes_the_same(fusion):
    torch.manual_seed(0)
    inputs = fusion.inputs(3, torch.float32, "cpu")
    assert relative_error(fusion.unfused(inputs)(), fusion.exact(inputs)) < 1e-6
    assert fusion.bare(inputs)().shape == next(iter(fusion.outputs(3, torch.float32, "meta").values())).shape


def test_only_the_mask_and_the_prologue_are_between_the_product_and_its_inputs():
    fusion = SMALL[-1]
    inputs = fusion.inputs(2, torch.float64, "cpu")
    z = torch.relu(inputs["x"] * inputs["s"].view(1, -1, 1, 1) + inputs["t"].view(1, -1, 1, 1))
    expected = torch.einsum("nkhw,nchw->kc", inputs["dy"] * inputs["mask"], z)
    assert relative_error(fusion.exact(inputs)[0], expected) < 1e-12


@pytest.mark.parametrize("fusion", SMALL[:3], ids=lambda fusion: fusion.name)
def test_sums_that_are_added_to_are_told_and_judged_from_zero(fusion, stand_in):
    stand_in.setenv("CUDNN_STAND_IN", "accumulate")
    judgement = trial_of(fusion).judge("eng1_k1")
    assert not judgement["overwrites"]
    assert judgement["runs_differ_in"] == []
    assert max(judgement["error"].values()) < 1e-6


@pytest.mark.parametrize("fusion", [SMALL[0], SMALL[4], SMALL[6]], ids=lambda fusion: fusion.name)
def test_a_relu_that_drops_nan_is_told(fusion, stand_in):
    stand_in.setenv("CUDNN_STAND_IN", "drop NaN")
    nan = trial_of(fusion).judge("eng1_k1")["nan"]
    assert "lost" in nan["x"]


def test_padding_before_the_prologue_is_an_error_of_the_border(stand_in):
    fusion = SMALL[0]
    trial = trial_of(fusion)
    right = trial.run_on(0, 0.0)
    vectors = [trial.inputs[name].view(1, -1, 1, 1) for name in ("s", "t")]
    padded = torch.relu(F.pad(trial.inputs["x"], (1, 1, 1, 1)) * vectors[0] + vectors[1])
    y = F.conv2d(padded, trial.inputs["w"])
    found = trial._errors(right | {"y": y})
    assert found["border_error"] > 0.1
    assert trial._errors(right)["border_error"] < 1e-6


def test_runs_that_differ_are_told(stand_in):
    trial = trial_of(SMALL[0])
    run, calls = trial.run, iter(range(100))

    def noisy(plan):
        run(plan)
        trial.outputs["sum"].add_(1e-3 * next(calls))

    trial.run = noisy
    assert trial.judge("eng1_k1")["runs_differ_in"] == ["sum"]


def test_a_row_has_the_times_of_all_plans(stand_in):
    row = trial_of(SMALL[0]).times(CpuClock(), 3)
    assert [plan["plan"] for plan in row["plans"]] == ["eng1_k1", "eng2"]
    assert row["ms"] == min((plan["ms"] for plan in row["plans"]), key=lambda ms: ms["median"])
    assert min(row[name]["median"] for name in ("ms", "bare_ms", "unfused_ms")) > 0


def test_a_plan_that_does_not_run_is_left_out(stand_in):
    trial = trial_of(SMALL[0])
    trial.graph.graph.built.clear()
    trial.graph.graph.built.add(2)
    row = trial.times(CpuClock(), 1)
    assert [plan["plan"] for plan in row["plans"]] == ["eng2"]
    assert "does not run" in trial.graph.failures["eng1_k1"]
    trial.graph.graph.built.clear()
    with pytest.raises(CannotRunError, match="no plan runs"):
        trial.times(CpuClock(), 1)


def test_a_plan_that_does_not_compile_is_passed_over(stand_in):
    stand_in.setenv("CUDNN_STAND_IN", "uncompiled")
    trial = trial_of(SMALL[0], plans=1)
    assert trial.graph.failures == {"eng1_k1": "runtime kernel compilation failure"}
    assert list(trial.graph.plans.values()) == ["eng2"]


def test_a_refusal_has_its_reason(stand_in):
    stand_in.setenv("CUDNN_STAND_IN", "refuse 8")
    with pytest.raises(CannotRunError, match="no engine for this"):
        trial_of(SMALL[0])


def test_the_shapes_are_resnet50s():
    names = [fusion.name for fusion in resnet50()]
    assert len(set(names)) == len(names) == 32
    assert names[0] == "fprop 3x3 64->64 56x56"
    assert "tail 1x1 512->2048 7x7" in names[:12]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The stand-in under the package's name, where processes find it."""
    shutil.copy(cudnn_stand_in.__file__, tmp_path / "cudnn.py")
    search = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return monkeypatch


def command(path: Path, *more: str) -> tuple[int, dict]:
    small = ("--device", "cpu", "--batch", "1", "--rounds", "1", "--processes", "2", "--only", "fprop 3x3")
    code = cudnn_fusions.main(["--output", str(path), *small, *more])
    return code, results.load(path)


def test_a_graph_that_ends_its_process_is_a_row_and_passed_over(package, tmp_path, capsys):
    package.setenv("CUDNN_STAND_IN", "abort 128")
    code, document = command(tmp_path / "rows.json", "--limit", "120")
    rows = {row["case"]: row for row in document["rows"]}
    assert code == 0
    assert len(rows) == 4
    assert "exit code -6" in rows["fprop 3x3 128->128 28x28"].pop("reason")
    assert [row["reason"] for row in rows.values() if "reason" in row] == [None] * 3
    assert rows["fprop 3x3 64->64 56x56"]["backend"] == "cuDNN 0, cudnn-frontend 0"
    shown = capsys.readouterr().out
    assert "exit code -6" in shown
    assert shown.count("NaN kept") == 3
    package.delenv("CUDNN_STAND_IN")
    before = (tmp_path / "rows.json").read_text()
    assert command(tmp_path / "rows.json", "--resume")[0] == 0
    assert (tmp_path / "rows.json").read_text() == before


@pytest.mark.long
def test_a_graph_without_end_is_a_row_too(package, tmp_path):
    package.setenv("CUDNN_STAND_IN", "hang 64")
    package.setitem(cudnn_fusions.LONGEST, "planning", 8.0)
    code, document = command(tmp_path / "rows.json", "--limit", "120")
    reasons = {row["case"]: row["reason"] for row in document["rows"]}
    assert code == 0
    assert reasons.pop("fprop 3x3 64->64 56x56") == "not done after 8 s of planning"
    assert list(reasons.values()) == [None] * 3


@pytest.mark.long
def test_what_the_time_did_not_suffice_for_is_named_and_done_later(package, tmp_path, capsys):
    path = tmp_path / "rows.json"
    code, document = command(path, "--limit", "0.5")
    assert (code, document["rows"]) == (cudnn_fusions.UNFINISHED, [])
    assert "not reached in 0.5 s: fprop 3x3 64->64 56x56" in capsys.readouterr().out
    code, document = command(path, "--limit", "120", "--resume")
    assert code == 0
    assert len(document["rows"]) == 4


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="the system does not list children")
def test_no_process_survives_the_command(package, tmp_path):
    package.setenv("CUDNN_STAND_IN", "hang 64")
    path = tmp_path / "rows.json"
    options = ("--device", "cpu", "--batch", "1", "--rounds", "1", "--processes", "1", "--limit", "120", "--only", "fprop 3x3 64")
    ran = subprocess.Popen([sys.executable, "-m", "fused_res.benchmarks.cudnn_fusions", "--output", str(path), *options])
    children = Path(f"/proc/{ran.pid}/task/{ran.pid}/children")
    try:
        until(lambda: len(children.read_text().split()) >= 2)  # multiprocessing's own, and the one that hangs
        processes = [Path("/proc", child) for child in children.read_text().split()]
    finally:
        ran.kill()
        ran.wait()
    until(lambda: not any(process.exists() for process in processes))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--output"),
        (["--output", "x", "--rounds", "0"], "at least 1"),
        (["--output", "x", "--dtype", "fp32"], "invalid choice"),
        pytest.param(
            ["--output", "x"],
            "no NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as error:
        cudnn_fusions.main(arguments)
    assert error.value.code == 2
    assert complaint in capsys.readouterr().err
