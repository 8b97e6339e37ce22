"""`python -m fused_res.benchmarks.cudnn_fusions --output FILE`: cuDNN's own fusions at ResNet-50's shapes, on an NVIDIA GPU.

Each of `fusions.resnet50` is built as a cuDNN graph, timed beside the bare convolution and the unfused PyTorch operations, and
asked what cuDNN does not promise: error, whether runs repeat bit for bit, whether outputs are overwritten, NaN, zero padding.

Plans are built in several processes at once, for that takes seconds of a CPU each; the GPU belongs to one of them at a time. A
graph that ends its process or does not come to an end is a row with that reason, and another process goes on with the next. Rows
are appended to the file, of the format of `results`, as soon as they are measured, in milliseconds and bytes.
"""

import argparse
import collections
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from fused_res import environment
from fused_res.benchmarks import results
from fused_res.benchmarks.clocks import clock_for
from fused_res.benchmarks.cudnn_trials import Trial
from fused_res.benchmarks.foreign import needed
from fused_res.benchmarks.fusions import resnet50

UNFINISHED = 3
LONGEST = {"starting": 60.0, "planning": 40.0, "measuring": 25.0}
"""Seconds that a process may spend in a stage before it is ended."""


@dataclass(frozen=True)
class Options:
    device: str
    batch: int
    dtype: torch.dtype
    rounds: int
    plans: int


