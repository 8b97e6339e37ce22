"""How long a step takes: on the CPU by the performance counter, on the GPU by events; and in what state the machine was."""

import gc
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from fused_res.internals import gpu_sleep

Call = Callable[[], object]
_GPU_STATE = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "throttled": "clocks_throttle_reasons.active",
}


class Timing(NamedTuple):
    """One step: `ms` is what it took, `host_ms` how long the CPU was busy enqueueing it (None where the CPU does the work)."""

    ms: float
    host_ms: float | None = None


class Clock(Protocol):
    conditions: str

    def time(self, call: Call) -> Timing: ...

    def others(self) -> dict[str, Callable[[Call], Timing]]:
        """Further ways to time a step, by the name of their column."""


class CpuClock:
    conditions = "wall time of a step; three input sets in turn, caches as the peer before left them"

    def time(self, call: Call) -> Timing:
        start = time.perf_counter()
        call()
        return Timing((time.perf_counter() - start) * 1e3)

    def others(self) -> dict[str, Callable[[Call], Timing]]:
        return {}


class CudaClock:
    """CUDA events around a step that finds a cold L2 and a full queue.

    A sleep on the GPU lets the CPU enqueue the whole step before the first kernel starts: `ms` is then the GPU's time, not the
    enqueueing's, which is reported by itself.
    """

    LONGEST_SLEEP_MS = 20.0
    conditions = "CUDA events, cold L2, full queue"

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(2 * cache, 1 << 28), dtype=torch.int8, device=device)
        self.sleep_ms = 2.0
        self.cycles_per_ms = 1.0
        gpu_sleep(1000)
        self.cycles_per_ms = 10_000_000 / self._events(lambda: gpu_sleep(10_000_000)).ms

    @staticmethod
    def _events(call: Call) -> Timing:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        start.record()
        call()
        end.record()
        host_ms = (time.perf_counter() - begin) * 1e3
        end.synchronize()
        return Timing(start.elapsed_time(end), host_ms)

    def time(self, call: Call) -> Timing:
        torch.cuda.synchronize()
        self.flush.zero_()
        return self._queued(call)

    def _queued(self, call: Call) -> Timing:
        gpu_sleep(int(self.sleep_ms * self.cycles_per_ms))
        timing = self._events(call)
        self.sleep_ms = min(self.LONGEST_SLEEP_MS, max(self.sleep_ms, 1.5 * timing.host_ms))
        return timing

    def _warm(self, call: Call) -> Timing:
        call()
        torch.cuda.synchronize()
        return self._queued(call)

    def _wall(self, call: Call) -> Timing:
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return Timing((time.perf_counter() - start) * 1e3)

    def others(self) -> dict[str, Callable[[Call], Timing]]:
        """`warm_ms`: right after the same step; `wall_ms`: from an idle GPU until it is idle again, the host's work included."""
        return {"warm_ms": self._warm, "wall_ms": self._wall}


class CaptureFailedError(RuntimeError):
    """A step cannot be captured: in which part of it, in which of its calls, and with which error."""

    def __init__(self, part: str, error: Exception) -> None:
        calls = [frame.name for frame in traceback.extract_tb(error.__traceback__)[1:]]
        said = next(iter(str(error).strip().splitlines()), "")
        super().__init__(f"{part}, in {' > '.join(calls[-4:])}: {type(error).__name__}: {said}")


def captured(call: Call) -> Callable[[], None]:
    """The step as a CUDA graph; calling it replays the graph, whose results are let go of.

    Warm-up and capture are on one stream of their own, as in torch's recipe for whole steps: there libraries make their handles
    and workspaces beforehand, and autograd its AccumulateGrad nodes. Such a node keeps the stream that it was made on as long as
    any autograd graph of its leaf lives; where that is another one, the gradient that reaches it leaves the capture, and ends it.
    So no step's graph may outlive the step, in what ran before as well (`memory.saved_bytes`). `.grad` is not an issue: steps use
    `torch.autograd.grad`.

    The graph has a random state of its own: a capture that fails would leave the device's generator in one, where it refuses
    all further work. It would also leave its stream the current one.

    Raises:
        CaptureFailedError: with the error of the step, where that fails, rather than with that of the capture's end.
    """
    gc.collect()
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
    untouched = generator.graphsafe_get_state()
    part, first = "warm-up", None
    try:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        current.wait_stream(stream)
        generator.graphsafe_set_state(generator.clone_state())
        part = "begin of the capture"
        with torch.cuda.graph(graph, stream=stream):
            part = "capture"
            try:
                call()
            except Exception as error:
                first = error
                raise
            part = "end of the capture"
    except Exception as error:
        raise CaptureFailedError(part, first or error) from (first or error)
    finally:
        generator.graphsafe_set_state(untouched)
        torch.cuda.set_stream(current)
        del first  # its traceback holds this frame
    return graph.replay


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def _gpu_state(device: torch.device) -> dict:
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, f"--query-gpu={','.join(_GPU_STATE.values())}"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    if done.returncode != 0 or len(values) != len(_GPU_STATE):
        return {}
    return dict(zip(_GPU_STATE, values, strict=True))


def _cpu_state() -> dict:
    found = {}
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    for name, path, scale in (
        ("mhz", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", 1e-3),
        ("celsius", "/sys/class/thermal/thermal_zone0/temp", 1e-3),
    ):
        try:
            found[name] = round(int(Path(path).read_text()) * scale)
        except (OSError, ValueError):
            continue
    return found


def state(device: torch.device) -> dict:
    """Clocks, temperature and load of the device now, as far as the machine tells."""
    return _gpu_state(device) if device.type == "cuda" else _cpu_state()
