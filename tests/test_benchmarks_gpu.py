"""The benchmark on a GPU: its clock, its further times, its ceiling, and the peers that only run there."""

import pytest
import torch

from fused_res.benchmarks import ceiling, clocks, peers, profiling, runner
from fused_res.benchmarks.cases import SUITES, Case
from fused_res.benchmarks.peers import Setup

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CASE = next(case for case in SUITES["full"] if case.name == "resnet50.1.identity")


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_clock_measures_what_the_gpu_does(device):
    clock = clocks.CudaClock(device)
    cycles = int(5 * clock.cycles_per_ms)
    ways = {"ms": clock.time, **clock.others()}
    assert set(ways) == {"ms", "warm_ms", "wall_ms"}
    for timed in ways.values():
        assert timed(lambda: torch.cuda._sleep(cycles)).ms == pytest.approx(5.0, rel=0.25)


def test_a_captured_step_replays(device):
    x = torch.ones(1024, device=device)
    replay = clocks.captured(lambda: x.mul(2))
    x.fill_(3.0)
    assert replay().eq(6.0).all()


def test_state_and_ceiling(device):
    clock = clocks.CudaClock(device)
    one = ceiling.measure(device, torch.bfloat16, clock)
    assert one["bytes_per_s"] > 1e11
    assert one["flops_per_s"] > 1e13
    assert set(clocks.state(device)) in (set(), set(clocks._GPU_STATE))


@pytest.mark.parametrize("mode", peers.MODES)
def test_every_usual_peer_runs_or_is_not_installed(device, mode):
    rows = runner.run_case(Setup(CASE, 4, torch.bfloat16, device, mode), rounds=5)
    for row in rows:
        assert row["reason"] is None or "not installed" in row["reason"], row
    ours = next(row for row in rows if row["peer"] == "fused_res")
    assert all(ours[column]["median"] > 0 for column in ("ms", "warm_ms", "wall_ms", "graph_ms", "host_ms"))
    assert ours["peak_bytes"] > 0
    autotuned = next(row for row in rows if row["peer"] == "torch.compile max-autotune")
    assert "graph_reason" in autotuned


def test_profile_names_kernels(device):
    case = Case("small", "bottleneck", 256, 64, 14)
    found = profiling.kernels(Setup(case, 4, torch.float32, device), "eager channels_last", steps=2)
    assert found
    assert not any(kernel.name.startswith("aten::") for kernel in found)
