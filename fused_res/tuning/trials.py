"""A trial: candidates for the same work against an incumbent. One wins only if it is right, and measured to be faster.

Right is judged against a truth in float64, by the incumbent's own errors on the same data and the floor of `fused_res.tolerance`:

- The relative L2 error is at most `MARGIN` times the incumbent's. That rule is for many seeds; on one the limit leaves room for
  `fused_res.tolerance.scatter`, 2 % for an image of 20 thousand values.
- The largest error is at most `LARGEST` times the incumbent's: one value that is wrong among millions hardly shows in L2. Of two
  equally good candidates one has a largest error twice the other's only rarely.

Both are asked of every result, on one draw of the data before the timing and on another after it: a kernel with a race may be
right the first time. A third draw has a NaN and an infinity in it, and a candidate must not lose them: what is finite neither in
truth nor in the incumbent's results may not be finite in its own. (Products with padding, 0 * NaN, some libraries leave out.)

One that is refused although it is right costs time alone. The incumbent always stands, so that the winner is never slower than it
where it was measured.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.internals import gpu_sleep
from fused_res.tolerance import MARGIN, floor, scatter

GAIN = 0.97
"""Of the incumbent's time: what a candidate has to stay under. Differences below that are noise."""
ROUNDS = 20
LARGEST = 4
"""Times the incumbent's largest error: what a candidate's may be."""
INPUTS = 2
"""Draws of the data, in turn: what one round has left in a cache is of no use to the next."""
ADVERSE = INPUTS
"""The draw with a NaN and an infinity in it, for `results` alone."""
_WARM = 2  # rounds that do not count
_CACHES = 2  # times the size of the last cache is written between two timings
_AHEAD = 1_000_000  # cycles that a GPU waits while the host enqueues


class Candidate(NamedTuple):
    """run: does the whole work once. results: what it gives, to be judged.

    Both on a draw of the data, 0 to `INPUTS` - 1; results also on `ADVERSE`.
    """

    run: Callable[[int], object]
    results: Callable[[int], Sequence[Tensor]]


class Errors(NamedTuple):
    """Of one result: relative L2, and the largest difference over the largest true value."""

    l2: float
    largest: float


class Verdict(NamedTuple):
    """winner: a candidate's name. seconds: medians of those that were measured. rejected: why the others were not."""

    winner: str
    seconds: dict[str, float]
    rejected: dict[str, str]


Measure = Callable[[Mapping[str, Callable[[int], object]], torch.device, bool], Mapping[str, float]]


class UnusableDeviceError(RuntimeError):
    """A candidate has left the device in a state in which nothing runs any more."""


def errors(result: Tensor, truth: Tensor) -> Errors:
    """Infinite where the shapes differ or the result is not finite."""
    if result.shape != truth.shape:
        return Errors(math.inf, math.inf)
    difference = (result.to(truth.dtype) - truth).flatten()
    return Errors(*(_ratio(difference, truth.flatten(), order) for order in (2, math.inf)))


def _ratio(difference: Tensor, truth: Tensor, order: float) -> float:
    found, scale = (torch.linalg.vector_norm(t, order).item() if t.numel() else 0.0 for t in (difference, truth))
    if not math.isfinite(found):
        return math.inf
    return found / scale if scale > 0 else 0.0 if found == 0 else math.inf


