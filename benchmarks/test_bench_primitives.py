"""What lies between the convolutions, one by one, on every backend that can run here: rows [P, C] of the suite's outputs."""

import pytest
import torch

from fused_res import backends
from fused_res.benchmarks.cases import SUITES
from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_act_backward import bn_act_backward_apply, bn_act_backward_finalize, bn_act_backward_reduce
from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.run import of


def pytest_generate_tests(metafunc):
    suite = metafunc.config.getoption("suite")
    shapes = {(case.output_size**2, case.outplanes) for case in SUITES[suite] if not case.is_network}
    metafunc.parametrize("shape", sorted(shapes), ids="{0[0]}x{0[1]}".format)
    metafunc.parametrize("backend", backends.NAMES)


@pytest.fixture
def steps(shape, backend, batch, dtype, device):
    """The primitives of a BN and a ReLU, ready to run: by name a callable and how many tensors [P, C] it reads and writes."""
    reason = backends.supports(backend, device, dtype)
    if reason is not None:
        pytest.skip(reason)
    pixels, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    run = of(backend)
    y, skip, dout = (torch.randn(batch * pixels, channels, generator=generator, device=device).to(dtype) for _ in range(3))
    gamma, beta = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    partials, rows = bn_stats(y, run=run)
    vectors = bn_finalize(partials, rows, y.shape[0], gamma, beta, 1e-5, None, run=run)
    _, signs = bn_act(y, vectors, skip=skip, keep_signs=True, run=run)
    found = bn_act_backward_reduce(dout, y, vectors, signs=signs, run=run)
    coefficients = bn_act_backward_finalize(found, 1, y.shape[0], vectors, gamma, beta, None, training=True, run=run)
    given = {"signs": signs, "run": run}
    return {
        "bn_stats": (lambda: bn_stats(y, run=run), 1),
        "bn_act": (lambda: bn_act(y, vectors, skip=skip, keep_signs=True, run=run), 3),
        "bn_act_backward_reduce": (lambda: bn_act_backward_reduce(dout, y, vectors, **given), 2),
        "bn_act_backward_apply": (
            lambda: bn_act_backward_apply(dout, y, vectors, coefficients, training=True, keep_masked=True, **given),
            4,
        ),
    }


@pytest.mark.parametrize("primitive", ["bn_stats", "bn_act", "bn_act_backward_reduce", "bn_act_backward_apply"])
def test_primitive(primitive, shape, backend, batch, dtype, steps, benchmark, timed):
    step, tensors = steps[primitive]
    benchmark.group = f"{primitive}, {batch} x {shape[0]} x {shape[1]}, {dtype}"
    moved = tensors * batch * shape[0] * shape[1] * dtype.itemsize
    timed(step, rows=batch * shape[0], channels=shape[1], dtype=str(dtype), backend=backend, bytes=moved)
