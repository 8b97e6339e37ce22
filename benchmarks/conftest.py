"""`pytest benchmarks --benchmark-only`: the cases and peers of `fused-res bench` under pytest-benchmark.

For its statistics, comparison with `--benchmark-compare`, and histograms. `fused-res bench` interleaves the peers and compares
their results, which this does not: figures for documents come from there.
"""

import time

import pytest
import torch

from fused_res import environment
from fused_res.benchmarks.cases import BATCHES, SUITES
from fused_res.benchmarks.peers import MODES
from fused_res.benchmarks.results import device_name


def pytest_addoption(parser):
    group = parser.getgroup("fused_res")
    group.addoption("--suite", choices=SUITES, default="quick")
    group.addoption("--mode", choices=MODES, default="train")
    group.addoption("--dtype", choices=("fp32", "fp16", "bf16"), help="default: bf16 on a GPU, fp32 on the CPU")
    group.addoption("--batch", type=int, help="default: the least of `fused-res bench`")


@pytest.fixture(scope="session")
def device():
    return environment.default_device()


@pytest.fixture(scope="session")
def dtype(request, device):
    return environment.DTYPES[request.config.getoption("dtype") or ("bf16" if device.type == "cuda" else "fp32")]


@pytest.fixture(scope="session")
def batch(request, device):
    return request.config.getoption("batch") or BATCHES[device.type][0]


def synchronised():
    """Seconds, once the GPU has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=synchronised))


@pytest.fixture
def timed(benchmark, device):
    """`timed(step, **about)` runs a step under pytest-benchmark, which also notes machine, versions and what is told of it."""
    machine = {"machine": environment.machine(), "gpu": environment.gpu(device.index) if device.type == "cuda" else None}

    def run(step, **about):
        benchmark.extra_info.update(about, device=device_name(machine), versions=environment.versions())
        with environment.temporarily(torch.backends.cudnn, benchmark=True):
            benchmark.pedantic(step, rounds=10, warmup_rounds=3)

    return run
