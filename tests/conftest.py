"""Fixtures that several test files share."""

import ctypes
import gc
import importlib
import importlib.util
import os
import shutil
import sys
import threading

import pytest
import torch
from broken_context import pytest_runtest_teardown  # noqa: F401, a hook
from compare import every
from fresh import Fresh

import torchvision_operators
from fused_res import backends, use_backend
from fused_res.backends import native
from fused_res.block import lowered

# cuBLAS reads it when it starts; without it PyTorch takes no product of matrices for deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if torch.cuda.is_available():  # what runs on the CPU beside are oracles, one to each process
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

# Triton kernels run compiled where there is a GPU, and otherwise in Triton's CPU interpreter, hardened, for the whole process:
# Triton decides once, when a kernel is defined.
INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in item.fixturenames and item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.kernel)


def pytest_collection_finish():
    """What is there for all tests is not searched for garbage by every collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """For a file whose tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _float32_is_not_tf32():
    """torch's convolutions round float32 to TF32 on a GPU unless told not to. Tests of TF32 ask for it."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def proven_interpreter():
    """The interpreter's patches, where it is in use, are known to take effect."""
    if INTERPRETED:
        interpreter.prove()


@pytest.fixture(params=["reference", "triton", "native"])
def backend(request):
    """Each backend that can run a primitive here, in fresh memory that is full of NaN."""
    if request.param == "native":
        reason = backends.supports("native", torch.device(request.getfixturevalue("device")), torch.float32)
        if reason is not None:
            pytest.skip(reason)
    if request.param == "triton":
        pytest.importorskip("triton")
        request.getfixturevalue("proven_interpreter")
    request.getfixturevalue("poisoned_memory")
    return request.param


@pytest.fixture(params=["reference", "native"])
def cpu_backend(request):
    """Each backend that runs on CPU tensors as it would for a user."""
    reason = backends.supports(request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def cpu_backends():
    """All of them, for a test that holds each to the same costly truth."""
    return [name for name in ("reference", "native") if backends.supports(name, torch.device("cpu"), torch.float32) is None]


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512bf16"])
def capability(request):
    """Every instruction set that this CPU has, forced in turn."""
    library = ctypes.CDLL(str(native.FILE))
    library.fused_res_set_cpu_capability.restype = ctypes.c_bool
    if not library.fused_res_set_cpu_capability(request.param.encode()):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    library.fused_res_set_cpu_capability(None)


@pytest.fixture(autouse=True)
def _every_kernel_of_triton_is_used(monkeypatch):
    """Also where the library's convolution is taken to be faster: what is tested are the kernels."""
    monkeypatch.setattr("fused_res.backends.triton.pays", lambda primitive, unit, pixels: True)


@pytest.fixture(autouse=True)
def _nothing_is_recorded_yet(monkeypatch):
    """What a test replaces in the schedules' ways is not passed by by programs of the tests before."""
    monkeypatch.setattr("fused_res.plans._derived", {})


@pytest.fixture
def device():
    """Where the kernels run compiled, or else interpreted."""
    return "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


@pytest.fixture
def poisoned_memory(device):
    """Fresh memory is full of NaN, or of the largest integer, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # operators that have no such algorithm are not the matter here
    every(torch.empty(3, device=device).isnan())
    every(torch.empty(3, dtype=torch.uint8, device=device).eq(255))
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def few_programs(monkeypatch):
    """Reductions run few programs, so that each has several blocks of rows already at small sizes."""
    tiling = pytest.importorskip("fused_res.kernels.tiling")
    monkeypatch.setattr(tiling, "PROGRAMS", 4)


def _import(package, module):
    for name in {"torchvision", package}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if "torchvision" not in sys.modules:
        torchvision_operators.load()
    return importlib.import_module(module)


@pytest.fixture(scope="session")
def torchvision_resnet():
    return _import("torchvision", "torchvision.models.resnet")


@pytest.fixture(scope="session")
def libraries():
    """Imports a module of a library of models, or skips the test: `libraries("timm", "timm.models.resnet")`."""
    return _import


@pytest.fixture(scope="session")
def timm_resnet():
    return _import("timm", "timm.models.resnet")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """Runs code in a process that has imported torch and nothing of ours: `fresh.run(code, NAME="value")`."""
    processes = Fresh(tmp_path_factory.mktemp("fresh"))
    yield processes
    processes.close()


@pytest.fixture
def outcomes_alone(tmp_path):
    """`fused_res.benchmarks.outcomes` in a package that has nothing else: pytest started in this folder loads no torch for it."""
    package = tmp_path / "fused_res" / "benchmarks"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    for name in ("outcomes", "lines"):
        shutil.copy(importlib.util.find_spec(f"fused_res.benchmarks.{name}").origin, package)
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr("fused_res.notices._said", set())


@pytest.fixture(scope="session")
def _imported_dynamo():
    dynamo = importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()
    return dynamo


@pytest.fixture
def dynamo(_imported_dynamo):
    dynamo = _imported_dynamo
    dynamo.reset()
    # Where it is "info", a stack is taken for every cell that a traced function stores, which takes a third of the time.
    policy = {"side_effect_replay_policy": "silent"} if hasattr(dynamo.config, "side_effect_replay_policy") else {}
    with dynamo.config.patch(policy):
        yield dynamo
    dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the reference backend's convolutions."""
    count = dict.fromkeys(("conv_fprop", "conv_dgrad", "conv_wgrad"), 0)
    for name in count:
        module = importlib.import_module(f"fused_res.primitives.{name}")

        def counting(*args, name=name, plain=module.plain):
            count[name] += 1
            return plain(*args)

        monkeypatch.setattr(module, "plain", counting)
    with use_backend("reference", level="bn_act"):
        yield count


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by every call of a network that is one call of the compiled library."""
    found, plain = [], lowered.run_programs

    def run(*arguments):
        found.append(threading.get_ident())
        return plain(*arguments)

    monkeypatch.setattr(lowered, "run_programs", run)
    return found
