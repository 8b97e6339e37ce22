"""The benchmark on a GPU: its clock, its further times, its ceiling, and the peers that only run there."""

import pytest
import torch
from compare import every, same

from fused_res.benchmarks import agreement, ceiling, clocks, memory, peers, profiling, runner
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
    x, out = torch.ones(1024, device=device), torch.zeros(1024, device=device)
    replay = clocks.captured(lambda: torch.mul(x, 2, out=out))
    x.fill_(3.0)
    replay()
    every(out.eq(6.0))


@pytest.mark.parametrize("name", ["eager channels_last", "eager NCHW", peers.BARE, peers.OURS])
def test_a_training_step_is_captured_after_all_that_comes_before(device, name):
    """Every peer shares x with eager, whose steps and measurements on the default stream come first."""
    setup = Setup(CASE, 4, torch.bfloat16, device)
    for first in ("eager channels_last", name):
        peer = peers.make(first, setup)
        memory.measure(peer, setup)
        agreement.quantities(peer, 0, agreement.buffers(peer))
    before = peer.step(0)
    clocks.captured(lambda: peer.step(0))()
    after = peer.step(0)
    for key, value in before.items():
        every(torch.isfinite(value))
        assert value.shape == after[key].shape


def test_a_capture_that_fails_names_the_call_and_leaves_the_stream(device):
    x, before = torch.ones(4, device=device), torch.cuda.current_stream()

    def waits():
        return x.sum().item()

    with pytest.raises(clocks.CaptureFailedError, match=r"^capture, in .*waits: "):
        clocks.captured(waits)
    assert torch.cuda.current_stream() == before
    test_a_captured_step_replays(device)


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
    assert not [(row["peer"], row["graph_reason"]) for row in rows if "eager" in row["peer"] and "graph_reason" in row]
    assert all(ours[column]["median"] > 0 for column in ("ms", "warm_ms", "wall_ms", "graph_ms", "host_ms"))
    assert ours["peak_bytes"] > 0


def test_profile_names_kernels(device):
    case = Case("small", "bottleneck", 256, 64, 14)
    found = profiling.kernels(Setup(case, 4, torch.float32, device), "eager channels_last", steps=2)
    assert found
    assert not any(kernel.name.startswith("aten::") for kernel in found)
