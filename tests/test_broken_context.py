"""What a hang and a broken CUDA context cost under pytest-xdist, and without: planted tests, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A torch of this much is all that the hook asks for. CUDA answers with the error from then on, whatever is asked.
PLANTED = """
import sys, time, types

broken = []

class AcceleratorError(RuntimeError):
    pass

def synchronize():
    if broken:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might be reported later")

cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_a_first():
    pass

def test_b_breaks_unseen():
    broken.append(True)

def test_c_between():
    synchronize()

def test_d_breaks_and_fails():
    broken.append(True)
    synchronize()

def test_e_between():
    synchronize()

def test_f_hangs():
    {hang}

def test_g_last():
    synchronize()
"""


def run(folder, *options, hang):
    (folder / "test_planted.py").write_text(PLANTED.format(hang=hang))
    (folder / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-p", "broken_context", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-rA"]
    command += [*options, "test_planted.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    summary = [line for line in done.stdout.splitlines() if line.startswith(("PASSED ", "FAILED "))]
    return done, [(line.split()[0], line.split("::")[1].split()[0]) for line in summary]


@pytest.mark.slow
def test_each_costs_one_test(tmp_path, outcomes_alone):
    """With the plugin of `make gpu` that passes over what has passed: a worker that comes later must not pass over more."""
    pytest.importorskip("xdist")
    pytest.importorskip("pytest_timeout")
    limits = ("-n", "1", "--dist", "worksteal", "--timeout", "5", "--timeout-method", "thread")
    done, found = run(
        tmp_path, *limits, "-p", "fused_res.benchmarks.outcomes", "--outcomes", "outcomes.jsonl", hang="time.sleep(100)"
    )
    failed = {name for outcome, name in found if outcome == "FAILED"}
    passed = {name for outcome, name in found if outcome == "PASSED"}
    assert failed == {"test_b_breaks_unseen", "test_d_breaks_and_fails", "test_f_hangs"}, done.stdout + done.stderr
    assert passed - failed == {"test_a_first", "test_c_between", "test_e_between", "test_g_last"}
    for name in failed:
        assert f"crashed while running 'test_planted.py::{name}'" in done.stdout
    assert "test_b_breaks_unseen leaves a CUDA context that is broken: CUDA error: an illegal memory access" in done.stderr
    assert done.returncode == 1


def test_without_workers_the_run_stops(tmp_path):
    done, _ = run(tmp_path, "-p", "no:xdist", hang="pass")
    assert " 2 passed in " in done.stdout, done.stdout + done.stderr
    assert "test_b_breaks_unseen leaves a CUDA context that is broken: CUDA error" in done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.INTERNAL_ERROR
