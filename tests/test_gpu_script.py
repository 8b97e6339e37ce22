"""`make gpu` as far as a CPU goes: its plan, kills at any moment, a dry run of each kind of step."""

import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from fused_res.benchmarks import gpu, gpu_plan
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.gpu import RESERVE

ROOT = Path(__file__).resolve().parents[1]
# conftest.py may have switched this process to Triton's interpreter; a user's has not.
VARIABLES = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
MANY_STEPS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
sys.modules["fused_res"] = None  # no summary, and so no seconds to import torch
import gpu, gpu_plan
output = Path(sys.argv[2])
output.mkdir(exist_ok=True)
work = "import sys, time; open(sys.argv[1], 'a').write('begun '); time.sleep(0.4); open(sys.argv[1], 'a').write('ended ')"
fails = "import sys; open(sys.argv[1], 'a').write('begun '); sys.exit(1)"
planned = [
    gpu_plan.Step(f"step {i}", (("-c", fails if i == 2 else work, str(output / f"{i}.txt")),), limit=60) for i in range(8)
]
stay = gpu.Stay(output, planned, time.monotonic() + 300, output.with_name("all.tar.gz"), dict(os.environ), output, "sources")
stay.run_all(planned)
"""


def whole(archive):
    """The names in an archive, all of which can be read to their end."""
    with tarfile.open(archive) as packed:
        return {name: packed.extractfile(name).read() for name in packed.getnames()}


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_goes_on_where_it_was(tmp_path, seed):
    output, archive, moments, kills = tmp_path / "results", tmp_path / "all.tar.gz", random.Random(seed), 0
    command = [sys.executable, "-c", MANY_STEPS, str(ROOT / "benchmarks"), str(output)]
    while True:
        script = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if kills == 5:
            assert script.wait(120) == 0
            break
        time.sleep(moments.uniform(0.3, 2.0))
        script.kill()
        kills += script.wait() != 0
        done = json.loads((output / "state.json").read_text())["steps"] if (output / "state.json").is_file() else {}
        passed = {name for name, step in done.items() if step["status"] == "passed"}
        assert all((output / f"{name.split()[1]}.txt").read_text().endswith("ended ") for name in passed)
        if archive.is_file():
            assert "results/state.json" in whole(archive)
        if script.returncode == 0:
            break
    assert kills > 0
    ran = [(output / f"{i}.txt").read_text().split() for i in range(8)]
    assert ran[2] == ["begun"]
    ended = [steps.count("ended") for i, steps in enumerate(ran) if i != 2]
    # A kill after the step's end and before that is noted makes it run again, and only then.
    assert all(1 <= count <= 2 for count in ended)
    assert sum(steps.count("begun") for steps in ran) <= 8 + kills
    done = json.loads((output / "state.json").read_text())["steps"]
    assert {step["status"] for step in done.values()} == {
        "passed",
        "failed with exit code 1",
    }
    assert {f"results/{i}.txt" for i in range(8)} <= whole(archive).keys()


def test_the_plan_is_in_order_and_fits_the_stay(tmp_path):
    planned = gpu_plan.steps(tmp_path)
    names = [step.name for step in planned if step.name != "build"]
    assert names[:4] == ["smoke", "kernel-tests", "gpu-tests", "warm"]
    assert names[4].startswith("resnet50-train-bf16 ")
    assert names[-3:] == ["profile", "plans", "report"]
    assert len(set(names)) == len(names)
    known = {case.name for suite in SUITES.values() for case in suite}
    for step in planned:
        assert step.estimate <= step.limit <= 9 * 60 - RESERVE
        assert set(step.needs) <= set(names)
        for command in step.commands:
            assert all(part in known for part in command if part.startswith(("resnet50.", "resnet18.")))
    timed = [step for step in planned if step.name.startswith("resnet")]
    assert all(step.needs == ("smoke",) and step.resumable for step in timed)
    assert sum(step.estimate for step in planned[: names.index("cudnn-fusions") + 1]) < 9 * 60
    for name in ("kernel-tests", "gpu-tests"):
        files = [part for step in planned if step.name == name for part in step.commands[0] if part.endswith(".py")]
        assert files
        assert all(Path(file).is_file() for file in files)


def test_every_kernel_that_tiles_times_is_compiled_before(tmp_path):
    tiles = pytest.importorskip("fused_res.benchmarks.tiles")
    before = {step.name: step for step in gpu_plan.steps(tmp_path)}["tiles-warm"]
    kernels = [command[command.index("--kernels") + 1] for command in before.commands]
    cases = [case for case in SUITES["resnet50"] if case.name in before.commands[0]]
    jobs = {job.name for case in cases for job in tiles.jobs(case, 1, torch.bfloat16, torch.device("cpu"))}
    assert len(cases) == 2
    for job in jobs:
        assert sum(f"{job} ".startswith(f"{kernel} ") for kernel in kernels) == 1, job


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu.py")], env=VARIABLES, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr


def test_carried_kernels_are_unpacked_once_and_again_after_a_cut(tmp_path, monkeypatch):
    carried = tmp_path / "carry" / "triton-cache.tar.xz"
    carried.parent.mkdir()
    carried.write_bytes(b"stands for an archive")
    unpacked = []
    monkeypatch.setattr(gpu, "CARRY", carried.parent)
    monkeypatch.setattr(gpu.kernel_cache, "unpack", lambda archive, cache: unpacked.append(cache) or 1)
    for _ in range(2):
        environment = gpu.caches(tmp_path)
    assert unpacked == [Path(environment["TRITON_CACHE_DIR"])]

    def cut(archive, cache):
        raise KeyboardInterrupt

    os.utime(carried, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(gpu.kernel_cache, "unpack", cut)
        with pytest.raises(KeyboardInterrupt):
            gpu.caches(tmp_path)
    gpu.caches(tmp_path)
    assert len(unpacked) == 2


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_dry_run(tmp_path):
    """Without an installation: only the standard library, torch and pytest are given, the script finds the rest. Killed twice."""
    output, archive = tmp_path / "results", tmp_path / "all.tar.gz"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--output", str(output), "--archive", str(archive)]
    timed, moments = output / "resnet18-eval-fp32.jsonl", random.Random()
    for _ in range(2):
        script = subprocess.Popen(command, env=VARIABLES, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(5, 60))
        script.kill()
        script.wait()
        lines = timed.read_text().splitlines(keepends=True) if timed.is_file() else []
        if archive.is_file():
            whole(archive)
    done = subprocess.run(command, env=VARIABLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    kept = [line for line in lines if line.endswith("\n")]
    assert timed.read_text().splitlines(keepends=True)[: len(kept)] == kept
    summary = whole(archive)["results/summary.md"].decode()
    assert "| resnet18.1.identity, batch 1 |" in summary
    assert "| sanitizer | skipped" in summary
    assert re.search(r"^Tests: [1-9]\d* passed, 0 failed", summary, re.MULTILINE), summary
    assert "aten::" in (output / "profile.md").read_text()
    assert "</html>" in (output / "report.html").read_text()
    (sequence,) = [json.loads(line) for line in (output / "sequences.jsonl").read_text().splitlines()]
    assert "_Direct" in [name for name, _ in sequence["kernels"]]  # on a CPU those are operators, and a block's forward is one
    assert all(us > 0 for _, us in sequence["kernels"])
    again = subprocess.run(command, env=VARIABLES, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "at most" not in again.stdout
    listed = subprocess.run([*command, "--list"], env=VARIABLES, capture_output=True, text=True, check=False)
    assert "resnet18-eval-fp32 2.projection: passed" in listed.stdout
