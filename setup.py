"""Maps the folders `kernels` and `benchmarks` into the package, and compiles csrc/ into the library of the `native` backend.

The library, fused_res/_native.so, has no Python API: one wheel fits every Python, and every torch from 2.10 on (stable ABI).
Beside it lies fused_res/_native.json: what it was built from and for, or why there is none.

FUSED_RES_NATIVE=0      leaves the library out
FUSED_RES_CUDA=0|1      leaves the CUDA kernels out, or fails without nvcc; else nvcc decides, never a GPU
TORCH_CUDA_ARCH_LIST    GPU architectures, as PyTorch's own builds read it
CXX, CUDA_HOME          the compilers; MAX_JOBS: how many run at once
FUSED_RES_BUILD         the folder of the object files, instead of build/native
FUSED_RES_LOCAL_VERSION such as cu130: what a wheel's version says about it, 0.1.0+cu130
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before 70.1, which `check_setuptools` refuses
    bdist_wheel = setuptools.Command

ROOT = Path(__file__).resolve().parent
SOURCES = Path("csrc")
LIBRARY = "_native.so"
RECORD = "_native.json"
STABLE_ABI = "0x020a000000000000"  # torch 2.10
SETUPTOOLS = 77  # the first that reads the license in pyproject.toml

COMMON = ["-std=c++17", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-Icsrc"]
CXX_FLAGS = [*COMMON, "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off"]
NVCC_FLAGS = [*COMMON, "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]

# Instruction sets that csrc/cpu/variant.cpp is compiled for. GCC's intrinsics look uninitialised to GCC itself.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
VARIANTS = {"plain": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
VARIANT_FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def find_torch() -> Path | None:
    """The torch to compile against: the importable one, or under build isolation that of the environment installed into."""
    roots = [*sys.path, *(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))]
    found = (Path(root) / "torch" for root in roots)
    return next((path for path in found if (path / "include/torch/csrc/stable/library.h").is_file()), None)


def torch_version(torch: Path) -> str:
    return next((d.version for d in metadata.distributions(name="torch", path=[str(torch.parent)])), "unknown")


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home) / "bin/nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    found += [Path(on_path)] if on_path else []
    return next((path for path in (*found, Path("/usr/local/cuda/bin/nvcc")) if path.is_file()), None)


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def compiler() -> str | None:
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else shutil.which("g++") or shutil.which("c++")


def why_pure() -> str | None:
    """Why this build leaves the library out, or None if it has what it needs."""
    if os.environ.get("FUSED_RES_NATIVE") == "0":
        return "it was left out of this installation by FUSED_RES_NATIVE=0"
    if platform.system() != "Linux":
        return f"it is compiled on Linux only, not on {platform.system()}"
    if compiler() is None:
        return "there was no C++ compiler when this package was installed"
    if find_torch() is None:
        return "there was no torch 2.10 or later to compile against when this package was installed (install torch first)"
    if find_ninja() is None:
        return "there was no ninja when this package was installed (pip install ninja)"
    return None


def cuda_compiler() -> Path | None:
    """nvcc if the CUDA kernels are to be built. FUSED_RES_CUDA decides where it is set."""
    asked, nvcc = os.environ.get("FUSED_RES_CUDA"), find_nvcc()
    if asked == "1" and nvcc is None:
        raise SystemExit("FUSED_RES_CUDA=1: found no nvcc (set CUDA_HOME)")
    return None if asked == "0" else nvcc


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", text).groups()))


def cuda_libraries(nvcc: Path) -> list[str]:
    """Flags for the static CUDA runtime, from where nvcc itself says it lives: `nvcc` may be a wrapper."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    home = Path(re.search(r"TOP=(.*)", subprocess.run(command, capture_output=True, text=True, check=True).stderr)[1])
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    found = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if found is None:
        raise SystemExit(f"found nvcc, but no libcudart_static.a under {home.resolve()}; FUSED_RES_CUDA=0 builds without CUDA")
    return [f"-L{found.resolve()}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def cuda_archs(version: tuple[int, int]) -> list[str]:
    """Such as 8.0, or 9.0+PTX: asked for, or all that this nvcc knows from Turing or, since CUDA 13, Ampere on."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    if asked.strip(";"):
        return [arch for arch in asked.split(";") if arch]
    if version >= (13, 0):
        return ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    if version >= (12, 8):
        return ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    return ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        if re.fullmatch(r"\d{2,3}[af]?", number) is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0 or 9.0+PTX, got {arch!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Plan:
    """What gets compiled, with what."""

    def __init__(self) -> None:
        self.torch, self.cxx, self.nvcc = find_torch(), compiler(), cuda_compiler()
        self.cuda_sources = sorted((SOURCES / "cuda").glob("*.cu")) if self.nvcc else []
        self.cuda_version = nvcc_version(self.nvcc) if self.nvcc else None
        self.archs = cuda_archs(self.cuda_version) if self.cuda_sources else []

    def record(self) -> dict:
        return {
            "torch": torch_version(self.torch),
            "compiler": subprocess.run([self.cxx, "--version"], capture_output=True, text=True).stdout.split("\n")[0],
            "machine": platform.machine(),
            "cuda": ".".join(map(str, self.cuda_version)) if self.cuda_sources else None,
            "cuda_archs": self.archs,
        }

    def ninja(self, library: Path, folder: Path) -> str:
        """The text of a ninja file that compiles into this folder, for a ninja that runs in ROOT."""

        def line(words: list) -> str:
            return " ".join(str(word).replace("$", "$$").replace(" ", "$ ") for word in words)

        include = ["-isystem", self.torch / "include"]
        text = [
            f"builddir = {line([folder])}",
            f"cxx = {line([self.cxx])}",
            f"cxxflags = {line([*CXX_FLAGS, *include])}",
            "rule cxx\n  command = $cxx -MD -MF $out.d $cxxflags $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $cxx -shared $in $flags -o $out",
        ]
        objects = []

        def compile_with(rule: str, source: Path, name: str, flags: list[str]) -> None:
            objects.append(folder / f"{name}.o")
            text.append(f"build {line(objects[-1:])}: {rule} {line([source])}\n  flags = {line(flags)}")

        for source in (*sorted(SOURCES.glob("*.cpp")), *sorted((SOURCES / "cpu").glob("*.cpp"))):
            if source.stem != "variant":
                compile_with("cxx", source, f"{source.parent.name}.{source.stem}", [])
        for name, flags in VARIANTS.items():
            if name == "plain" or platform.machine() in ("x86_64", "AMD64"):
                flags = [*flags, *VARIANT_FLAGS, f"-DFUSED_RES_VARIANT={name}"]
                compile_with("cxx", SOURCES / "cpu/variant.cpp", f"variant.{name}", flags)
        # Nothing in libtorch.so itself is used, but under a CUDA torch it brings the library that knows the current stream.
        needed = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        libraries = [f"-L{self.torch / 'lib'}", *needed, "-ltorch_cpu", "-lc10"]
        if self.cuda_sources:
            text += [
                f"nvcc = {line([self.nvcc, '-ccbin', self.cxx])}",
                f"nvccflags = {line([*NVCC_FLAGS, *include, *gencode(self.archs)])}",
                "rule nvcc\n  command = $nvcc -MD -MF $out.d $nvccflags $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            ]
            for source in self.cuda_sources:
                compile_with("nvcc", source, f"cuda.{source.stem}", [])
            libraries += cuda_libraries(self.nvcc)
        libraries += ["-Wl,--exclude-libs,ALL"]
        text.append(f"build {line([library])}: link {line(objects)}\n  flags = {line(libraries)}")
        return "\n".join(text) + "\n"


def write_record(package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    record = Plan().record() if PURE is None else {"missing": PURE}
    (package / RECORD).write_text(json.dumps(record, indent=2) + "\n")


class BuildLibrary(build_ext):
    """Compiles the library with ninja: in parallel, and only what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def run(self) -> None:
        super().run()
        if self.inplace:
            write_record(ROOT / "fused_res")

    def build_extension(self, ext: Extension) -> None:
        plan, folder = Plan(), (ROOT / os.environ.get("FUSED_RES_BUILD", "build/native")).resolve()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        for path in (folder, library.parent):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(plan.ninja(library, folder))
        jobs = os.environ.get("MAX_JOBS")
        kernels = f"CPU and CUDA ({', '.join(plan.archs)})" if plan.archs else "CPU (no nvcc, or FUSED_RES_CUDA=0)"
        print(f"fused_res: native library with kernels for {kernels}", flush=True)
        subprocess.run([find_ninja(), "-f", folder / "build.ninja", *(["-j", jobs] if jobs else [])], cwd=ROOT, check=True)


class BuildPackage(build_py):
    """Leaves a record of the library, or of why there is none."""

    def run(self) -> None:
        super().run()
        package = ROOT / "fused_res" if self.editable_mode else Path(self.build_lib) / "fused_res"
        if PURE is not None:
            print(f"fused_res: no native library: {PURE}", file=sys.stderr, flush=True)
            (package / LIBRARY).unlink(missing_ok=True)
        write_record(package)

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """All but the files of `pytest benchmarks`."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if not module[1].startswith(("test_", "conftest"))]


class Metadata(egg_info):
    """Names the local version, if there is one."""

    def finalize_options(self) -> None:
        label = os.environ.get("FUSED_RES_LOCAL_VERSION")
        self.tag_build = f"+{label}" if label else self.tag_build
        super().finalize_options()


class Wheel(bdist_wheel):
    """The library depends on the platform, but not on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, machine = super().get_tag()
        return (python, abi, machine) if self.root_is_pure else ("py3", "none", machine)


def check_setuptools() -> None:
    """pip sees to it, but under --no-build-isolation; an older one would fail without saying why."""
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
        raise SystemExit(
            f"fused_res: building it needs setuptools {SETUPTOOLS} or later, here is {setuptools.__version__}: "
            f"pip install 'setuptools>={SETUPTOOLS}' ninja, or leave out --no-build-isolation"
        )


PURE = why_pure()

if __name__ == "__main__":
    check_setuptools()
    setup(
        packages=[
            "fused_res",
            "fused_res.backends",
            "fused_res.block",
            "fused_res.cost",
            "fused_res.primitives",
            "fused_res.shipped",
            "fused_res.tuning",
            "fused_res.kernels",
            "fused_res.benchmarks",
        ],
        package_dir={"fused_res.kernels": "kernels", "fused_res.benchmarks": "benchmarks"},
        ext_modules=[] if PURE is not None else [Extension("fused_res._native", [])],
        cmdclass={"build_ext": BuildLibrary, "build_py": BuildPackage, "egg_info": Metadata, "bdist_wheel": Wheel},
    )