def work(connection: multiprocessing.connection.Connection, options: Options) -> None:
    """A process's life: take a fusion's index, build it, wait for the GPU, measure it, and send the row."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device(options.device)
    cases, clock, handle = resnet50(), None, None
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":  # loads what else would be loaded while the GPU is this process's alone
        image = torch.zeros(1, 64, 8, 8, dtype=options.dtype, device=device).to(memory_format=torch.channels_last)
        F.conv2d(image, torch.zeros(64, 64, 3, 3, dtype=options.dtype, device=device), padding=1)
        torch.cuda.synchronize()
    connection.send(None)
    while True:
        try:
            index = connection.recv()
        except EOFError:
            return
        row, broken = {}, False
        begun = time.perf_counter()
        try:
            cudnn = needed("cudnn", "nvidia-cudnn-frontend")
            if handle is None:
                handle = cudnn.create_handle()
                if device.type == "cuda":
                    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            row["backend"] = f"cuDNN {cudnn.backend_version()}, cudnn-frontend {cudnn.__version__}"
            trial = Trial(cases[index], options.batch, options.dtype, handle, options.plans)
            row |= {"planning_s": time.perf_counter() - begun, "failures": trial.graph.failures}
            connection.send(None)
            connection.recv()
            clock = clock or clock_for(device)
            trial.allocate(device)
            with torch.no_grad():
                row |= trial.times(clock, options.rounds)
                row |= trial.judge(row["plan"]) | {"reason": None}
        except Exception as error:  # whatever it is, it is the row's reason, and the next fusion may do
            row["reason"] = f"{type(error).__name__}: {error}"[:500]
        trial = None
        try:
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except RuntimeError:  # an error that stays with the process
            broken = True
        connection.send((row, broken))
        if broken:
            return


def _end_with_parent() -> None:
    """The GPU must not be used on when the command was ended from outside."""
    multiprocessing.parent_process().join()
    os._exit(1)


class Worker:
    """A process of `work` and what it is at: `starting`, nothing, `planning`, `waiting` for the GPU, or `measuring`.

    `index` is of the fusion, None where there is none.
    """

    def __init__(self, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()
        self.index = None
        self.enter("starting")

    def enter(self, stage: str | None) -> None:
        self.stage, self.since = stage, time.monotonic()

    def tell(self, stage: str, message: object = None) -> None:
        self.enter(stage)
        self.connection.send(message)

    def is_stuck(self) -> bool:
        return self.stage in LONGEST and time.monotonic() - self.since > LONGEST[self.stage]

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Run:
    """Fusions handed out to processes and their rows collected, until all are measured or the time is over."""

    def __init__(self, options: Options, indices: list[int], processes: int, take: object) -> None:
        self.options, self.take = options, take
        self.left = collections.deque(indices)
        self.workers = [Worker(options) for _ in range(min(processes, len(indices)))]

    def until(self, deadline: float) -> bool:
        """Whether all were measured. `deadline` is of `time.monotonic`."""
        try:
            while self.left or any(worker.index is not None for worker in self.workers):
                if time.monotonic() >= deadline or not self.workers:
                    return False
                self._hand_out()
                connections = {worker.connection: worker for worker in self.workers}
                for ready in multiprocessing.connection.wait(list(connections), timeout=0.2):
                    self._hear(connections[ready])
                for worker in list(self.workers):
                    if worker.is_stuck():
                        self._lose(worker, f"not done after {LONGEST[worker.stage]:.0f} s of {worker.stage}")
            return True
        finally:
            for worker in self.workers:
                worker.end()

    def _hand_out(self) -> None:
        for worker in list(self.workers):
            if worker.stage is None and self.left:
                worker.index = self.left.popleft()
                self._tell(worker, "planning", worker.index)
        waiting = [worker for worker in self.workers if worker.stage == "waiting"]
        if waiting and not any(worker.stage == "measuring" for worker in self.workers):
            self._tell(min(waiting, key=lambda worker: worker.index), "measuring")

    def _tell(self, worker: Worker, stage: str, message: object = None) -> None:
        try:
            worker.tell(stage, message)
        except OSError:
            self._lose(worker, "the process ended")

    def _hear(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._lose(worker, f"the process ended (exit code {worker.process.exitcode}) while {worker.stage}")
            return
        if message is None:
            worker.enter(None if worker.stage == "starting" else "waiting")
            return
        row, broken = message
        self.take(worker.index, row)
        worker.index = None
        worker.enter(None)
        if broken:
            self._lose(worker, "")

    def _lose(self, worker: Worker, reason: str) -> None:
        """Another process in place of this one; the fusion that it was at, if any, gets the reason as its row.

        One that never came to work is not replaced: so would be the next.
        """
        if worker.index is not None:
            self.take(worker.index, {"reason": reason})
        worker.end()
        place = self.workers.index(worker)
        self.workers[place : place + 1] = [] if worker.stage == "starting" else [Worker(self.options)]


def table(rows: list[dict]) -> str:
    """One line a row: milliseconds and what the times are of the bare convolution's and the unfused operations'."""
    head = f"{'fusion':34}{'ms':>8}{'/bare':>7}{'/unfused':>9}  {'error':>8} {'border':>8} {'others':>8}  says"
    lines = [head]
    for row in rows:
        if row["reason"] is not None:
            timed = f"{row['ms']['median']:8.3f} ms" if "ms" in row else ""
            lines.append(f"{row['case']:34}{timed}  {row['reason'][:90]}")
            continue
        ms, errors = row["ms"]["median"], list(row["error"].values())
        numbers = [
            errors[0],
            row.get("border_error"),
            max(errors[1:], key=lambda e: float("inf") if e is None else e, default=None),
        ]
        says = [row["plan"]]
        says += [] if row["overwrites"] else ["does not overwrite its outputs"]
        says += [f"runs differ: {', '.join(row['runs_differ_in'])}"] if row["runs_differ_in"] else ["repeats"]
        says += [f"NaN in {name}: {verdict}" for name, verdict in row["nan"].items() if verdict != "kept"] or ["NaN kept"]
        shown = " ".join(f"{'-' if number is None else format(number, '.1e'):>8}" for number in numbers)
        ratios = f"{ms / row['bare_ms']['median']:7.2f}{ms / row['unfused_ms']['median']:9.2f}"
        lines.append(f"{row['case']:34}{ms:8.3f}{ratios}  {shown}  {'; '.join(says)}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cudnn_fusions", description=__doc__.split("\n\n")[1])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines, a row at a time")
    parser.add_argument("--resume", action="store_true", help="go on with FILE; what has a row is done")
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="then stop (default %(default)g)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of timing (default %(default)s)")
    parser.add_argument("--plans", type=int, default=2, help="of how many engines a plan is timed (default %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="that build plans at once (default %(default)s)")
    parser.add_argument("--only", default="", metavar="WORDS", help="fusions whose names begin so, such as 'fprop 3x3'")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 every fusion has a row, 2 no GPU or wrong arguments, 3 the time was over before."""
    begun, parsing = time.monotonic(), parser()
    options = parsing.parse_args(arguments)
    if min(options.batch, options.rounds, options.plans, options.processes) < 1:
        parsing.error("--batch, --rounds, --plans and --processes must be at least 1")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parsing.error("there is no NVIDIA GPU that PyTorch can use")
    device = torch.device("cuda", options.device.index or 0) if options.device.type == "cuda" else options.device
    names = [fusion.name for fusion in resnet50()]
    chosen = [i for i, name in enumerate(names) if name.startswith(options.only)]
    settings = f"--batch {options.batch} --dtype {options.dtype} --rounds {options.rounds} --plans {options.plans}"
    document = results.new(f"cudnn_fusions {settings}", device)
    try:
        if options.resume and options.output.exists():
            document = results.resume(options.output, document)
        else:
            results.begin(document, options.output)
    except (results.StaleResultError, ValueError) as error:
        parsing.error(str(error))
    done = {row["case"] for row in document["rows"]}

    def take(index: int, row: dict) -> None:
        head = {"case": names[index], "batch": options.batch, "dtype": options.dtype, "mode": "fusion"}
        results.append(document, options.output, "rows", [head | row])
        print(f"{time.monotonic() - begun:6.1f} s  {names[index]}: {row['reason'] or 'measured'}", flush=True)

    worked = Options(str(device), options.batch, environment.DTYPES[options.dtype], options.rounds, options.plans)
    run = Run(worked, [i for i in chosen if names[i] not in done], options.processes, take)
    complete = run.until(begun + options.limit)
    order = {name: i for i, name in enumerate(names)}
    print(table(sorted(document["rows"], key=lambda row: order[row["case"]])))
    missing = [names[i] for i in chosen if names[i] not in {row["case"] for row in document["rows"]}]
    if missing:
        print(f"not reached in {options.limit:g} s: {', '.join(missing)}")
    return 0 if complete else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
