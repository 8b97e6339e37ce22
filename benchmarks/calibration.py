"""`python -m fused_res.benchmarks.calibration`: the efficiencies of `fused_res.cost.constants`, from what a GPU was measured to do.

Every kernel of ours in `sequences.jsonl`, one after another as a step launched them, is held against the step as it is recorded
without a GPU: the same kernel, its bytes, and its instructions as they were counted of it (`loops.csv` beside that file). Kernels
that the step of then launched and that of now does not, or the other way round, are left out. What no single kernel shows is fitted
to whole blocks: the library's convolutions, which are known by names of cuDNN's, eager's and torch.compile's passes, and the merges
of partial results, of which tiles of then left others than those of now (`merges.csv` beside the others has their bytes).
"""

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fused_res.benchmarks import loops, report, traffic
from fused_res.benchmarks.cases import SUITES, Case
from fused_res.benchmarks.results import load
from fused_res.block.levels import LEVELS
from fused_res.console import table
from fused_res.cost import constants
from fused_res.cost.constants import GPUS, Slots
from fused_res.cost.predict import MERGES, Counts, instructions, seconds
from fused_res.cost.recorded import Step, steps


def counts(folder: Path) -> dict[str, dict[int, Slots]]:
    """Instructions of the kernels that were measured, from the lines that `fused_res.benchmarks.loops` counted of them."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for line in loops.read(folder / "loops.csv"):
        found.setdefault((line.kernel, line.arch), []).append((line.per_result, line.per_mac))
    slots: dict[str, dict[int, Slots]] = {}
    for (kind, arch), numbers in found.items():
        slots.setdefault(kind, {})[arch] = Slots(*(statistics.median(part) for part in zip(*numbers, strict=True)))
    return slots


GPU, BATCH, DTYPE = GPUS["H200"], 256, torch.bfloat16
FOLDER = Path("benchmarks/results/gpu/nvidia-h200")
_LONG = 15.0
"""Microseconds from which on a kernel tells a rate."""
_LITTLE = 2e6
"""Bytes up to which a kernel tells what a kernel takes that has next to nothing to do."""
_SHARES = [n / 100 for n in range(1, 101)]
_CUT = 38
"""Letters that a file keeps of a kernel's name, at least."""


class Seen(NamedTuple):
    """A kernel of a step as it is recorded, and how many microseconds it took."""

    case: str
    level: str
    step: Step
    us: float


def sequences(folder: Path) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """By case and peer: names and microseconds of the kernels of a step."""
    rows = [json.loads(line) for line in (folder / "sequences.jsonl").read_text().splitlines()]
    return {(row["case"], row["peer"]): [tuple(kernel) for kernel in row["kernels"]] for row in rows if "kernels" in row}


def ours(found: dict[tuple[str, str], list[tuple[str, float]]]) -> Iterator[Seen]:
    """Our kernels that were launched as often as they are now."""
    for case in SUITES["resnet50"]:
        for level in LEVELS:
            recorded, measured = steps(case.geometry(BATCH), level, DTYPE, GPU.capability), found[case.name, f"fused_res {level}"]
            names = dict.fromkeys(step.kind.split()[0] for step in recorded if step.kind not in ("library", "torch"))
            here = {name: [step for step in recorded if step.kind.split()[0] == name] for name in (*names, "conv_wgrad_partial")}
            there = {name: [us for kernel, us in measured if _is(kernel, f"{name}_kernel")] for name in here}
            for name in names:
                # Where wgrad computed the gradient itself, dgrad did so, too: another variant than that of now.
                same = len(here["conv_wgrad_partial"]) == len(there["conv_wgrad_partial"]) or name != "conv_dgrad"
                if same and len(here[name]) == len(there[name]):
                    yield from (Seen(case.name, level, step, us) for step, us in zip(here[name], there[name], strict=True))


def _is(shown: str, name: str) -> bool:
    """Whether a name in a file, which may be cut, is of this kernel."""
    return shown == name or (len(shown) >= _CUT and name.startswith(shown))


def _products(seen: Sequence[Seen], counted: Counts) -> dict[str, float]:
    """Shares of bandwidth, peak and issue slots with which the longest of the three comes nearest to what was measured."""
    found = {"PRODUCT_STREAM": 0.8, "PRODUCT_PEAK": 0.4, "ISSUE": 0.4}
    whole = []
    for kernel in seen:
        issued = instructions(kernel.step, GPU, counted)
        bound = kernel.step.bytes / GPU.bandwidth, 2 * kernel.step.macs / GPU.half, issued / GPU.slots
        whole.append((dict(zip(found, bound, strict=True)), 1e-6 * kernel.us))
    for name in list(found) * 3:

        def error(share: float, name: str = name) -> float:
            shares = found | {name: share}
            return sum(abs(math.log(max(bound[n] / shares[n] for n in shares) / us)) for bound, us in whole)

        found[name] = min(_SHARES, key=error)
    return found


