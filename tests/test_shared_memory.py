"""Every block runs on every GPU, with little shared memory or much: over a driver that launches nothing (`fake_gpu.py`)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import within

from fused_res import aot, aot_table
from fused_res.aot import SHARED
from fused_res.backends import triton as backend
from fused_res.benchmarks.cases import SUITES
from fused_res.block.levels import LEVELS
from fused_res.primitives.moments import moments
from fused_res.primitives.operands import Activation

pytest.importorskip("triton")

from fused_res.backends import native
from fused_res.kernels.conv_cases import meta_activated, meta_cases, meta_gradient
from fused_res.kernels.conv_tiling import Config, configurations, shared_bytes
from fused_res.kernels.tiling import compiling_for
from fused_res.primitives.run import of

DIRECTIONS = ("fprop", "dgrad", "wgrad")


def fake_gpu(*arguments):
    """Its lines. It leaves the convolutions to our own kernels."""
    environment = {**os.environ, "FUSED_RES_CONVOLUTIONS": "own", "FUSED_RES_TUNE": "0"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("fake_gpu.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_blocks(capability, dtype, levels, cases):
    rows = fake_gpu("blocks", capability, *dtype.split(), "--levels", *levels, "--cases", *cases)
    assert [(row["case"], row["level"]) for row in rows] == [(case, level) for case in cases for level in levels for _ in "te"]
    for row in rows:
        assert row["error"] is None, row
        assert row["launches"] > 0, row
        assert row["same"], row
        assert row["chosen"] == 0, row
        assert row["direct"] == (row["launches"] if native.loads() else 0), row
    kernels = [kernel for row in rows for kernel in row["kernels"]]
    assert max(shared for _, shared in kernels) <= SHARED[capability]
    return {name for name, _ in kernels}


@pytest.mark.slow
def test_a_block_runs_with_little_shared_memory():
    kernels = check_blocks(86, "bfloat16", ["prologue"], ["resnet50.1.identity"])
    assert kernels >= {"conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_partial_kernel"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        *((other, "bfloat16") for other in SHARED),
        *((86, dtype) for dtype in ("float16", "float32", "float32 ieee")),
    ],
)
@pytest.mark.timeout(1200)
def test_every_block_runs_on_every_gpu(capability, dtype):
    blocks = [case.name for case in SUITES["resnet50"]]
    assert len(blocks) == 8
    check_blocks(capability, dtype, LEVELS, blocks)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.timeout(1200)
def test_shared_memory_is_known_from_the_tile(dtype):
    """What compiled kernels take is what is said of their tiles, or a little less: those whose blocks are all full may keep what
    they compute of an operand in registers."""
    rows = fake_gpu("tiles", 86, dtype)
    assert {row["direction"] for row in rows} == set(DIRECTIONS)
    for row in rows:
        n, c, h, w, k, *filter_ = map(int, re.findall(r"\d+", row["at"]))
        block_p, block_k, block_c = row["config"][:3]
        full = filter_ == [1, 1, 1] and n * h * w % block_p == k % block_k == c % block_c == 0 and row["direction"] != "wgrad"
        spared = full * block_p * (block_c if row["direction"] == "fprop" else block_k) * getattr(torch, dtype).itemsize
        assert any(0.9 * row["told"] <= row["shared"] + size <= row["told"] for size in {0, spared}), row


def what_was_compiled():
    """Of every convolution in docs/kernels.csv: architecture, direction, tile, bytes of an element, the operands as the kernel has
    them, and the shared memory that the compiled kernel takes."""
    lines = aot_table.read(Path(__file__).parents[1] / "docs" / "kernels.csv")
    shared = {(line.arch, line.kernel, line.variant, line.dtype): line.shared_kib * 1024 for line in lines}
    for arch in sorted({line.arch for line in lines}):
        for dtype in aot.DTYPES:
            for file, variant in aot.variants(dtype, arch):
                name = aot.kernel_name(variant)
                if not file.startswith("conv_") or name == "conv_wgrad_sum":
                    continue
                if (taken := shared.get((arch, name, variant.name, str(dtype).removeprefix("torch.")))) is None:
                    continue  # of 8.9 the page has a part
                launch = variant.launch
                found = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
                read = [found[side] for side in ("dy", "x") if side in found]
                direction = file.removeprefix("conv_")
                config = Config(found["BLOCK_P"], found["BLOCK_K"], found["BLOCK_C"], launch.warps, found["STAGES"])
                yield arch, direction, config, dtype.itemsize, [seen(side, found.get("LIVE")) for side in read], taken, variant.name


def seen(source, live):
    """An operand as `shared_bytes` is told of it, from what a kernel is given."""
    if source.coefficients is None:
        return SimpleNamespace(vectors=source.vectors)
    masked = source.signs is None and source.vectors is None
    return SimpleNamespace(coefficients=source.coefficients, signs=source.signs, masked=masked, training=live)


def test_no_compiled_kernel_takes_more_than_was_told():
    """With `mma` what is told, or less; with `wgmma` and `tcgen05` at most a step more, which every tile leaves room for."""
    counted = dict.fromkeys(SHARED, 0)
    for arch, direction, config, itemsize, read, taken, name in what_was_compiled():
        longer = config._replace(stages=config.stages + 1) if 90 <= arch < 120 else config
        most = shared_bytes(direction, longer, itemsize, *read) + 32 * (arch == 100)  # a few words of `tcgen05`'s own
        assert taken <= most <= SHARED[arch], (arch, direction, name, config, taken, most)
        counted[arch] += 1
    assert all(counted[arch] > 200 for arch in (80, 86, 90, 100, 120)), counted


def test_a_tile_that_is_cut_to_the_channels_is_judged_as_what_it_is():
    """128 x 128 pixels and channels are, of 64 channels, 128 x 64: no larger than that, and no wider than there are channels."""
    fits = configurations("dgrad", torch.bfloat16, 802816, (64, 64, 1, 1), area=128 * 64)
    assert fits[0] == Config(128, 64, 64, 4, 3)
    assert configurations("dgrad", torch.bfloat16, 802816, (64, 64, 1, 1), area=64 * 64)[0] == Config(64, 64, 64, 4, 3)


def operands(direction, case):
    """Of a call in which all that can be computed on the way is."""
    x, dy = meta_activated(case), meta_gradient(case.dy, "signs")
    return {"fprop": (x, True, None), "dgrad": (dy, case.x, x, None), "wgrad": (dy, x)}[direction]


def fitting(direction, case, capability):
    image = case.x if direction == "dgrad" else case.dy
    with compiling_for(capability, SHARED[capability]):
        pixels = image.numel() // image.shape[1]
        return backend.tiles(f"conv_{direction}", case.unit.weight, pixels, operands(direction, case))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiles_to_try_fit(direction):
    left_out = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in meta_cases(dtype):
            some, more, all_ = (fitting(direction, case, capability) for capability in (86, 80, 90))
            assert len(some) >= 1
            assert set(some) <= set(more) <= set(all_)
            left_out += len(all_) - len(some)
            image = case.x if direction == "dgrad" else case.dy
            assert all_ == configurations(direction, dtype, image.numel() // image.shape[1], case.unit.weight.shape)
    assert left_out > 0 or direction == "fprop"


def test_a_filters_gradients_in_ieee_float32_leave_registers():
    """With more than 32 sums a thread they went through local memory in the loop (`make aot ARGS=--tiles`)."""
    filters = [case for case in meta_cases(torch.float32) if case.unit.weight.shape[2] > 1]
    precisions, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    most = {}
    try:
        for precisions.fp32_precision in ("ieee", "tf32"):
            tiles = [Config(*tile) for case in filters for tile in fitting("dgrad", case, 90)]
            most[precisions.fp32_precision] = max(c.block_p * c.block_c / (32 * c.warps) for c in tiles)
    finally:
        precisions.fp32_precision = before
    assert most["ieee"] <= 32 < most["tf32"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_moments_in_smaller_blocks(device, proven_interpreter, dtype):
    """The blocks that GPUs with `mma` take, several to a row: errors as with one."""
    image = torch.randn(2, 150, 9, 9, generator=torch.Generator().manual_seed(0)).to(device, dtype) + 1
    with compiling_for(86, SHARED[86]):
        found = moments(Activation(image.contiguous(memory_format=torch.channels_last)), run=of("triton"))
    rows = image.double().permute(0, 2, 3, 1).flatten(0, 2)
    centred = rows - rows.mean(0)
    expected, error = centred.T @ centred / len(rows), 32 * 2.0**-24
    unit = expected.diagonal().sqrt() + 2.0**-24 * rows.abs().amax(0)
    within(found.mean, rows.mean(0), error * unit)
    within(found.covariance, expected, error * torch.outer(unit, unit))
