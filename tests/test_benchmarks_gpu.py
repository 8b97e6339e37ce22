"""The benchmark on a GPU: its clock, its further times, its ceiling, and the peers that only run there."""

import pytest
import torch
from compare import every, same

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
    every(replay().eq(6.0))


def test_state_and_ceiling(device):
    clock = clocks.CudaClock(device)
    one = ceiling.measure(device, torch.bfloat16, clock)
    assert one["bytes_per_s"] > 1e11
    assert one["flops_per_s"] > 1e13
    assert set(clocks.state(device)) in (set(), set(clocks._GPU_STATE))


def test_random_numbers_go_on_after_a_capture_that_failed(device):
    x = torch.ones(4, device=device)

    def waits():
        torch.randn(4, device=device)
        return x.sum().item()  # no graph can hold what waits for the device

    before = torch.cuda.get_rng_state(device)
    with pytest.raises(RuntimeError):
        clocks.captured(waits)
    torch.cuda.set_rng_state(before, device)
    first = torch.randn(4, device=device)
    torch.cuda.set_rng_state(before, device)
    same(torch.randn(4, device=device), first)


AUTOTUNED = "torch.compile max-autotune"


@pytest.mark.parametrize("autotuned", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", AUTOTUNED])
@pytest.mark.parametrize("mode", peers.MODES)
def test_every_usual_peer_runs_or_is_not_installed(device, mode, autotuned):
    """The one that compiles for half a minute, by itself beside its oracle."""
    setup = Setup(CASE, 4, torch.bfloat16, device, mode)
    usual = peers.usual(device, mode)
    names = ("eager channels_last", AUTOTUNED) if autotuned else tuple(name for name in usual if name != AUTOTUNED)
    assert AUTOTUNED in usual
    rows = runner.run_case(setup, names, rounds=5)
    for row in rows:
        assert row["reason"] is None or "not installed" in row["reason"], (row["peer"], row["reason"])
    if autotuned:
        assert "graph_reason" in rows[1]
        return
    ours = next(row for row in rows if row["peer"] == "fused_res")
    assert all(ours[column]["median"] > 0 for column in ("ms", "warm_ms", "wall_ms", "graph_ms", "host_ms"))
    assert ours["peak_bytes"] > 0


def test_profile_names_kernels(device):
    case = Case("small", "bottleneck", 256, 64, 14)
    found = profiling.kernels(Setup(case, 4, torch.float32, device), "eager channels_last", steps=2)
    assert found
    assert not any(kernel.name.startswith("aten::") for kernel in found)
