"""Interleaved measurement: in every round each peer runs once, in a new order, all on the same input set.

What is compared are ratios of times within a round, so that a clock that drifts or a busy neighbour meets all peers alike.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fused_res.benchmarks import calls, clocks, cudnn_graphs, foreign, memory, traffic  # noqa: F401 - two of them register peers
from fused_res.benchmarks import peers as peers_module
from fused_res.benchmarks.agreement import compare
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.clocks import Clock, Timing, clock_for
from fused_res.benchmarks.peers import BARE, Peer, Refusal, Setup
from fused_res.benchmarks.sums import summary
from fused_res.environment import dtype_name, temporarily

ROUNDS, MIN_ROUNDS, WARM_UP = 30, 5, 3


def interleave(
    steps: dict[str, Callable[[int], object]],
    timed: Callable[[Callable[[], object]], Timing],
    rounds: int = ROUNDS,
    sets: int = 1,
    deadline: float | None = None,
    seed: int = 0,
    now: Callable[[], float] = time.monotonic,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
) -> dict[str, list[Timing]]:
    """Timings of every step, one per round. Stops early, after at least MIN_ROUNDS rounds, once `now()` passes the deadline [s].

    Raises:
        peers.StepFailedError, peers.DeviceLostError: a step has failed on the device.
    """
    order, shuffle = list(steps), random.Random(seed).shuffle
    timings: dict[str, list[Timing]] = {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= MIN_ROUNDS and deadline is not None and now() > deadline:
                break
            shuffle(order)
            for name in order:
                with peers_module.blamed(name, device):
                    timings[name].append(timed(lambda name=name, i=done % sets: steps[name](i)))
    finally:
        if collecting:
            gc.enable()
    return timings


def run_case(
    setup: Setup,
    names: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    deadline: float | None = None,
    clock: Clock | None = None,
    advance: Callable[[str], None] = lambda label: None,
    refused: Mapping[str, str] | None = None,
) -> list[dict]:
    """Measure one case: a row per peer, also for those that cannot run, or are wrong: results are compared before and after.

    Where a peer fails in the midst of it, the others are measured again without it.

    Args:
        refused: peers that are not tried, with the reason.

    Raises:
        peers.DeviceLostError: a peer has taken the GPU's context with it.
        agreement.NoOracleError: eager does not run.
    """
    names, clock = names or peers_module.usual(setup.device, setup.mode), clock or clock_for(setup.device)
    refusals = {name: Refusal(reason, peers_module.is_ours(name)) for name, reason in (refused or {}).items()}
    while True:
        try:
            return _measured(setup, names, rounds, deadline, clock, advance, dict(refusals))
        except peers_module.StepFailedError as error:
            refusals[error.peer] = Refusal(error.reason, peers_module.is_ours(error.peer))


def _measured(
    setup: Setup,
    names: Sequence[str],
    rounds: int,
    deadline: float | None,
    clock: Clock,
    advance: Callable[[str], None],
    refusals: dict[str, Refusal],
) -> list[dict]:
    ready: dict[str, Peer] = {}
    matmul, device = torch.backends.cuda.matmul, setup.device
    with temporarily(torch.backends.cudnn, benchmark=True), temporarily(matmul, allow_tf32=torch.backends.cudnn.allow_tf32):
        for name in (name for name in names if name not in refusals):
            advance(f"{setup.case.name}: {name}")
            made = peers_module.make(name, setup)
            if isinstance(made, Refusal):
                refusals[name] = made
            else:
                ready[name] = made
        errors = {"before": compare(ready, refusals, setup, 0)}
        used = {}
        for name, peer in ready.items():
            with peers_module.blamed(name, device):
                used[name] = memory.measure(peer, setup)
                for i in range(WARM_UP):
                    peer.step(i % setup.sets)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        advance(f"{setup.case.name}: timing")
        steps = {name: peer.step for name, peer in ready.items()}
        before = clocks.state(device)
        timings = interleave(steps, clock.time, rounds, setup.sets, deadline, device=device)
        state = {"before": before, "after": clocks.state(device)}
        few = max(MIN_ROUNDS, len(next(iter(timings.values()))) // 3)
        others = {column: interleave(steps, timed, few, setup.sets, device=device) for column, timed in clock.others().items()}
        graphs = _replayed(ready, setup, clock, few)
        errors["after"] = compare(ready, refusals, setup, setup.sets - 1)
    rows = []
    for name in names:
        row = _head(setup, name, refusals.get(name))
        if name not in refusals:
            row |= _times(timings[name], {column: found[name] for column, found in others.items()}, graphs.get(name))
            row |= {"layout": ready[name].layout, "backend": ready[name].backend, "state": state, **used[name]}
            row["max_relative_error"] = {when: found.get(name) for when, found in errors.items()}
            row |= work(setup, name, ready[name].backend)
            if setup.case in SUITES["host"] and device.type == "cpu":
                row["host"] = calls.count(lambda step=ready[name].step: step(0))
        rows.append(row)
    return rows


def _head(setup: Setup, name: str, refusal: Refusal | None) -> dict:
    head = {"batch": setup.batch, "dtype": dtype_name(setup.dtype), "mode": setup.mode, "peer": name}
    head |= {"reason": None} if refusal is None else refusal._asdict()
    return setup.case.describe() | head


def _times(timings: list[Timing], others: dict[str, list[Timing]], graph: list[Timing] | str | None) -> dict:
    times = [timing.ms for timing in timings]
    host = [timing.host_ms for timing in timings if timing.host_ms is not None]
    found = {"rounds": len(times), "ms": summary(times), "times": times, "host_ms": summary(host) if host else None}
    found |= {column: summary([timing.ms for timing in more]) for column, more in others.items()}
    if isinstance(graph, list):
        found["graph_ms"] = summary([timing.ms for timing in graph])
    elif graph is not None:
        found["graph_reason"] = graph
    return found


def _replayed(ready: dict[str, Peer], setup: Setup, clock: Clock, rounds: int) -> dict[str, list[Timing] | str]:
    """On a GPU, every step replayed as a CUDA graph: what is left when the host does nothing. A reason where that cannot be."""
    if setup.device.type != "cuda":
        return {}
    graphs, found = {}, {}
    for name, peer in ready.items():
        if not peer.capturable:
            found[name] = "it replays graphs of its own, or cannot be captured"
            continue
        try:
            graphs[name] = clocks.captured(lambda peer=peer: peer.step(0))
        except RuntimeError as error:
            if peers_module.is_lost(setup.device):
                raise peers_module.DeviceLostError(name, peers_module.first_line(error)) from error
            found[name] = peers_module.first_line(error)
    steps = {name: lambda i, replay=replay: replay() for name, replay in graphs.items()}
    return found | (interleave(steps, clock.time, rounds, device=setup.device) if steps else {})


def work(setup: Setup, name: str, backend: str | None) -> dict[str, float | None]:
    """FLOPs of a step's convolutions, and the bytes it moves by `traffic`, where that knows how the peer runs."""
    itemsize = setup.dtype.itemsize
    ways = {"eager": "eager", "inductor": "fused BN", None: None}
    way = "bare" if name == BARE else ways.get(backend, (backend or "").split(", ")[-1])
    known = way in (*traffic.WAYS, "bare") and not setup.case.is_network
    moved = traffic.total(setup.case, way, setup.mode, setup.batch, itemsize).bytes if known else None
    return {"flops": traffic.convolution_flops(setup.case, setup.mode, setup.batch), "bytes": moved}
