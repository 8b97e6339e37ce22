"""Fixtures that several test files share."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from fused_res import backends

# Triton kernels run compiled where there is a GPU, and otherwise in Triton's CPU interpreter, hardened, for the whole process:
# Triton decides once, when a kernel is defined.
INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def _interpreter():
    spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter = _interpreter()
    interpreter.install()


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


@pytest.fixture
def device():
    """Where the kernels run compiled, or else interpreted."""
    return "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


@pytest.fixture
def poisoned_memory():
    """Fresh memory is full of NaN, or of the largest integer, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).eq(255).all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def few_programs(monkeypatch):
    """Reductions run few programs, so that each has several blocks of rows already at small sizes."""
    common = pytest.importorskip("fused_res.kernels.common")
    monkeypatch.setattr(common, "PROGRAMS", 4)
