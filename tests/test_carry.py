"""Compiled kernels that are carried to another machine: packed, unpacked elsewhere, and found there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_res import environment
from fused_res.benchmarks import kernel_cache

ROOT = Path(__file__).resolve().parents[1]


def entry(cache, key, *suffixes):
    """A kernel's files as Triton leaves them."""
    folder = cache / key
    folder.mkdir(parents=True)
    for suffix in suffixes:
        (folder / f"kernel{suffix}").write_text(f"{key} {suffix}")
    paths = {f"kernel{suffix}": str(folder / f"kernel{suffix}") for suffix in suffixes}
    (folder / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))


def test_what_is_needed_is_packed_and_unpacked_with_paths_of_its_own(tmp_path):
    entry(tmp_path / "here", "ONE", ".json", ".cubin", ".ptx")
    entry(tmp_path / "here", "TWO", ".json", ".ptx")  # without machine code
    assert kernel_cache.pack(tmp_path / "here", tmp_path / "kernels.tar.xz") == 1
    shutil.rmtree(tmp_path / "here")
    assert kernel_cache.unpack(tmp_path / "kernels.tar.xz", tmp_path / "there") == 1
    found = json.loads((tmp_path / "there" / "ONE" / "__grp__kernel.json").read_text())["child_paths"]
    assert {name: Path(path).read_text() for name, path in found.items()} == {
        "kernel.json": "ONE .json",
        "kernel.cubin": "ONE .cubin",
    }
    assert not (tmp_path / "there" / "TWO").exists()


@pytest.mark.slow
def test_another_process_finds_every_kernel(tmp_path):
    pytest.importorskip("triton")

    def compiled(cache):
        case = ("--levels", "bn_act", "--cases", "resnet50.1.identity", "--batch", "64")
        command = [sys.executable, ROOT / "tests" / "fake_gpu.py", "blocks", "90", "bfloat16", *case, "--cache", cache]
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert all(row["error"] is None and row["launches"] for row in rows)
        return [kernel for row in rows for kernel in row["kernels"]]

    assert len(compiled(tmp_path / "here")) > 5
    kernel_cache.pack(tmp_path / "here", tmp_path / "kernels.tar.xz")
    kernel_cache.unpack(tmp_path / "kernels.tar.xz", tmp_path / "there")
    assert compiled(tmp_path / "there") == []


def test_a_copy_without_its_commits_names_the_one_that_it_is_of(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "checkout", lambda: tmp_path)
    monkeypatch.setattr(environment, "_output", lambda *command, cwd=None: None)
    assert environment.git() is None
    path = tmp_path / environment.CARRIED
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"commit": "abc", "source": environment.fingerprint()}))
    assert environment.git() == {"commit": "abc", "dirty": False}
    path.write_text(json.dumps({"commit": "abc", "source": "of other sources"}))
    assert environment.git() is None
