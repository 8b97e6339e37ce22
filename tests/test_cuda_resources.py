"""What nvcc makes of the CUDA kernels: nothing in local memory, and 16 bytes an access where alignment allows."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fused_res.benchmarks import native_kernels, native_work
from fused_res.cost.constants import GPUS

ROOT = Path(__file__).parents[1]
STEMS = ("bn_stats", "bn_finalize", "bn_act", "bn_act_backward", "masked_add")
# The kernels are the same: one is enough for every day.
ARCHS = [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"]
INCLUDE = Path(torch.__file__).parent / "include"
# Instances of each kernel: number formats, wide or not, modes.
KERNELS = {
    "bn_stats": 3 * 2,
    "bn_finalize": 1,
    "bn_act": 3 * 2 * 3,
    "bn_act_backward_reduce": 3 * 2 * 3,
    "bn_act_backward_finalize": 1,
    "bn_act_backward_apply": 3 * 2 * 3,
    "masked_add": 3 * 2 * 2,
}


def find(tool):
    """A tool of the CUDA toolkit, which Triton's package brings in part."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(os.environ[home]) / "bin" for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ]
    folders += [Path("/usr/local/cuda/bin")]
    folders += [Path(root) / "backends" / "nvidia" / "bin" for root in (triton.submodule_search_locations if triton else ())]
    return shutil.which(tool) or next((str(f / tool) for f in folders if (f / tool).is_file()), None)


NVCC, CUOBJDUMP = find("nvcc"), find("cuobjdump")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(not (INCLUDE / "torch/csrc/stable").is_dir(), reason="this torch has no headers of the stable ABI"),
]


@pytest.fixture(scope="module", params=ARCHS)
def compiled(request, tmp_path_factory):
    """The report of ptxas and the device code, of all files in one compilation: most of it is torch's headers."""
    folder = tmp_path_factory.mktemp(request.param)
    source, cubin = folder / "all.cu", folder / "all.cubin"
    source.write_text("".join(f'#include "{ROOT / "csrc" / "cuda" / stem}.cu"\n' for stem in STEMS))
    command = [NVCC, "-cubin", f"-arch={request.param}", "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}", "-isystem", INCLUDE]
    done = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, cubin


def kernel_of(function):
    """The kernel's name in a mangled one, and whether this instance moves 16 bytes at once."""
    return re.search(r"\d+([a-z_]+)_kernel", function)[1], "Lb1E" in function


def test_no_kernel_touches_local_memory(compiled):
    functions = compiled[0].split("Compiling entry function '")[1:]
    names = [kernel_of(function)[0] for function in functions]
    assert {name: names.count(name) for name in names} == KERNELS
    for function in functions:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in function, function
        registers = int(re.search(r"Used (\d+) registers", function)[1])
        # Of 65536: where memory sets the pace, two blocks of 256 threads must be resident, and one elsewhere.
        assert registers <= (128 if kernel_of(function)[1] else 255), function


@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump is not installed")
def test_wide_kernels_move_16_bytes_at_once(compiled):
    seen = set()
    listing = subprocess.run([CUOBJDUMP, "-sass", compiled[1]], capture_output=True, text=True, check=True).stdout
    for function in listing.split("Function : ")[1:]:
        name, wide = kernel_of(function.split()[0])
        accesses = re.findall(r"\b((?:LD|ST|LDG|STG|LDL|STL)\b[.\w]*)", function)
        assert not [a for a in accesses if a.split(".")[0] not in ("LDG", "STG")], function.split()[0]
        activations = [a for a in accesses if ".U8" not in a]
        assert all((".128" in a) == wide for a in activations), (function.split()[0], set(activations))
        assert not wide or sum(a.startswith("LDG") for a in activations) >= 4
        seen.add(name)
    assert seen == set(KERNELS)


# Of the moment form's finalize steps, which no tensor core and no access of 16 bytes would help.
FINALIZE = {
    "spread": 1,
    "pointwise_direct": 1,
    "moments_finalize": 1,
    "scaled_weight": 1,
    "pointwise_tail_backward_finalize_rows": 1,
    "pointwise_tail_backward_finalize": 1,
    "move_statistics": 1,
}


