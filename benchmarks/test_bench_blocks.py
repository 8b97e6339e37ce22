"""Blocks and networks of a suite (`--suite networks`), each by every peer that can run here."""

import pytest

from fused_res.benchmarks import peers, runner
from fused_res.benchmarks.cases import SUITES
from fused_res.environment import default_device


def pytest_generate_tests(metafunc):
    config = metafunc.config
    names = peers.usual(default_device(), config.getoption("mode"))
    metafunc.parametrize("peer", names)
    metafunc.parametrize("case", SUITES[config.getoption("suite")], ids=lambda case: case.name)


def test_step(case, peer, batch, dtype, device, request, benchmark, timed):
    setup = peers.Setup(case, batch, dtype, device, request.config.getoption("mode"))
    made = peers.make(peer, setup)
    if isinstance(made, peers.Refusal):
        pytest.skip(made.reason)
    benchmark.group = f"{case.name}, batch {batch}, {dtype}, {setup.mode}"
    shapes = {"x": list(setup.inputs(made.layout)[0][0].shape), "dtype": str(dtype), "mode": setup.mode}
    timed(lambda: made.step(0), **shapes, **case.describe(), backend=made.backend, **runner.work(setup, peer, made.backend))
