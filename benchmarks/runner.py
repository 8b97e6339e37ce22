"""Interleaved measurement: in every round each peer runs once, in a new order, all on the same input set.

What is compared are ratios of times within a round, so that a clock that drifts or a busy neighbour meets all peers alike.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from fused_res.benchmarks import memory
from fused_res.benchmarks import peers as peers_module
from fused_res.benchmarks.agreement import compare
from fused_res.benchmarks.clocks import Clock, Timing, clock_for
from fused_res.benchmarks.peers import Peer, Setup
from fused_res.environment import dtype_name, temporarily

ROUNDS, MIN_ROUNDS, WARM_UP = 30, 5, 3


def interleave(
    steps: dict[str, Callable[[int], object]],
    clock: Clock,
    rounds: int = ROUNDS,
    sets: int = 1,
    deadline: float | None = None,
    seed: int = 0,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[Timing]]:
    """Timings of every step, one per round. Stops early, after at least MIN_ROUNDS rounds, once `now()` passes the deadline [s]."""
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
                timings[name].append(clock.time(lambda name=name, i=done % sets: steps[name](i)))
    finally:
        if collecting:
            gc.enable()
    return timings


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median with 20 % and 80 % quantiles."""
    if len(values) == 1:
        return {"median": values[0], "q20": values[0], "q80": values[0]}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "q20": tenths[1], "q80": tenths[7]}


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """`[a][b]`: a's time over b's, taken round by round and then summarised."""
    return {a: {b: summary([x / y for x, y in zip(times[a], times[b], strict=True)]) for b in times if b != a} for a in times}


def run_case(
    setup: Setup,
    names: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    deadline: float | None = None,
    clock: Clock | None = None,
    advance: Callable[[str], None] = lambda label: None,
) -> list[dict]:
    """Measure one case: a row per peer, also for those that cannot run. The results are compared before and after the timing.

    Raises:
        ResultMismatchError: fused_res differs from eager beyond `tolerance`.
    """
    ready: dict[str, Peer] = {}
    reasons: dict[str, str] = {}
    with temporarily(torch.backends.cudnn, benchmark=True):
        for name in names or peers_module.REGISTRY:
            advance(f"{setup.case.name}: {name}")
            made = peers_module.make(name, setup)
            if isinstance(made, str):
                reasons[name] = made
            else:
                ready[name] = made
        errors = {"before": compare(ready, reasons, setup, 0)}
        used = {name: memory.measure(peer, setup) for name, peer in ready.items()}
        for i in range(WARM_UP):
            for peer in ready.values():
                peer.step(i % setup.sets)
        advance(f"{setup.case.name}: timing")
        steps = {name: peer.step for name, peer in ready.items()}
        timings = interleave(steps, clock or clock_for(setup.device), rounds, setup.sets, deadline)
        errors["after"] = compare(ready, reasons, setup, setup.sets - 1)
    return [_row(setup, name, ready, reasons, errors, used, timings) for name in names or peers_module.REGISTRY]


def _row(setup: Setup, name: str, ready: dict, reasons: dict, errors: dict, used: dict, timings: dict) -> dict:
    case = setup.case
    row = {
        "case": case.name,
        "block": case.kind,
        "projection": case.projection,
        "inplanes": case.inplanes,
        "planes": case.planes,
        "size": case.size,
        "stride": case.stride,
        "batch": setup.batch,
        "dtype": dtype_name(setup.dtype),
        "mode": setup.mode,
        "peer": name,
        "reason": reasons.get(name),
    }
    if name in reasons:
        return row
    times = {peer: [timing.ms for timing in timings[peer]] for peer in ready}
    host = [timing.host_ms for timing in timings[name] if timing.host_ms is not None]
    return row | {
        "layout": ready[name].layout,
        "backend": ready[name].backend,
        "rounds": len(times[name]),
        "ms": summary(times[name]),
        "host_ms": summary(host) if host else None,
        "ratio_to": ratios(times)[name],
        "max_relative_error": {when: found.get(name) for when, found in errors.items()},
        **used[name],
    }
