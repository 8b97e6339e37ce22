"""Where the time of a step goes, kernel by kernel (on a CPU operator by operator), under torch.profiler.

`python -m fused_res.benchmarks.profiling FILE…` runs the cases again in which fused_res does worst against eager, and writes a
markdown page. With `--suite` instead of files it runs the named peers in every case of a suite, and writes JSON lines: all
kernels of a step in their order, with their microseconds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from fused_res import environment
from fused_res.benchmarks import lines, peers, report, results, sums
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.peers import OURS, Setup
from fused_res.benchmarks.steps import UNFINISHED

STEPS, SHOWN = 5, 12


class Worst(NamedTuple):
    """A measured case, and ours over eager's time in it."""

    case: str
    batch: int
    dtype: str
    mode: str
    eager: str
    ratio: float


def worst(documents: Sequence[dict], count: int) -> list[Worst]:
    """The measured cases with the largest time of fused_res over that of the faster eager layout."""
    found = []
    for document in documents:
        for key, everyone in report.measured(document):
            ran = report.ran(everyone)
            eager = sums.eager_of(ran)
            if OURS in ran and eager is not None:
                found.append(Worst(*key, eager, sums.ratio(ran[OURS], ran[eager])["median"]))
    return sorted(found, key=lambda one: one.ratio, reverse=True)[:count]


class Kernel(NamedTuple):
    """A kernel, or on a CPU an operator: milliseconds and launches a step."""

    name: str
    ms: float
    calls: float


def _profiled(setup: Setup, name: str, steps: int) -> torch.profiler.profile:
    """Some steps of a peer, under the profiler. Raises RuntimeError where the peer cannot run here."""
    peer = peers.make(name, setup)
    if isinstance(peer, peers.Refusal):
        raise RuntimeError(f"{name}: {peer.reason}")
    gpu = setup.device.type == "cuda"
    for i in range(3):
        peer.step(i % setup.sets)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for i in range(steps):
            peer.step(i % setup.sets)
        if gpu:
            torch.cuda.synchronize(setup.device)
    return profiler


def sequence(setup: Setup, name: str, steps: int = STEPS) -> list[tuple[str, float]]:
    """The kernels of a peer's step in their order, and their microseconds, the medians of some steps.

    Raises:
        RuntimeError: the peer cannot run here, or its steps differ in their kernels.
    """
    gpu = setup.device.type == "cuda"
    events = [e for e in _profiled(setup, name, steps).events() if (e.device_type == DeviceType.CUDA) == gpu]
    events = sorted(events if gpu else (e for e in events if e.cpu_parent is None), key=lambda event: event.time_range.start)
    count, rest = divmod(len(events), steps)
    rounds = [events[k * count : (k + 1) * count] for k in range(steps)]
    if rest or not count or any([e.name for e in one] != [e.name for e in rounds[0]] for one in rounds):
        raise RuntimeError(f"{name}: expected the same kernels in every step, got {len(events)} in {steps} steps")
    times = [statistics.median(one[k].time_range.elapsed_us() for one in rounds) for k in range(count)]
    return [(event.name, time) for event, time in zip(rounds[0], times, strict=True)]


def kernels(setup: Setup, name: str, steps: int = STEPS) -> list[Kernel]:
    """What a peer's step runs, the longest first.

    Raises:
        RuntimeError: the peer cannot run here.
    """
    profiler, gpu = _profiled(setup, name, steps), setup.device.type == "cuda"
    field = "self_device_time_total" if gpu else "self_cpu_time_total"
    found = [Kernel(event.key, getattr(event, field) / steps / 1e3, event.count / steps) for event in profiler.key_averages()]
    return sorted((kernel for kernel in found if kernel.ms > 0), key=lambda kernel: kernel.ms, reverse=True)


def table(found: Sequence[Kernel], shown: int = SHOWN) -> list[str]:
    """Markdown lines: the longest kernels and the rest together."""
    whole = sum(kernel.ms for kernel in found) or 1.0
    rest = found[shown:]
    rows = [*found[:shown], *([Kernel(f"{len(rest)} more", sum(k.ms for k in rest), sum(k.calls for k in rest))] if rest else [])]
    lines = ["| kernel | ms | share | launches |", "| --- | ---: | ---: | ---: |"]
    for kernel in rows:
        name = kernel.name if len(kernel.name) < 90 else kernel.name[:87] + "…"
        shown_name = name.replace("|", "\\|")
        lines.append(f"| `{shown_name}` | {kernel.ms:.3f} | {100 * kernel.ms / whole:.0f} % | {kernel.calls:g} |")
    return lines


