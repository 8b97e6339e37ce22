"""The compiled library as a file: how it is built, what it needs, and what is said where it is missing or broken."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fused_res import backends
from fused_res.backends import native

ROOT = Path(__file__).parents[1]
WHY = backends.supports("native", torch.device("cpu"), torch.float32)
built = pytest.mark.skipif(WHY is not None, reason=str(WHY))
checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a checkout")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def module_at(path):
    spec = importlib.util.spec_from_file_location(f"fused_res_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@built
@pytest.mark.parametrize("first", ["library", "package"])
def test_library_and_block_operators_load_in_either_order(first, fresh):
    load = f"torch.ops.load_library({str(native.FILE)!r})"
    order = [load, "import fused_res"] if first == "library" else ["import fused_res", load]
    code = "\n".join(
        [
            "import torch",
            *order,
            "torch.ops.fused_res.bn_stats(torch.rand(3, 4)), torch.ops.fused_res.block_forward",
            "with fused_res.use_backend('native'): fused_res.BasicBlock(4, 4)(torch.rand(2, 4, 5, 5)).sum().backward()",
        ]
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


@built
def test_importing_the_package_loads_no_library(fresh):
    code = "import fused_res, torch; print(hasattr(torch.ops.fused_res, 'bn_stats'))"
    assert fresh.run(code).stdout.strip() == "False"


def test_switched_off_it_says_so(fresh):
    code = """
import torch, fused_res
block, x = fused_res.BasicBlock(4, 4), torch.rand(2, 4, 5, 5)
print(fused_res.explain(block, x).rows[0].backend)
with fused_res.use_backend("native"):
    block(x)
"""
    done = fresh.run(code, FUSED_RES_NATIVE="0")
    assert done.stdout.strip() == "reference"
    assert "backend 'native' cannot run this block: switched off by FUSED_RES_NATIVE=0" in done.stderr


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "broken"])
def test_a_missing_library_gives_its_reason_and_a_broken_one_the_versions(tmp_path, content, fresh):
    (tmp_path / "_native.json").write_text(json.dumps({"missing": "no compiler"} if content is None else {"torch": "2.99"}))
    if content is not None:
        (tmp_path / "_native.so").write_bytes(content)
    code = f"""
import torch, fused_res
from pathlib import Path
from fused_res.backends import native
native.FILE, native.RECORD = Path({str(tmp_path)!r}, "_native.so"), Path({str(tmp_path)!r}, "_native.json")
with fused_res.use_backend("native"):
    fused_res.BasicBlock(4, 4)(torch.rand(2, 4, 5, 5))
"""
    error = fresh.run(code, FUSED_RES_NATIVE="1").stderr
    if content is None:
        assert "the compiled library is missing: no compiler" in error
    else:
        for words in ("cannot load", "built with torch 2.99", f"here is torch {torch.__version__}", "FUSED_RES_NATIVE=0"):
            assert words in error, error


def test_blocks_that_run_on_the_formulas_for_want_of_a_library_say_so_once(tmp_path, fresh):
    code = f"""
import torch, fused_res, warnings
from pathlib import Path
from fused_res.backends import native
native.FILE, native.RECORD = Path({str(tmp_path)!r}, "_native.so"), Path({str(tmp_path)!r}, "_native.json")
warnings.simplefilter("always")
for _ in range(2):
    fused_res.BasicBlock(4, 4)(torch.rand(2, 4, 5, 5))
    fused_res.BasicBlock(4, 4)(torch.rand(2, 4, 6, 6, dtype=torch.float64).float())
"""
    (tmp_path / "_native.json").write_text(json.dumps({"missing": "no compiler"}))
    done = fresh.run(code, FUSED_RES_NATIVE="1")
    expected = "blocks on cpu run on the plain formulas (backend 'reference'), more slowly. native: the compiled library is missing"
    assert done.stderr.count(f"{expected}: no compiler") == 1, done.stderr
    assert "plain formulas" not in fresh.run(code, FUSED_RES_NATIVE="0").stderr  # asked for


@checkout
def test_python_started_in_a_source_folder_finds_the_kernels_and_says_what_is_not_built(tmp_path):
    (tmp_path / "fused_res").mkdir()
    for path in (ROOT / "fused_res").iterdir():
        if path.name not in ("_native.so", "_native.json", "__pycache__"):
            (tmp_path / "fused_res" / path.name).symlink_to(path)
    for name in ("kernels", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = """
import torch, fused_res, fused_res.kernels, fused_res.benchmarks.cases
print(fused_res.__file__, fused_res.kernels.__file__, sep="\\n")
with fused_res.use_backend("native"):
    fused_res.BasicBlock(4, 4)(torch.rand(2, 4, 5, 5))