def _library(found: dict[tuple[str, str], list[tuple[str, float]]]) -> dict[str, float]:
    """Shares of bandwidth and peak of the bare convolutions, over all of a block's."""
    blocks = []
    for case in SUITES["resnet50"]:
        costs = [traffic.cost(conv, BATCH, 2) for conv in traffic.passes(case, "bare", "train")]
        us = sum(us for _, us in found[case.name, "bare convolutions"])
        blocks.append(([(cost.bytes / GPU.bandwidth, cost.flops / GPU.half) for cost in costs], 1e-6 * us))

    def error(shares: tuple[float, float]) -> float:
        return sum(math.log(sum(max(b / shares[0], f / shares[1]) for b, f in costs) / us) ** 2 for costs, us in blocks)

    return dict(zip(("LIBRARY_STREAM", "LIBRARY_PEAK"), min(itertools.product(_SHARES, _SHARES), key=error), strict=True))


def _others(case: Case, way: str) -> float:
    """Seconds that the passes without a product of eager or of fused BN take at the published bandwidth."""
    moved = (traffic.cost(found, BATCH, 2) for found in traffic.passes(case, way, "train") if not found.flops)
    return sum(cost.bytes for cost in moved) / GPU.bandwidth


def blocks(folder: Path) -> dict[tuple[str, str], float]:
    """Seconds of whole steps, by case and peer."""
    document = load(folder / "resnet50-train-bf16.jsonl")
    rows = {key: report.ran(peers) for key, peers in report.measured(document)}
    return {(key[0], name): 1e-3 * row["ms"]["median"] for key, peers in rows.items() for name, row in peers.items()}


def _merges(folder: Path, measured: dict[tuple[str, str], float], counted: Counts) -> float:
    """The share of the bandwidth of merges with which level `moment` takes what it was measured to take."""
    with (folder / "merges.csv").open(newline="") as file:
        moved = [(row["case"], float(row["bytes"])) for row in csv.DictReader(file)]
    parts = []
    for case in (case for case in SUITES["resnet50"] if (case.name, "fused_res moment") in measured):
        recorded = steps(case.geometry(BATCH), "moment", DTYPE, GPU.capability)
        merges = [size / GPU.bandwidth for name, size in moved if name == case.name]
        rest = sum(seconds(step, DTYPE, GPU, counted) for step in recorded if step.kind not in MERGES) + constants.LAUNCH * len(
            merges
        )
        parts.append((rest, merges, measured[case.name, "fused_res moment"]))

    def error(share: float) -> float:
        return sum(
            abs(math.log((rest + sum(max(b / share, constants.SMALL) for b in merges)) / whole)) for rest, merges, whole in parts
        )

    return min(_SHARES, key=error)


def derived(folder: Path = FOLDER) -> dict[str, float]:
    """What the files say of every constant."""
    found, whole, counted = sequences(folder), blocks(folder), counts(folder)
    kernels = list(ours(found))
    products = [kernel for kernel in kernels if kernel.step.macs]
    passes = [kernel for kernel in kernels if not kernel.step.macs and kernel.step.kind not in MERGES]
    long = [kernel for kernel in passes if kernel.us > _LONG and kernel.step.bytes > _LITTLE]
    gaps = [
        (seconds - 1e-6 * sum(us for _, us in found[case, peer])) / len(found[case, peer])
        for (case, peer), seconds in whole.items()
        if peer in ("eager channels_last", "bare convolutions")
    ]
    cases = SUITES["resnet50"]

    def spent(case: Case, peer: str) -> float:
        return 1e-6 * sum(us for _, us in found[case.name, peer])

    eager = [_others(case, "eager") / (spent(case, "eager channels_last") - spent(case, "bare convolutions")) for case in cases]
    compiled = [
        _others(case, "fused BN") / (whole[case.name, "torch.compile"] - whole[case.name, "bare convolutions"])
        for case in cases
        if (case.name, "torch.compile") in whole
    ]
    return {
        "LAUNCH": statistics.median(gaps),
        "SMALL": 1e-6 * statistics.median(kernel.us for kernel in passes if kernel.step.bytes < _LITTLE),
        "STREAM": sum(1e6 * kernel.step.bytes / GPU.bandwidth for kernel in long) / sum(kernel.us for kernel in long),
        "EAGER": statistics.median(eager),
        "COMPILER": statistics.median(compiled),
        **_library(found),
        **_products(products, counted),
        "MERGE": _merges(folder, whole, counted),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_res.benchmarks.calibration", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, help="the folder of the result files")
    options = parser.parse_args(arguments)
    rows = [[name, f"{getattr(constants, name):.3g}", f"{value:.3g}"] for name, value in derived(options.results).items()]
    print(table(["constant", "is", "by these files"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