def page(documents: Sequence[dict], device: torch.device, count: int) -> str:
    """The whole markdown page."""
    cases = {case.name: case for suite in SUITES.values() for case in suite}
    lines = ["# Where the time goes", "", "The cases in which fused_res does worst against eager, run again under torch.profiler."]
    for one in worst(documents, count):
        setup = Setup(cases[one.case], one.batch, environment.DTYPES[one.dtype], device, one.mode)
        lines += ["", f"## {one.case}, batch {one.batch}, {one.dtype}, {one.mode}: {one.ratio:.2f} x {one.eager}"]
        with environment.temporarily(torch.backends.cudnn, benchmark=True):
            for name in (OURS, one.eager):
                found = kernels(setup, name)
                lines += ["", f"{name}: {sum(kernel.ms for kernel in found):.3f} ms", "", *table(found)]
        setup.release()
    return "\n".join(lines) + "\n"


def _profiled_before(path: Path) -> set[tuple[str, str]]:
    """The cases and peers that a file has kernels of, or the reason why not."""
    lines.mend(path)
    return {(line["case"], line["peer"]) for line in lines.read(path)}


def _write_sequences(options: argparse.Namespace, device: torch.device) -> int:
    """A line for every case and peer: its kernels, or why there are none."""
    failed, before = 0, _profiled_before(options.output) if options.resume else set()
    mode = "a" if options.resume else "w"
    with options.output.open(mode) as file, environment.temporarily(torch.backends.cudnn, benchmark=True):
        for case in (case for case in SUITES[options.suite] if options.cases is None or case.name in options.cases):
            setup = Setup(case, options.batch, environment.DTYPES[options.dtype], device, options.mode)
            for name in (name for name in options.peers if (case.name, name) not in before):
                line = {"case": case.name, "batch": options.batch, "dtype": options.dtype, "mode": options.mode, "peer": name}
                try:
                    found = {"kernels": [(kernel, round(us, 1)) for kernel, us in sequence(setup, name)]}
                except RuntimeError as error:
                    found = {"reason": peers.first_line(error)}
                    failed += 1
                file.write(json.dumps(line | found) + "\n")
                file.flush()
                total = sum(us for _, us in found.get("kernels", ()))
                print(f"{case.name}, {name}: " + (f"{total / 1e3:.3f} ms" if total else found["reason"]), flush=True)
                if "reason" in found and peers.is_lost(device):
                    return UNFINISHED
            setup.release()
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 where a peer has no kernels to show, 3 where one has taken the GPU with it: --resume goes on after that."""
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.profiling", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="result files; those of another device are left out")
    parser.add_argument("--worst", type=int, default=4, help="how many cases (default %(default)s)")
    parser.add_argument("--suite", choices=SUITES, help="the kernels of every case of it, instead of files")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="with --suite: only these of it")
    parser.add_argument("--peers", nargs="+", choices=peers.REGISTRY, default=[OURS], metavar="NAME", help="with --suite")
    parser.add_argument("--batch", type=int, default=64, help="with --suite (default %(default)s)")
    parser.add_argument("--dtype", choices=environment.DTYPES, default="bf16", help="with --suite (default %(default)s)")
    parser.add_argument("--mode", choices=peers.MODES, default="train", help="with --suite (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="with --suite: leave out what the output has lines of")
    parser.add_argument("--output", type=Path, default=Path("profile.md"), help="default %(default)s")
    options = parser.parse_args(argv)
    device = environment.default_device()
    if bool(options.files) == bool(options.suite):
        parser.error("FILE: expected result files or --suite, one of them")
    if options.suite:
        return _write_sequences(options, device)
    documents = [document for document in map(results.load, options.files) if document["device"] == device.type]
    if not documents:
        print(f"error: no result file of a {device.type}", file=sys.stderr)
        return 2
    options.output.write_text(page(documents, device, options.worst))
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
