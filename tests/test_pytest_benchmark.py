"""`pytest benchmarks --benchmark-only` works, and nothing else collects it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# pytest-benchmark does nothing in a worker of pytest-xdist, which a child of one would take itself for.
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def pytest_run(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=VARIABLES, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_it_times_and_notes_what(tmp_path):
    pytest.importorskip("pytest_benchmark")
    written = tmp_path / "result.json"
    chosen = "bn_stats and reference and 3136x64 or eager and resnet50.3.projection"
    options = ("--batch", 1, "--mode", "eval", f"--benchmark-json={written}")
    done = pytest_run("benchmarks", "--benchmark-only", "-k", chosen, *options)
    assert done.returncode == 0, done.stdout
    found = {run["name"].split("[")[0]: run for run in json.loads(written.read_text())["benchmarks"]}
    block = found["test_step"]
    assert block["extra_info"]["x"] == [1, 512, 28, 28]
    assert block["extra_info"]["flops"] > 0
    assert block["extra_info"]["versions"]["torch"] == torch.__version__
    assert block["stats"]["rounds"] == 10
    assert block["options"]["timer"] == "synchronised"
    assert found["test_primitive"]["extra_info"]["bytes"] == 3136 * 64 * 4


def test_other_runs_leave_it_alone():
    """Nor do they take long to find that out: all files of tests but one are left out, none of other folders."""
    done = pytest_run("--collect-only", "--ignore-glob=tests/test_[!l]*", "--ignore-glob=tests/fuzz", "-k", "test_step or layout")
    assert "test_layout.py" in done.stdout
    assert "test_bench_" not in done.stdout
