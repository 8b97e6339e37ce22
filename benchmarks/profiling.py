"""`python -m fused_res.benchmarks.profiling FILE…`: where the time goes in the cases in which fused_res does worst against eager.

Each of them is run again, under torch.profiler: fused_res and the faster eager layout, kernel by kernel (on a CPU operator by
operator), as a markdown page.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity

from fused_res import environment
from fused_res.benchmarks import peers, report, results, sums
from fused_res.benchmarks.cases import SUITES
from fused_res.benchmarks.peers import OURS, Setup

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


def kernels(setup: Setup, name: str, steps: int = STEPS) -> list[Kernel]:
    """What a peer's step runs, the longest first.

    Raises:
        RuntimeError: the peer cannot run here.
    """
    peer = peers.make(name, setup)
    if isinstance(peer, str):
        raise RuntimeError(f"{name}: {peer}")
    gpu = setup.device.type == "cuda"
    for i in range(3):
        peer.step(i % setup.sets)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for i in range(steps):
            peer.step(i % setup.sets)
        if gpu:
            torch.cuda.synchronize(setup.device)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.profiling", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="result files; those of another device are left out")
    parser.add_argument("--worst", type=int, default=4, help="how many cases (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("profile.md"), help="default %(default)s")
    options = parser.parse_args(argv)
    device = environment.default_device()
    documents = [document for document in map(results.load, options.files) if document["device"] == device.type]
    if not documents:
        print(f"error: no result file of a {device.type}", file=sys.stderr)
        return 2
    options.output.write_text(page(documents, device, options.worst))
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