def limits(incumbents: Errors, values: int, dtype: torch.dtype) -> Errors:
    """What the errors of a result of so many values, stored in this dtype, may be."""
    most = MARGIN * scatter(values)
    return Errors(max(most * incumbents.l2, floor(dtype)), max(LARGEST * incumbents.largest, floor(dtype)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attempt(work: Callable[[], object], device: torch.device) -> tuple[object, str | None]:
    """What the work gives, or why it gives nothing."""
    try:
        found = work()
        _synchronize(device)
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        try:
            _synchronize(device)
        except RuntimeError as fatal:
            raise UnusableDeviceError(
                f"FUSED_RES_TUNE: a candidate failed and took {device} with it, nothing runs on it in this process any more "
                f"({reason}). Run again with FUSED_RES_TUNE=0"
            ) from fatal
        return None, reason
    return found, None


def _fault(results: Sequence[Tensor], incumbents: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """What is wrong with the results, or None where they are right."""
    if len(results) != len(truth):
        return f"gives {len(results)} results, not {len(truth)}"
    for i, (result, incumbent, true) in enumerate(zip(results, incumbents, truth, strict=True)):
        if result.dtype != incumbent.dtype:
            return f"wrong: result {i} is in {result.dtype}, not {incumbent.dtype}"
        limit = limits(errors(incumbent, true), true.numel(), result.dtype)
        for name, found, most in zip(("relative", "largest"), errors(result, true), limit, strict=True):
            if not found <= most:
                return f"wrong: result {i} has a {name} error of {found:.1e}, more than {most:.1e}"
    return None


def _lost(results: Sequence[Tensor], incumbents: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """Where a NaN or an infinity has been lost, or None where none has."""
    for i, (result, incumbent, true) in enumerate(zip(results, incumbents, truth, strict=True)):
        if (result.isfinite() & ~incumbent.isfinite() & ~true.isfinite()).any():
            return f"wrong: result {i} has lost a NaN or an infinity"
    return None


def hold(
    candidates: Mapping[str, Candidate],
    incumbent: str,
    truth: Callable[[int], Sequence[Tensor]],
    device: torch.device,
    measure: Measure,
    *,
    queued: bool,
) -> Verdict:
    """The fastest of the candidates that are right.

    Args:
        candidates: by name.
        incumbent: which of them wins unless another is right and faster. It is taken to be right.
        truth: what `results` should give for a draw of the data, in float64.
        device: where it runs.
        measure, queued: as `measure` below.

    Raises:
        UnusableDeviceError: a candidate failed and took the device with it.
    """
    rejected: dict[str, str] = {}

    def right(names: Sequence[str], draw: int) -> list[str]:
        """Those of the names that are right on this draw; none, if the incumbent fails."""
        best, reason = _attempt(lambda: candidates[incumbent].results(draw), device)
        if reason is not None:
            rejected[incumbent] = reason
            return []
        true = truth(draw)
        for name in names:
            results, reason = _attempt(lambda name=name: candidates[name].results(draw), device)
            reason = reason or (_lost(results, best, true) if draw == ADVERSE else _fault(results, best, true))
            if reason is not None:
                rejected[name] = reason
        return [name for name in names if name not in rejected]

    able = right(right([name for name in candidates if name != incumbent], 0), ADVERSE)
    if not able:
        return Verdict(incumbent, {}, rejected)
    seconds = dict(measure({name: candidates[name].run for name in (incumbent, *able)}, device, queued))
    faster = [name for name in right(able, 1) if seconds[name] < GAIN * seconds[incumbent]]
    return Verdict(min(faster, key=seconds.__getitem__, default=incumbent), seconds, rejected)


def measure(runs: Mapping[str, Callable[[int], object]], device: torch.device, queued: bool) -> dict[str, float]:
    """Medians of interleaved rounds, each run by itself on the next draw of the data, with the caches full of something else.

    queued: whether a GPU starts only when the host has enqueued the whole run; otherwise what the host takes counts too.
    """
    size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**25
    flush = torch.empty(_CACHES * max(size, 2**20), dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(_WARM + ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            flush.zero_()
            draw = i % INPUTS
            found = _on_gpu(runs[name], draw, queued) if device.type == "cuda" else _on_cpu(runs[name], draw)
            if i >= _WARM:
                times[name].append(found)
    return {name: statistics.median(found) for name, found in times.items()}


def _on_gpu(run: Callable[[int], object], draw: int, queued: bool) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        gpu_sleep(_AHEAD)
    else:
        torch.cuda.synchronize()
    start.record()
    run(draw)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_cpu(run: Callable[[int], object], draw: int) -> float:
    start = time.perf_counter()
    run(draw)
    return time.perf_counter() - start
