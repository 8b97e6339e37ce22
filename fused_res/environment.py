"""What this machine and this installation are, without anything that names its owner: no host, user or path."""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from fused_res import backends
from fused_res.version import __version__

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_GPU_QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def dtype_name(dtype: torch.dtype) -> str:
    """fp32 for torch.float32, and so on."""
    return _NAMES[dtype]


@contextmanager
def temporarily(holder: object, **values: object) -> Iterator[None]:
    """Set attributes of an object, a module of torch's switches say, and restore them."""
    before = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One thread on the CPU, for tensors so small that more would only wait for each other."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """Standard output of a command, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu(index: int) -> dict:
    """Name, capability and memory [bytes] of a GPU; driver, clocks [MHz] and power limit [W] where nvidia-smi tells them."""
    properties = torch.cuda.get_device_properties(index)
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }
    identity = f"--id=GPU-{properties.uuid}"  # nvidia-smi does not obey CUDA_VISIBLE_DEVICES: an index may mean another GPU
    text = _output("nvidia-smi", identity, f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader")
    values = (text or "").split(", ")
    if len(values) == len(_GPU_QUERY):
        found |= dict(zip(_GPU_QUERY, values, strict=True))
    return found


def machine() -> dict:
    """CPU and GPUs."""
    found = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [gpu(index) for index in range(torch.cuda.device_count())]
    return found


def versions() -> dict:
    found = {"fused_res": __version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = None
    found["cuda"] = torch.version.cuda
    found["cudnn"] = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return found


def checkout() -> Path | None:
    """Root of the source checkout this package is imported from, or None for an installed copy."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "benchmarks" / "cases.py").is_file() and (root / "pyproject.toml").is_file() else None


CARRIED = Path("build") / "carry" / "commit.json"
"""In a checkout that was copied without its last commits: the commit it is of, and the fingerprint of the sources that it has."""


def git() -> dict | None:
    """Commit of the checkout and whether its sources differ from it, or None outside a git checkout."""
    root = checkout()
    top = _output("git", "rev-parse", "--show-toplevel", cwd=root) if root else None
    if top is None or Path(top).resolve() != root:
        return _carried(root)
    changes = _output("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", cwd=root)
    found = {"commit": _output("git", "rev-parse", "--verify", "HEAD", cwd=root), "dirty": changes != ""}
    return (_carried(root) or found) if found["dirty"] else found


def _carried(root: Path | None) -> dict | None:
    """The commit that a copy of a checkout was made of, where its sources are that commit's."""
    if root is None or not (root / CARRIED).is_file():
        return None
    found = json.loads((root / CARRIED).read_text())
    return {"commit": found["commit"], "dirty": False} if found["source"] == fingerprint() else None


def fingerprint() -> str:
    """Hash of this package's Python sources: what a result belongs to where there is no commit to name."""
    digest, roots = hashlib.sha256(), [Path(__file__)]
    for name in ("fused_res.kernels", "fused_res.benchmarks"):
        spec = importlib.util.find_spec(name)
        roots += [Path(spec.origin)] if spec and spec.origin else []
    files = {path for root in roots for path in root.resolve().parent.rglob("*.py")}
    for path in sorted(files, key=lambda path: (path.parent.name, path.name)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def devices() -> list[torch.device]:
    """The CPU, then every visible GPU."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def support() -> list[dict]:
    """One row per device, backend and dtype: `reason` says why it cannot run, and is None where it can."""
    return [
        {"device": str(device), "backend": name, "dtype": dtype, "reason": backends.supports(name, device, DTYPES[dtype])}
        for device in devices()
        for name in backends.NAMES
        for dtype in DTYPES
    ]