"""
    command, environment = [sys.executable, "-c", code], {**os.environ, "FUSED_RES_NATIVE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [f"{tmp_path}/fused_res/__init__.py", f"{tmp_path}/kernels/__init__.py"], done.stderr
    assert f"it was never built in this source folder, {tmp_path}/fused_res; `pip install --editable .` builds it" in done.stderr


@built
def test_an_unknown_instruction_set_is_an_error(fresh):
    code = "import torch; from fused_res.backends import native; native.load(); torch.ops.fused_res.bn_stats(torch.rand(3, 4))"
    assert (
        "FUSED_RES_CPU_CAPABILITY: this CPU or this library has no nonsense"
        in fresh.run(code, FUSED_RES_CPU_CAPABILITY="nonsense").stderr
    )
    assert fresh.run(code, FUSED_RES_CPU_CAPABILITY="plain").returncode == 0


@pytest.fixture
def complaints():
    """What the check of the wheels says of a library."""
    pytest.importorskip("torch_abi_audit")
    return module_at(ROOT / ".ci/check_abi.py").complaints


@built
@checkout
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_only_the_stable_interface_of_torch_is_used(complaints):
    assert complaints(native.FILE) == []


@built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_library_brings_all_of_torch_with_it():
    """libtorch.so is where torch's CUDA libraries hang: without it, the current stream would be found under no torch."""
    dynamic = subprocess.run(["readelf", "--dynamic", native.FILE], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\(NEEDED\).*\[libtorch\.so\]", dynamic), dynamic


@built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
@pytest.mark.skipif(not native.record().get("cuda"), reason="the library has no CUDA kernels")
def test_the_current_stream_is_found_where_torch_has_cuda(fresh):
    """What the dynamic linker put into the slot of the weak symbol: no GPU is needed for that."""
    code = """
import ctypes, re, subprocess
from pathlib import Path
from fused_res.backends import native
native.load()
library = Path(native.FILE).resolve()
base = next(int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(library)))
relocations = subprocess.run(["readelf", "--relocs", "--wide", library], capture_output=True, text=True, check=True).stdout
(offset,) = re.findall(r"^([0-9a-f]+) .*\\baoti_torch_get_current_cuda_stream\\b", relocations, re.MULTILINE)
print(ctypes.c_void_p.from_address(base + int(offset, 16)).value)
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    print(f"torch {torch.__version__}: {done.stdout}")
    assert (done.stdout.strip() != "None") == (torch.version.cuda is not None)


@checkout
@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("", None),
        ("namespace c10 { int planted(); } int use() { return c10::planted(); }", "uses c10::planted(), which is not in"),
        ("namespace at { struct Tensor { void grad(); }; } void use(at::Tensor& t) { t.grad(); }", "uses at::Tensor::grad()"),
        ('extern "C" int torch_tag_core(); int use() { return torch_tag_core(); }', "needs torch 2.12.0 for torch_tag_core"),
        ('extern "C" int torch_planted(); int use() { return torch_planted(); }', "uses torch_planted, which no torch"),
        ('extern "C" int PyErr_Occurred(); int use() { return PyErr_Occurred(); }', "uses PyErr_Occurred of Python"),
        ("linked", "needs libcudart.so.13"),
        ("unlinked", "does not need libtorch.so"),
    ],
)
def test_the_check_of_the_wheels_finds_what_is_planted(tmp_path, complaints, planted, complaint):
    def build(code, name, *flags):
        (tmp_path / "code.cpp").write_text(code)
        subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "code.cpp", "-o", tmp_path / name, *flags], check=True)

    linked = {"linked": ["libtorch.so", "libcudart.so.13"], "unlinked": []}.get(planted, ["libtorch.so"])
    for name in linked:
        build("", name, f"-Wl,-soname,{name}")
    flags = ["-Wl,--no-as-needed", *(tmp_path / name for name in linked)]
    planted = "" if planted in ("linked", "unlinked") else planted
    build(f'extern "C" int aoti_torch_abi_version(); int base() {{ return aoti_torch_abi_version(); }} {planted}', "lib.so", *flags)
    found = complaints(tmp_path / "lib.so")
    assert len(found) == (complaint is not None)
    assert all(complaint in line for line in found), found


@checkout
@pytest.mark.parametrize("version", ["76.1.0", "65.5.0"])
def test_an_older_setuptools_is_told_what_is_needed(version):
    code = f"""
import runpy, sys, setuptools
setuptools.__version__ = {version!r}
sys.modules["setuptools.command.bdist_wheel"] = None
sys.argv = ["setup.py", "egg_info"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fused_res: building it needs setuptools 77 or later, here is {version}: pip install")


@checkout
@pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="builds with setuptools 77 or later")
def test_a_local_version_is_part_of_the_version(tmp_path):
    for label, expected in ((None, r"[\d.]+"), ("cu130", r"[\d.]+\+cu130")):
        environment = {k: v for k, v in os.environ.items() if k != "FUSED_RES_LOCAL_VERSION"}
        environment |= {} if label is None else {"FUSED_RES_LOCAL_VERSION": label}
        command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        metadata = (tmp_path / "fused_res.egg-info/PKG-INFO").read_text()
        assert re.search(rf"^Version: {expected}$", metadata, re.MULTILINE), metadata[:200]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["8.0", "9.0"], (8, 6), True),
        (["8.0", "9.0"], (7, 5), False),
        (["8.6"], (8, 0), False),
        (["9.0"], (10, 0), False),
        (["9.0+PTX"], (12, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
    ],
)
def test_gpus_that_the_library_runs_on(archs, capability, runs):
    assert native._runs_on(archs, capability) is runs


