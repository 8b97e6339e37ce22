"""What was tuned stands: in other processes and threads, for these versions and switches, and no others."""

import functools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from tuning_plants import level_of, own_tiles

from blocks import image, make, step
from fused_res import plans
from fused_res.tuning import files, tuner

CPU = torch.device("cpu")


pytest_plugins = ("tuning_plants",)
pytestmark = pytest.mark.usefixtures("nothing_known")


def other_process():
    """As if started anew."""
    tuner._known.clear()
    return plans.afresh()


def test_another_process_finds_what_was_found(planted, timings):
    first = timings(**{"own (32, 4)": 0.5, "epilogue": 0.5})
    block = make("bottleneck", torch.float32)
    x = image(block, dtype=torch.float32)
    assert level_of(block, x) == "epilogue"
    assert first.asked
    with other_process():
        second = timings()
        planted.calls = []
        step(block, x)
        assert not second.asked
        assert own_tiles(planted) == {(32, 4)}
        assert level_of(block, x) == "epilogue"
    with other_process():
        third = timings()
        assert level_of(block, x[:2]) == "bn_act"
        assert third.asked


def test_other_versions_and_switches_are_measured_anew(timings, monkeypatch):
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    timings(prologue=0.5)
    assert level_of(block, x) == "prologue"
    changes = (
        lambda: monkeypatch.setattr(tuner, "_files_of", lambda *_: files.PlanFiles({"torch": "2.99"})),
        lambda: torch.use_deterministic_algorithms(True),
    )
    try:
        for change in changes:
            change()
            with other_process():
                found = timings(epilogue=0.5)
                assert level_of(block, x) == "epilogue"
                assert found.asked
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_identity_names_device_versions_and_sources():
    found = tuner.identity(CPU)
    assert {"fused_res", "torch", "triton", "cuda", "cudnn", "source", "library", "device"} <= set(found)
    assert tuner._files(CPU).identity["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("value", ['"nonsense"', '{"own": 1, "config": null}', '{"own": true, "config": [1, 2, 3]}', "3", "[]"])
def test_values_that_mean_nothing_are_measured_anew(value, planted, timings):
    timings(**{"own (32, 4)": 0.5, "epilogue": 0.5})
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    assert level_of(block, x) == "epilogue"
    for path in files.root().rglob("*.json"):
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"value": json.loads(value)}))
    with other_process():
        found = timings(**{"own (32, 4)": 0.5, "prologue": 0.5})
        with pytest.warns(UserWarning, match="ignored"):
            assert level_of(block, x) == "prologue"
        assert len(found.asked) > 1


def test_without_a_cache_tuning_works_within_the_process(timings, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CACHE", "")
    found = timings(prologue=0.5)
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    assert level_of(block, x) == "prologue"
    asked = len(found.asked)
    with plans.afresh():
        assert level_of(block, x) == "prologue"
    assert len(found.asked) == asked


def test_threads_tune_a_block_once(timings):
    found = timings(prologue=0.5)
    block = make("identity", torch.float32)
    x, levels = image(block, dtype=torch.float32), []
    threads = [threading.Thread(target=lambda: levels.append(level_of(block, x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert levels == ["prologue"] * 4
    assert sum(names[0] == "bn_act" for names in found.asked) == 1


PROCESS = """
import sys, torch
from fused_res import BasicBlock, explain
from fused_res.tuning import tuner
torch.set_num_threads(1)
fast = sys.argv[1]
tuner.measure = lambda runs, device, queued: {name: 0.5 if name == fast else 1.0 for name in runs}
print(explain(BasicBlock(8, 8), torch.randn(2, 8, 6, 6)).rows[0].level)
"""


def test_processes_that_tune_at_once_each_finish_and_later_ones_agree():
    environment = os.environ | {"FUSED_RES_TUNE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    start = functools.partial(subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = [start([sys.executable, "-c", PROCESS, level]) for level in ("prologue", "epilogue", "prologue")]
    outputs = [process.communicate(timeout=300) for process in first]
    assert [process.returncode for process in first] == [0] * 3, outputs
    levels = [stdout.strip() for stdout, _ in outputs]
    assert set(levels) <= {"prologue", "epilogue"}
    later = start([sys.executable, "-W", "error::UserWarning", "-c", PROCESS, "none"])
    stdout, stderr = later.communicate(timeout=300)
    assert stdout.strip() in levels, stderr
