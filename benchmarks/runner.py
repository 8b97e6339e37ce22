"""Interleaved measurement: in every round each peer runs once, in a new order, all on the same input set.

What is compared are ratios of times within a round, so that a clock that drifts or a busy neighbour meets all peers alike.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fused_res.benchmarks import peers as peers_module
from fused_res.benchmarks.peers import Peer, Setup

ROUNDS, MIN_ROUNDS, WARM_UP = 30, 5, 3
ORACLE = ("eager channels_last", "eager NCHW")


class Timing(NamedTuple):
    """One step: `ms` is what it took, `host_ms` how long the CPU was busy enqueueing it (None where the CPU does the work)."""

    ms: float
    host_ms: float | None = None


class Clock(Protocol):
    def time(self, call: Callable[[], object]) -> Timing: ...


class CpuClock:
    def time(self, call: Callable[[], object]) -> Timing:
        start = time.perf_counter()
        call()
        return Timing((time.perf_counter() - start) * 1e3)


class CudaClock:
    """CUDA events around a step that finds a cold L2 and a full queue.

    A sleep on the GPU lets the CPU enqueue the whole step before the first kernel starts: `ms` is then the GPU's time, not the
    enqueueing's, which is reported by itself.
    """

    LONGEST_SLEEP_MS = 20.0

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(2 * cache, 1 << 28), dtype=torch.int8, device=device)
        self.sleep_ms = 2.0
        self.cycles_per_ms = 1.0
        torch.cuda._sleep(1000)
        self.cycles_per_ms = 10_000_000 / self._events(lambda: torch.cuda._sleep(10_000_000)).ms

    @staticmethod
    def _events(call: Callable[[], object]) -> Timing:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        start.record()
        call()
        end.record()
        host_ms = (time.perf_counter() - begin) * 1e3
        end.synchronize()
        return Timing(start.elapsed_time(end), host_ms)

    def time(self, call: Callable[[], object]) -> Timing:
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda._sleep(int(self.sleep_ms * self.cycles_per_ms))
        timing = self._events(call)
        self.sleep_ms = min(self.LONGEST_SLEEP_MS, max(self.sleep_ms, 1.5 * timing.host_ms))
        return timing


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


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
    return {
        a: {b: summary([x / y for x, y in zip(times[a], times[b], strict=True)]) for b in times if b != a}  #
        for a in times
    }


class ResultMismatch(RuntimeError):
    """fused_res computed something else than eager: its times would mean nothing."""


def unit_roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Half an ulp of 1: TF32's for fp32 on a GPU where the convolutions may use it."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return 2.0**-11
    return torch.finfo(dtype).eps / 2


def tolerance(quantity: str, unit: float) -> float:
    """Largest relative L2 difference between two right answers that round differently; coarse, `fused-res check` is exact.

    16 roundings u for what is computed forward. A gradient sees the ReLUs' signs: pre-activations wrong by about 8 u flip about
    that fraction of the signs in each of three ReLUs, and a flip is an error of 100 %, so its L2 error is about sqrt(24 u).
    Allowed is twice that, and never more than a quarter.
    """
    return min(0.25, 2 * (24 * unit) ** 0.5) if quantity.startswith("d ") else max(16 * unit, 2.0**-16)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, in L2; NaN where either is not finite."""
    value, truth = value.detach().to(torch.float64), truth.detach().to(torch.float64)
    size = torch.linalg.vector_norm(truth)
    return float(torch.linalg.vector_norm(value - truth) / size.clamp_min(torch.finfo(torch.float64).tiny))


def quantities(peer: Peer, results: list[Tensor]) -> dict[str, Tensor]:
    """Names for what a step returned, and the module's running statistics as they are after it."""
    names = ["out", "d x", *(f"d {name}" for name, _ in peer.module.named_parameters())]
    found = dict(zip(names, results, strict=False))
    if peer.module.training:
        found |= {name: buffer for name, buffer in peer.module.named_buffers() if buffer.is_floating_point()}
    return found


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor], unit: float) -> tuple[float, str | None]:
    """Largest relative error over a step's quantities, and what is beyond tolerance, or None."""
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    wrong = [name for name, error in errors.items() if not error <= tolerance(name, unit)]
    complaint = ", ".join(f"{name}: relative error {errors[name]:.2g} > {tolerance(name, unit):.2g}" for name in wrong)
    finite = [error for error in errors.values() if error == error]
    return max(finite) if len(finite) == len(errors) else float("nan"), complaint or None


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that a forward keeps for backward, each storage once.

    Parameters and buffers are left out, and the output, which is the next block's input and counted there.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (out, *module.parameters(), *module.buffers())}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The most GPU memory a step holds beyond what was held before it; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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
        ResultMismatch: fused_res differs from eager beyond `tolerance`.
    """
    ready: dict[str, Peer] = {}
    reasons: dict[str, str] = {}
    with torch.backends.cudnn.flags(**_cudnn_flags()):
        for name in names or peers_module.REGISTRY:
            advance(f"{setup.case.name}: {name}")
            made = peers_module.make(name, setup)
            if isinstance(made, str):
                reasons[name] = made
            else:
                ready[name] = made
        errors = {"before": _compare(ready, reasons, setup, 0)}
        memory = {
            name: {
                "saved_bytes": saved_bytes(lambda p=peer: p.forward(0), peer.module) if peer.module and setup.mode != "eval" else None,
                "peak_bytes": peak_bytes(lambda p=peer: p.step(0), setup.device),
            }
            for name, peer in ready.items()
        }
        for i in range(WARM_UP):
            for peer in ready.values():
                peer.step(i % setup.sets)
        advance(f"{setup.case.name}: timing")
        steps = {name: peer.step for name, peer in ready.items()}
        timings = interleave(steps, clock or clock_for(setup.device), rounds, setup.sets, deadline)
        errors["after"] = _compare(ready, reasons, setup, setup.sets - 1)
    return [_row(setup, name, ready, reasons, errors, memory, timings) for name in names or peers_module.REGISTRY]


def _cudnn_flags() -> dict:
    """Torch's settings as they are, but with cuDNN choosing its algorithms by measurement."""
    cudnn = torch.backends.cudnn
    return {"enabled": cudnn.enabled, "benchmark": True, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}


def _compare(ready: dict[str, Peer], reasons: dict[str, str], setup: Setup, i: int) -> dict[str, float]:
    """Largest relative error of each whole-block peer against eager, every one having run the same steps before.

    A peer that is wrong is taken out of `ready`; fused_res raises.
    """
    oracle = next((name for name in ORACLE if name in ready), None)
    if oracle is None:
        raise ResultMismatch(f"{setup.case.name}: eager does not run here, so nothing can be compared with it: {reasons}")
    unit, errors = unit_roundoff(setup.dtype, setup.device), {oracle: 0.0}
    wanted = quantities(ready[oracle], ready[oracle].step(i))
    for name in [name for name, peer in ready.items() if peer.module is not None and name != oracle]:
        errors[name], complaint = difference(quantities(ready[name], ready[name].step(i)), wanted, unit)
        if complaint and name == "fused_res":
            raise ResultMismatch(f"{setup.case.name}, batch {setup.batch}: fused_res differs from {oracle}: {complaint}")
        if complaint:
            del ready[name]
            reasons[name] = f"differs from {oracle}: {complaint}"
    return errors


def _row(setup: Setup, name: str, ready: dict, reasons: dict, errors: dict, memory: dict, timings: dict) -> dict:
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
        "dtype": str(setup.dtype).removeprefix("torch."),
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
        **memory[name],
    }
