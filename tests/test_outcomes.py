"""The pytest plugin that writes outcomes down: crashes and hangs cost one test, what passed is not run again."""

import json
import subprocess
import sys
import time

import pytest

from fused_res.benchmarks import outcomes

TESTS = """
import os, time
import pytest
@pytest.mark.parametrize("i", range(6))
def test_passes(i):
    time.sleep(0.2)
def test_crashes():
    if "WELL" not in os.environ: os._exit(11)
def test_hangs():
    if "WELL" not in os.environ: time.sleep(100)
def test_fails():
    assert "WELL" in os.environ
@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""


# Without hypothesis, whose import takes longer than all of these tests.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
PYTEST += ["-p", "fused_res.benchmarks.outcomes"]


@pytest.fixture
def run(tmp_path, outcomes_alone):
    """Runs pytest with the plugin on `TESTS`; returns its exit code and the names of the tests that it ran."""
    path = tmp_path / "a.outcomes.jsonl"
    (tmp_path / "test_planted.py").write_text(TESTS)

    def run(*options):
        before = path.read_text().count("\n") if path.is_file() else 0
        command = [*PYTEST, "-q", "--outcomes", path, "--timeout", "4", "--timeout-method", "thread", *options, "test_planted.py"]
        code = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode
        ran = [json.loads(line)["test"].split("::")[1] for line in path.read_text().splitlines()[before:]]
        return code, ran

    run.path = path
    return run


@pytest.mark.slow
def test_crashes_and_hangs_cost_one_test_each_and_what_passed_is_left_out(run, monkeypatch):
    code, ran = run("-n", "2", "--dist", "worksteal")
    assert code == 1
    assert len(ran) == 10
    found = {name.split("::")[1]: line for name, line in outcomes.load(run.path).items()}
    assert [found[f"test_passes[{i}]"]["outcome"] for i in range(6)] == 6 * ["passed"]
    assert found["test_skipped"]["outcome"] == "skipped"
    for name in ("test_crashes", "test_hangs"):
        assert found[name]["outcome"] == "failed"
        assert "crashed while running" in found[name]["message"]
    assert "assert" in found["test_fails"]["message"]
    with run.path.open("a") as file:
        file.write('{"test": "test_pl')  # cut off
    monkeypatch.setenv("WELL", "1")
    code, ran = run("-n", "2", "--dist", "worksteal")
    assert code == 0
    assert sorted(ran) == ["test_crashes", "test_fails", "test_hangs"]
    assert {line["outcome"] for line in outcomes.load(run.path).values()} == {"passed", "skipped"}
    assert run() == (0, [])


@pytest.mark.slow
def test_a_run_that_is_killed_has_written_what_it_found_and_the_next_runs_the_rest(run, monkeypatch, tmp_path):
    command = [*PYTEST, "--outcomes", str(run.path), "test_planted.py", "-k", "passes"]
    monkeypatch.setenv("WELL", "1")
    killed, end = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL), time.monotonic() + 60
    while not outcomes.load(run.path) and time.monotonic() < end:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    done = {name.split("::")[1] for name in outcomes.load(run.path)}
    assert 1 <= len(done) < 6
    code, ran = run()
    assert code == 0
    assert len(ran) == 10 - len(done)
    assert not done & set(ran)


def test_what_failed_before_comes_last_and_files_are_mixed(run):
    run("--deselect", "test_planted.py::test_crashes", "--deselect", "test_planted.py::test_hangs", "-k", "fails")
    _, ran = run("--deselect", "test_planted.py::test_crashes", "--deselect", "test_planted.py::test_hangs")
    assert ran[-1] == "test_fails"
    assert sorted(ran) != ran


def test_without_the_option_nothing_changes(tmp_path, outcomes_alone):
    (tmp_path / "test_planted.py").write_text("def test_b(): pass\ndef test_a(): pass\n")
    command = [*PYTEST, "-v", "test_planted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.index("test_b") < done.stdout.index("test_a")