@checkout
def test_architectures_follow_nvcc_and_the_environment(monkeypatch):
    setup = module_at(ROOT / "setup.py")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup.cuda_archs((12, 6)) == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]
    assert setup.cuda_archs((13, 0)) == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    assert setup.gencode(setup.cuda_archs((13, 0))) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(SystemExit, match="expected numbers such as"):
        setup.gencode(["Hopper"])


@checkout
def test_cuda_is_decided_by_nvcc_alone(monkeypatch):
    setup = module_at(ROOT / "setup.py")
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    monkeypatch.delenv("FUSED_RES_CUDA", raising=False)
    assert setup.cuda_compiler() is None
    monkeypatch.setenv("FUSED_RES_CUDA", "1")
    with pytest.raises(SystemExit, match="found no nvcc"):
        setup.cuda_compiler()
    monkeypatch.setattr(setup, "find_nvcc", lambda: Path("/some/nvcc"))
    assert setup.cuda_compiler() == Path("/some/nvcc")
    monkeypatch.setenv("FUSED_RES_CUDA", "0")
    assert setup.cuda_compiler() is None


@checkout
@pytest.mark.slow
def test_without_a_compiler_the_package_is_pure_python_and_says_why(tmp_path):
    command = [sys.executable, "setup.py", "build", "--build-base", tmp_path / "base", "--build-lib", tmp_path / "lib"]
    environment = os.environ | {"CXX": "/nonexistent"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no native library: there was no C++ compiler" in done.stderr
    assert "no C++ compiler" in json.loads((tmp_path / "lib/fused_res/_native.json").read_text())["missing"]
    assert not (tmp_path / "lib/fused_res/_native.so").exists()


@checkout
@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("avx2", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("plain", "avx512", "avx512bf16")),
    ],
)
def test_kernels_under_sanitizers(tmp_path, name):
    setup = module_at(ROOT / "setup.py")
    if name != "plain":
        library = ctypes.CDLL(str(native.FILE)) if WHY is None else pytest.skip(str(WHY))
        if not library.fused_res_set_cpu_capability(name.encode()):
            pytest.skip(f"this CPU has no {name}")
        wider = name == "avx512" and library.fused_res_set_cpu_capability(b"avx512bf16")
        library.fused_res_set_cpu_capability(None)
        if wider:
            pytest.skip("avx512bf16, which this CPU has, is compiled from the same lines and one more")
    flags = [flag for flag in setup.CXX_FLAGS if not flag.startswith("-O")] + setup.VARIANTS[name] + setup.VARIANT_FLAGS
    sanitize = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-DFUSED_RES_VARIANT={name}"]
    sources = ["csrc/cpu/variant.cpp", Path(__file__).with_name("cpu_kernels.cpp")]
    compiled = subprocess.run(
        ["g++", *flags, *sanitize, *sources, "-o", tmp_path / "kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "cannot find" in compiled.stderr:
        pytest.skip("the sanitizers' libraries are not installed")
    assert compiled.returncode == 0, compiled.stderr
    sizes = [] if name == "avx2" else ["all"]  # one set of the same lines is enough for that
    done = subprocess.run([tmp_path / "kernels", *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == name


@checkout
@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="one instruction set only")
def test_no_instruction_set_leaks_into_shared_functions(tmp_path):
    """A weak function outside the variant's own namespace could replace, for every CPU, one compiled for any."""
    setup = module_at(ROOT / "setup.py")
    for name in ("avx2", "avx512bf16"):  # all lines of a set between them are in these
        command = ["g++", *setup.CXX_FLAGS, "-O0", *setup.VARIANTS[name], *setup.VARIANT_FLAGS, f"-DFUSED_RES_VARIANT={name}"]
        subprocess.run([*command, "-c", "csrc/cpu/variant.cpp", "-o", tmp_path / "object.o"], cwd=ROOT, check=True)
        symbols = subprocess.run(["nm", "-C", tmp_path / "object.o"], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if " W " in line]
        foreign = [line for line in shared if f"fused_res::cpu::{name}::" not in line]
        assert not foreign, foreign


def test_float64_is_refused_on_a_gpu_with_the_reason():
    assert native.supports(torch.device("cuda"), torch.float64) == "takes float64 on the CPU only"
