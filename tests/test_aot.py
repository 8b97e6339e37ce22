"""The kernels compile for every architecture to the machine code they should, and the inspection sees it when they do not.

Compiling needs a process without the interpreter. The addresses past 2^31 elements are tested where the kernels run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_res import aot_table
from fused_res.kernels.device import first_row, offset

ROOT = Path(__file__).parents[1]

PLANTED = """
import torch, triton, triton.language as tl
from fused_res import aot
from fused_res.kernels.ahead import Variant, meta
from fused_res.kernels.launching import Launch

@triton.jit
def plain_max(x, y, P, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, B)
    tl.store(y + at, tl.maximum(tl.load(x + at), 0.0))

@triton.jit
def atomics(x, y, P, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, B)
    tl.atomic_add(y + at, tl.load(x + at))

@triton.jit
def narrow_offsets(x, y, P, C, B: tl.constexpr):
    at = tl.program_id(0) * C + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at))

@triton.jit
def narrow_accesses(x, y, P, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, B) * 3
    tl.store(y + at, tl.load(x + at))

@triton.jit
def too_much_shared(x, y, P, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, 4096)
    total = tl.zeros((4096,), tl.float32)
    for i in tl.range(0, P, num_stages=14):
        total += tl.load(x + at + i * 4096)
    tl.store(y + at, total)

@triton.jit
def spills(x, y, P, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, 16384)
    a = tl.load(x + at)
    tl.store(y + at, a / tl.sum(a))

@triton.jit
def sound(x, y, P, C, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, B)
    v = tl.load(x + at)
    tl.store(y + at, tl.where(v <= 0, 0.0, v))

x = meta(1024, 64)
for kernel in (plain_max, atomics, narrow_offsets, narrow_accesses, too_much_shared, spills, sound):
    launch = Launch(kernel, 1, (x, x, 1024, 64), {"B": 1024}, 1 if kernel is spills else 4)
    row = aot.inspect(Variant("", launch, True, True, False, False), torch.float32, 80)
    print(kernel.__name__, row.problems, sep=": ")
"""


def compiled(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


def sample(*options):
    """Rows of a part of the sample, sound all of them."""
    result = compiled("-m", "fused_res.aot", "--sample", "--json", *options)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_sample_compiles_to_sound_code(dtype):
    rows = sample("--arch", "90", "--dtype", dtype)
    assert {row["kernel"] for row in rows} >= {
        "bn_stats",
        "bn_finalize",
        "bn_act",
        "bn_act_backward_reduce",
        "bn_act_backward_apply",
        "conv_fprop",
        "conv_dgrad",
        "conv_wgrad_partial",
        "masked_add",
    }
    assert {row["matrix"] for row in rows} == {"", "wgmma"}
    assert {(row["arch"], row["dtype"]) for row in rows} == {(90, dtype)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_so_does_what_multiplies_for_newer_gpus():
    rows = sample("--arch", "100", "--arch", "120")
    assert {(row["arch"], row["matrix"]) for row in rows} == {(100, "tcgen05"), (120, "mma")}


@pytest.mark.timeout(300)
def test_frozen_input_is_not_loaded():
    """Where running statistics and saved signs make y superfluous, its bytes are not moved."""
    script = """
import torch
from fused_res import aot
for file, variant in aot.variants(torch.bfloat16, 90):
    if file == "bn_act_backward" and variant.name in ("outer, masked 100352x64", "outer, frozen, masked 100352x64"):
        print(aot.inspect(variant, torch.bfloat16, 90).loads[16])
"""
    result = compiled("-c", script)
    assert result.returncode == 0, result.stderr
    live, frozen = map(int, result.stdout.split())
    # dout (2), p (2) in both; y (2), q (2), r (2) in one.
    assert (live, frozen) == (10, 4)


@pytest.mark.timeout(300)
def test_inspection_finds_planted_faults(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(PLANTED)
    result = compiled(str(path))
    assert result.returncode == 0, result.stderr
    found = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert found.pop("sound") == "[]"
    for kernel, problem in {
        "plain_max": "drops NaN: max.f32",
        "atomics": "atomics: atom.",
        "narrow_offsets": "row offsets: no 64-bit multiplication",
        "narrow_accesses": "narrow loads: ",
        "too_much_shared": "shared memory: ",
        "spills": "spills: ",
    }.items():
        assert problem in found[kernel], found


def test_the_data_has_the_kernels_there_are(tmp_path):
    document = ROOT / "docs" / "kernels.md"
    result = compiled("-m", "fused_res.aot", "--check", str(document))
    assert result.returncode == 0, result.stdout + result.stderr
    other = tmp_path / "kernels.md"
    other.write_text(document.read_text().replace("| bn_stats | 18 |", "| bn_stats | 19 |"))
    aot_table.data(other).write_text(
        aot_table.data(document).read_text().replace("bn_stats,bn_stats,1x1,", "bn_stats,bn_stats,2x2,")
    )
    result = compiled("-m", "fused_res.aot", "--check", str(other))
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        *(
            f"{what}: bn_stats, bn_stats, {shape}, {dtype}"
            for what, shape in (("missing", "1x1"), ("gone", "2x2"))
            for dtype in ("bfloat16", "float16", "float32")
        ),
        "kernels.md does not show the worst of kernels.csv",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")
def test_refuses_the_interpreter():
    command = [sys.executable, "-m", "fused_res.aot", "--sample"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)
    assert result.returncode == 2
    assert "TRITON_INTERPRET: expected unset" in result.stderr


@triton.jit
def _addresses(tiles, out, rows, C, WIDE: tl.constexpr):
    tile = tl.load(tiles)
    if WIDE:
        tl.store(out, offset(first_row(tile, rows), C))
    else:
        tl.store(out, (tile * rows * C).to(tl.int64))


def test_row_offsets_exceed_32_bits(device, proven_interpreter):
    tile, rows, channels = 2**22 + 1, 2**10 + 1, 2**11 + 1
    tiles, out = torch.tensor([tile], dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    _addresses[(1,)](tiles, out, rows, channels, True)
    assert out.item() == tile * rows * channels
    if device == "cpu":
        with pytest.raises(Exception, match="overflow"):
            _addresses[(1,)](tiles, out, rows, channels, False)
