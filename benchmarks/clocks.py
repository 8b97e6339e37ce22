"""How long a step takes: on the CPU by the performance counter, on the GPU by events."""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch


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
