"""`make gpu` as far as a CPU goes: its slices resume, stop in time and are told apart; a dry run of each kind; the profile."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_res.benchmarks import gpu, profiling
from fused_res.benchmarks.cases import Case
from fused_res.benchmarks.gpu import Slice, State
from fused_res.benchmarks.peers import Setup

ROOT = Path(__file__).resolve().parents[1]
# conftest.py may have switched this process to Triton's interpreter; a user's has not.
VARIABLES = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ADDS_A_LINE = """
import sys
from pathlib import Path
path = Path(sys.argv[1])
lines = path.read_text() if path.is_file() and "--resume" in sys.argv else ""
path.write_text(lines + "line\\n")
sys.exit(0 if lines.count("line") == 2 else 3)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0)

    def run(chosen, source="sources", seconds=60.0):
        state = State(tmp_path / "state.json", source)
        gpu.run_to_end(chosen, dict(os.environ), tmp_path, tmp_path, state, time.monotonic() + seconds)
        return state

    return run


def adding(tmp_path, *more):
    return Slice("bench", ("-c", ADDS_A_LINE, str(tmp_path / "bench.jsonl"), *more), resumable=True)


def test_a_benchmark_is_run_until_it_is_done(run, tmp_path):
    chosen = adding(tmp_path)
    assert run(chosen).finished(chosen)
    assert (tmp_path / "bench.jsonl").read_text() == 3 * "line\n"


def test_other_options_and_sources_start_anew(run, tmp_path):
    state = run(adding(tmp_path))
    other = adding(tmp_path, "--batch")
    assert not state.finished(other)
    assert state.status(other) == "passed, with other sources or options"
    run(other)
    assert (tmp_path / "bench.jsonl").read_text() == 3 * "line\n"
    assert not State(tmp_path / "state.json", "other sources").finished(other)


def test_a_benchmark_that_gets_no_further_is_left(run):
    chosen = Slice("bench", ("-c", "import sys; sys.exit(3)"), resumable=True)
    assert run(chosen).status(chosen) == "unfinished"


def test_a_slice_ends_in_time_with_all_it_started(run, tmp_path):
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    chosen = Slice("long", ("-c", code))
    begin = time.monotonic()
    assert run(chosen, seconds=3.0).status(chosen) == "unfinished"
    assert time.monotonic() - begin < 30
    child = int((tmp_path / "logs" / "long.out").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_failures_and_missing_programs(run, capsys):
    failing = Slice("tests", ("-c", "import sys; print('what went wrong'); sys.exit(7)"))
    assert run(failing).status(failing) == "failed with exit code 7"
    assert "what went wrong" in capsys.readouterr().out
    skipped = Slice("sanitizer", ("-c", ""), within=("no-such-program",))
    assert run(skipped).finished(skipped)
    within = Slice("within", ("-c", "import os, sys; sys.exit(int(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']))"), (1,), ("env",))
    assert run(within).finished(within)


def test_slices_are_complete(tmp_path):
    names = [chosen.name for chosen in gpu.slices(tmp_path, ())]
    assert names[:6] == ["build", "tests", "kernels", "check", "sanitizer-memcheck", "sanitizer-racecheck"]
    assert {"resnet50-train-bf16", "resnet18-train-fp32", "resnet50-eval-bf16", "networks-train-bf16"} < set(names)
    assert names[-2:] == ["profile", "report"]
    assert len(set(names)) == len(names)
    assert all(chosen.arguments[-2:] == ("--batch", "64") for chosen in gpu.benches(tmp_path, ("--batch", "64")))


def test_profile_lists_what_takes_the_time():
    case = Case("small", "bottleneck", 16, 4, 6)
    found = profiling.kernels(Setup(case, 2, torch.float32, torch.device("cpu")), "fused_res", steps=2)
    assert any("convolution_backward" in kernel.name for kernel in found)
    assert [kernel.ms for kernel in found] == sorted((kernel.ms for kernel in found), reverse=True)
    lines = profiling.table(found, shown=3)
    assert len(lines) == 2 + 3 + 1
    assert f"`{len(found) - 3} more`" in lines[-1]


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu.py")], env=VARIABLES, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Without an installation: only the standard library and torch are given, the script finds the rest."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, env=VARIABLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    summary = (tmp_path / "summary.md").read_text()
    assert "| resnet18.1.identity | 1 |" in summary
    assert "| sanitizer | skipped" in summary
    assert "aten::mkldnn_convolution" in (tmp_path / "profile.md").read_text()
    assert "</html>" in (tmp_path / "report.html").read_text()
    again = subprocess.run(command, env=VARIABLES, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "..." not in again.stdout
    listed = subprocess.run([*command, "--list"], env=VARIABLES, capture_output=True, text=True, check=False)
    assert "resnet18-eval-fp32: passed" in listed.stdout