@pytest.mark.parametrize("arch", ARCHS)
def test_no_finalize_kernel_touches_local_memory(tmp_path, arch):
    headers = ("moments_finalize", "pointwise_tail_backward_finalize", "move_statistics")
    source = tmp_path / "finalize.cu"
    source.write_text("".join(f'#include "{header}.cuh"\n' for header in headers))
    command = [NVCC, "-cubin", f"-arch={arch}", "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings"]
    command += [f"-I{ROOT / 'csrc' / 'cuda'}", source, "-o", tmp_path / "finalize.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    functions = done.stderr.split("Compiling entry function '")[1:]
    names = [kernel_of(function)[0] for function in functions]
    assert {name: names.count(name) for name in names} == FINALIZE
    for function in functions:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in function, function
        assert int(re.search(r"Used (\d+) registers", function)[1]) <= 128, function


# Kernels that multiply beside those of 1x1 convolutions: formats and tilings, 16 bytes at a time or not.
PASSES = {
    "moments": ({"moments": 3 * 4, "moments_merge": 1}, "moments", "const MomentTiles&, const MomentsResult&"),
    "reduce": (
        {"pointwise_tail_backward_reduce": 3 * 4, "pointwise_tail_backward_merge": 1},
        "pointwise_tail_backward_reduce",
        "const TailReduce&, const TailSums&",
    ),
    "apply": ({"pointwise_tail_backward_apply": 3 * 3}, "pointwise_tail_backward_apply", "const TailApply&"),
}


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("passes", PASSES)
def test_no_pass_of_the_moment_form_touches_local_memory(tmp_path, passes, arch):
    """Two blocks of 128 threads are resident at least, or one of 256."""
    kernels, function, arguments = PASSES[passes]
    header = "moments" if passes == "moments" else f"pointwise_tail_backward_{passes}"
    lines = [f"template void {function}<{number}>({arguments}, const Queue&);" for number in ("float", "Half", "BFloat16")]
    source = tmp_path / "passes.cu"
    source.write_text("\n".join([f'#include "{header}.cuh"', "namespace fused_res::cuda {", *lines, "}"]))
    command = [
        NVCC,
        "-cubin",
        f"-arch={arch}",
        "-std=c++17",
        "-O3",
        "-Xptxas=-v",
        "-Werror=all-warnings",
        "--expt-relaxed-constexpr",
    ]
    command += [f"-I{ROOT / 'csrc' / 'cuda'}", source, "-o", tmp_path / "passes.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    functions = done.stderr.split("Compiling entry function '")[1:]
    names = [kernel_of(function)[0] for function in functions]
    found = {name: names.count(name) for name in names}
    assert kernels.items() <= found.items(), found
    for function in functions:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in function, function
        assert int(re.search(r"Used (\d+) registers", function)[1]) <= 255, function
        assert int((re.search(r"(\d+) bytes smem", function) or [0, 0])[1]) <= 48 * 1024, function


# The kernels that multiply, one format a file: of each (wide or not, projection) its tiles.
PRODUCTS = {("pointwise_fprop", True): 2, ("pointwise_fprop", False): 1, ("pointwise_tail", True): 5, ("pointwise_tail", False): 2}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("number", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_kernels_that_multiply_keep_to_registers_and_use_their_instructions(tmp_path, number, arch):
    """No local memory; registers for as many blocks as are meant to be resident; copies of 16 bytes, asynchronous where wide."""
    cubin = tmp_path / "pointwise.cubin"
    command = [NVCC, "-cubin", f"-arch={arch}", "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings"]
    command += [f"-I{ROOT / 'csrc' / 'cuda'}", ROOT / "csrc" / "cuda" / f"pointwise_{number}.cu", "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def named(function):
        return kernel_of(function)[0], re.search(r"Tiling\w*?EEELb([01])E", function)[1] == "1"

    functions = done.stderr.split("Compiling entry function '")[1:]
    names = [named(function.split("'")[0]) for function in functions]
    assert {name: names.count(name) for name in names} == PRODUCTS
    for function in functions:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in function, function
        # Of what a launch gives the compiler knows nothing.
        given = re.search(r"TilingILi128ELi128\w*?Lb1ELb1E", function.split("'")[0])
        registers, shared = (int((re.search(rf"(\d+) {unit}", function) or (0, 0))[1]) for unit in ("registers", "bytes smem"))
        # Of 65536: twelve warps of those with 64 sums a thread or fewer, eight of those with 128.
        many = re.search(r"TilingILi128ELi128|TilingILi64ELi128\w*?Lb1ELb1E", function.split("'")[0])
        assert registers <= (168 if named(function.split("'")[0])[1] and not many else 255), function
        assert shared == 0 if given else 0 < shared <= 48 * 1024, function
    if CUOBJDUMP is None:
        return
    listing = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    product = {"float32": "HMMA.1688.F32.TF32", "bfloat16": "HMMA.16816.F32.BF16"}[number]
    for function in listing.split("Function : ")[1:]:
        name = named(function.split()[0])
        accesses = re.findall(r"\b((?:LD|ST|LDG|STG|LDL|STL|LDGSTS|LDSM)\b[.\w]*)", function)
        kinds = {a.split(".")[0] for a in accesses}
        assert kinds <= {"LDG", "STG", "LDGSTS", "LDSM"}, (name, kinds)
        assert {h.rstrip(".") for h in re.findall(r"\bHMMA[.\w]*", function)} == {product}, name
        assert all(".128" in a for a in accesses if a.startswith("LDGSTS")), name
        assert ("LDGSTS" in kinds) == name[1], name
        # Two floats of a vector, the signs, and statistics are less; activations in 16 bits never are.
        assert not name[1] or not [a for a in accesses if ".U16" in a], name


def test_the_page_of_the_kernels_that_multiply_has_what_was_compiled():
    """A line for each kernel and architecture, none with local memory; the page's table is made of them."""
    lines = native_kernels.read(ROOT / "docs" / "native.csv")
    kinds = {(line.kernel, line.tile, line.format) for line in lines}
    assert {(*kind, arch) for kind in kinds for arch in native_kernels.ARCHS} == {
        (line.kernel, line.tile, line.format, line.arch) for line in lines
    }
    assert not any(line.local for line in lines)
    assert {line.format for line in lines} == {"TF32", "float16", "bfloat16", "any"}
    kernels = {"moments": 2, "pointwise_tail_backward_reduce": 3, "pointwise_tail_backward_apply": 2, "pointwise_fprop": 2}
    kernels |= {"pointwise_tail": 2, "pointwise_tail, projection": 3} | FINALIZE
    kernels |= {"moments_merge": 1, "pointwise_tail_backward_merge": 1}
    assert {name: len({tile for kernel, tile, _ in kinds if kernel == name}) for name, _, _ in kinds} == kernels
    assert native_kernels.rendered(lines) in (ROOT / "docs" / "native.md").read_text()


def test_what_the_kernels_do_at_a_layer_follows_from_their_tiles():
    """The first stage's 802,816 pixels: 784 parts of 1024 for moments, 64 rows a step; 392 of 2048 for the sums back through 256
    channels. The second one's channels take wider tiles."""
    layer, (first, second) = native_work.STAGES[0], native_work.STAGES
    assert native_work.work("moments", layer, 2, (64, 64))[1:] == (784, (16,))
    assert native_work.work("moments", layer, 2, (128, 128)) is None
    assert native_work.work("pointwise_tail_backward_reduce", layer, 2, (128, 64))[1:] == (392 * 2, (64,))
    assert native_work.work("pointwise_tail_backward_reduce", second, 2, (128, 64)) is None
    assert native_work.work("pointwise_tail_backward_reduce", second, 2, (128, 128))[1:] == (98 * 4, (64,))
    assert native_work.work("pointwise_tail_backward_apply", second, 4, (128, 128))[1:] == (1568, (32, 8))
    tail, convolution = (native_work.work(name, first, 2, (64, 128)) for name in ("pointwise_tail", "pointwise_fprop"))
    assert convolution == (802816 * 2 * (64 + 256), 12544 * 2, (2,))
    assert tail.bytes - convolution.bytes == 802816 * (2 * 256 + 256 / 8)
    assert native_work.work("moments_merge", layer, 2, (64, 64)) is None


def test_products_of_a_projection_in_stage_2_take_longer_than_its_bytes():
    """What docs/native.md says of tensor cores, at their published peaks, and of shared memory, at 128 bytes a cycle: per block
    fragments, copies, the prologue's way there and back, that of 48 KiB of sums, and that of the results.
    """
    layer, page = native_work.STAGES[1], (ROOT / "docs" / "native.md").read_text()
    flops = 2.0 * layer.pixels * layer.channels * (layer.depth + layer.depth2)
    times, cycles = {}, {}
    for size in (2, 4):
        work = native_work.work("pointwise_tail, projection", layer, size, (128, 128))
        assert f"{flops / work.bytes:.0f} times" in page
        for name in ("A100", "H100", "RTX 5090"):
            gpu = GPUS[name]
            times[name, size] = round(flops / (gpu.half if size == 2 else gpu.tf32) / (work.bytes / gpu.bandwidth), 2)
            cycles[name, size] = round(work.bytes / gpu.bandwidth / work.blocks * gpu.slots / 4)
        steps, panel = sum(work.steps), 128 * native_work.DEPTH
        moved = steps * 4 * 2 * 8 * 512 + steps * 2 * panel + work.steps[0] * 2 * panel + 2 * 48 * 1024 + 2 * 128 * 128 * size
        cycles["shared", size] = moved // 128
    assert times == {
        ("A100", 2): 1.38,
        ("A100", 4): 1.41,
        ("RTX 5090", 2): 1.81,
        ("RTX 5090", 4): 1.84,
        ("H100", 2): 0.72,
        ("H100", 4): 0.73,
    }
    assert all(str(value) in page for value in times.values())
    assert all(f"{cycles[key]:,}" in page for key in cycles if key[0] != "RTX 5090")
