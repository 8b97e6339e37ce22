"""A step of a block on a GPU on paper: the least time that its bytes and FLOPs allow, and the time that is to be expected.

    least = sum over passes of max(bytes / bandwidth, FLOPs / peak)

with what `traffic` says a level moves and multiplies and the published peaks, which no implementation reaches. What is to be
expected is `fused_res.cost.predict`'s: every kernel that a step launches now, as it is recorded without a GPU, with its
instructions, its launch, and the share of the peaks that such kernels reach. Eager, a compiler that fuses BN with its neighbours
and the bare convolutions are the passes of `traffic` at their own shares.
"""

import importlib.util
import statistics
from collections.abc import Sequence

import torch

from fused_res.benchmarks import report, traffic
from fused_res.benchmarks.cases import NETWORKS, SUITES, Case, occurrences
from fused_res.benchmarks.peers import BARE, is_ours
from fused_res.benchmarks.results import device_name
from fused_res.console import UsageError, table, wrapped
from fused_res.cost import constants
from fused_res.cost import predict as cost
from fused_res.cost.constants import GPUS, SLOTS, Gpu
from fused_res.cost.recorded import Step, steps

ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHOWN = ("A100", "H100", "H200", "B200")
"""The GPUs that are shown where none is asked for."""
BEST = "best level"
"""The way of the rows of a whole network that has every block at the level that is to take the least time."""


def least(case: Case, way: str, mode: str, batch: int, dtype: str, gpu: Gpu) -> float:
    """The least time of a step on a GPU, pass by pass."""
    costs = (traffic.cost(found, batch, ITEMSIZES[dtype]) for found in traffic.passes(case, way, mode))
    return sum(max(cost.bytes / gpu.bandwidth, cost.flops / gpu.peak(dtype)) for cost in costs)


def expected(case: Case, way: str, mode: str, batch: int, dtype: str, gpu: Gpu, counts: cost.Counts = SLOTS) -> list[float]:
    """The time of each kernel of a step that is to be expected on a GPU with a full queue, its launch included.

    counts: instructions of the kernels with a matrix product.

    Raises:
        UsageError: a level without Triton, whose kernels it is made of.
    """
    if way in traffic.LEVELS:
        if importlib.util.find_spec("triton") is None:
            raise UsageError("the levels' kernels are Triton's, which is not installed")
        found = steps(case.geometry(batch, mode != "eval"), way, DTYPES[dtype], gpu.capability, mode == "train")
        running = [Step("move_statistics", 0.0)] if mode != "eval" else []
        return [cost.seconds(step, DTYPES[dtype], gpu, counts) for step in (*found, *running)]
    share = {"eager": constants.EAGER, "fused BN": constants.COMPILER}.get(way, constants.STREAM)
    times = []
    for found in traffic.passes(case, way, mode):
        moved = traffic.cost(found, batch, ITEMSIZES[dtype])
        if found.flops:
            times.append(cost.seconds(Step("library", moved.bytes, 0.0, moved.flops / 2), DTYPES[dtype], gpu))
        else:
            times.append(constants.LAUNCH + max(constants.SMALL, moved.bytes / (share * gpu.bandwidth)))
    return times


def _way(peer: str, backend: str | None) -> str | None:
    """Which of `traffic.WAYS` a measured peer is, if any."""
    if peer == BARE:
        return "bare"
    way = "fused BN" if backend == "inductor" else (backend or "").split(", ")[-1]
    return way if way in traffic.WAYS and (is_ours(peer) or way in ("eager", "fused BN")) else None


def measured(documents: Sequence[dict]) -> dict[tuple, list[tuple[str, float]]]:
    """By case, batch, dtype, mode and way: device and milliseconds of what was measured."""
    found: dict[tuple, list[tuple[str, float]]] = {}
    for document in documents:
        for key, peers in report.measured(document):
            for name, row in report.ran(peers).items():
                way = _way(name, row["backend"])
                if way is not None:
                    found.setdefault((*key, way), []).append((device_name(document), row["ms"]["median"]))
    return found


def predict(
    suite: str,
    mode: str,
    batch: int,
    dtype: str,
    gpus: Sequence[str] = SHOWN,
    documents: Sequence[dict] = (),
    at_least: bool = False,
) -> list[dict]:
    """A row for each case of a suite and way to run it, and, for a suite that is a network, for all its blocks together.

    `bytes` and `flops` are of one step; `ms` by GPU is to be expected, with so many `launches` on the first one, or with `at_least`
    the least that bytes and FLOPs allow; `measured` are pairs of device and milliseconds.

    Raises:
        ValueError: a suite of whole networks, which the model does not cover.
    """
    cases = SUITES[suite]
    if any(case.is_network for case in cases):
        raise ValueError(f"suite: the model is of single blocks, got {suite}")
    known, rows = measured(documents), []
    for case in cases:
        for way in ("bare", *traffic.WAYS):
            moved = traffic.total(case, way, mode, batch, ITEMSIZES[dtype])
            step = case, way, mode, batch, dtype
            times = {name: [least(*step, GPUS[name])] if at_least else expected(*step, GPUS[name]) for name in gpus}
            predicted = {name: 1e3 * sum(found) for name, found in times.items()}
            head = {"case": case.name, "batch": batch, "dtype": dtype, "mode": mode, "way": way}
            seen = known.get((case.name, batch, dtype, mode, way), [])
            launches = None if at_least else len(times[gpus[0]])
            figures = {"bytes": moved.bytes, "flops": moved.flops, "launches": launches, "ms": predicted, "at_least": at_least}
            rows.append(head | figures | {"measured": seen})
    if suite in NETWORKS:
        rows += _together(suite, rows)
    return rows


def _together(network: str, rows: list[dict]) -> list[dict]:
    """All residual blocks of a network, each as often as it occurs; and once more each at the level that takes the least time."""
    counts = {case.name: count for case, count in occurrences(network).items()}
    found = []
    for way in ("bare", *traffic.WAYS):
        of_way = [row for row in rows if row["way"] == way]
        head = of_way[0] | {"case": f"all {sum(counts.values())} blocks", "measured": []}
        summed = ("bytes", "flops") if rows[0]["at_least"] else ("bytes", "flops", "launches")
        sums = {name: sum(counts[row["case"]] * row[name] for row in of_way) for name in summed}
        found.append(head | sums | {"ms": {gpu: sum(counts[row["case"]] * row["ms"][gpu] for row in of_way) for gpu in head["ms"]}})
    if rows[0]["at_least"]:
        return found
    best = {gpu: sum(counts[row["case"]] * row["ms"][gpu] for row in of_gpu) for gpu, of_gpu in best_levels(rows).items()}
    return [*found, found[-1] | {"way": BEST, "bytes": None, "flops": None, "launches": None, "ms": best}]


def best_levels(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """By GPU, of every case the row of the level that is to take the least time there."""
    cases = list(dict.fromkeys(row["case"] for row in rows if row["way"] in traffic.LEVELS))
    levels = {case: [row for row in rows if row["case"] == case and row["way"] in traffic.LEVELS] for case in cases}
    return {gpu: [min(levels[case], key=lambda row: row["ms"][gpu]) for case in cases] for gpu in rows[0]["ms"]}


def _lines(rows: Sequence[dict], counts: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines; `counts`: with the launches, for which a terminal has no room."""
    gpus = list(rows[0]["ms"])
    counted = ["launches"] if counts and not rows[0]["at_least"] else []
    head = ["block", "runs as", "MB/image", "x eager", "GFLOP/image", *counted, *(f"{gpu} ms" for gpu in gpus), "measured ms"]
    eager = {row["case"]: row["bytes"] for row in rows if row["way"] == "eager"}
    lines = []
    for row in rows:
        seen = "; ".join(f"{ms:.3g} on {device}" for device, ms in row["measured"])
        per_image = ["", "", ""]
        if row["bytes"] is not None:
            moved, flops = (row[name] / row["batch"] for name in ("bytes", "flops"))
            per_image = [f"{moved / 1e6:.2f}", f"{eager[row['case']] / row['bytes']:.2f}", f"{flops / 1e9:.2f}"]
        times = [f"{row['ms'][gpu]:.3f}" for gpu in gpus]
        launches = ["" if row[name] is None else str(row[name]) for name in counted]
        lines.append([row["case"], row["way"], *per_image, *launches, *times, seen])
    return head, lines


def caption(rows: Sequence[dict]) -> str:
    """What the figures are and are not, and where the peaks come from."""
    dtype, batch, mode = (rows[0][name] for name in ("dtype", "batch", "mode"))
    if rows[0]["at_least"]:
        how = (
            f"the least time of a step ({mode}, {dtype}, batch {batch}) at published dense peaks, the sum over kernels of the "
            "longer of bytes / bandwidth and FLOPs / peak"
        )
    else:
        how = (
            f"the time of a step ({mode}, {dtype}, batch {batch}) on the GPU with a full queue, the sum over the kernels that it "
            "launches now of a launch and the longest of bytes / bandwidth, instructions / issue slots and FLOPs / peak, at the "
            "shares of these that were measured on an H200 (fused_res/cost/constants.py)"
        )
    peaks = "; ".join(
        f"{name}: {GPUS[name].peak(dtype) / 1e12:g} TFLOP/s, {GPUS[name].bandwidth / 1e12:g} TB/s ({GPUS[name].source})"
        for name in rows[0]["ms"]
    )
    return (
        f"Predicted, not measured: {how}. MB and FLOPs are those of a step over its images, as a level is designed, weights "
        f"included. bare: the convolutions alone; fused BN: BN one with its ReLU or addition, as a compiler does it; below them "
        f"the levels of fused_res. Peaks: {peaks}."
    )


def text(rows: Sequence[dict]) -> str:
    head, lines = _lines(rows, counts=False)
    seen = any(line[-1] for line in lines)
    lines = lines if seen else [line[:-1] for line in lines]
    paragraphs = [table(head if seen else head[:-1], lines, shared=1), wrapped(caption(rows))]
    return "\n\n".join(paragraphs if rows[0]["at_least"] else [*paragraphs, wrapped(_chosen(rows))])


def _chosen(rows: Sequence[dict]) -> str:
    """Which level is to take the least time where, and how that compares with fused BN."""
    found = []
    for gpu, best in best_levels([row for row in rows if " blocks" not in row["case"]]).items():
        fused = {row["case"]: row["ms"][gpu] for row in rows if row["way"] == "fused BN"}
        levels = ", ".join(f"{row['case']} {row['way']} ({row['ms'][gpu] / fused[row['case']]:.2f} of fused BN)" for row in best)
        found.append(f"{gpu}: {levels}")
    return f"The level that is to take the least time. {'; '.join(found)}."


def markdown(suite: str, rows: Sequence[dict]) -> str:
    """The last group of rows, all blocks of a network together, as documents show them."""
    together = [row for row in rows if row["case"] == rows[-1]["case"]]
    head, lines = _lines(together, counts=True)
    chosen = slice(1, -1)
    found = [f"| {' | '.join(head[chosen])} |", "| --- |" + " ---: |" * (len(head[chosen]) - 1)]
    found += [f"| {' | '.join(line[chosen])} |" for line in lines]
    said = caption(together) + ("" if rows[0]["at_least"] else " launches: how many a step has, on the first of these GPUs.")
    return "\n".join([f"Predicted for {rows[-1]['case']} of {suite}:", "", *found, "", said])


def beside(document: dict, gpu: str, counts: cost.Counts = SLOTS) -> list[dict]:
    """For every case of a result file and way that the model knows: `predicted` and `measured` milliseconds of a step.

    counts: instructions of the kernels that were measured, where they are others than those of now.
    """
    cases = {case.name: case for suite in SUITES.values() for case in suite}
    rows = []
    for (name, batch, dtype, mode, way), values in measured([document]).items():
        predicted = 1e3 * sum(expected(cases[name], way, mode, batch, dtype, GPUS[gpu], counts))
        row = {"case": name, "way": way, "batch": batch, "dtype": dtype, "mode": mode}
        rows.append(row | {"predicted": predicted, "measured": statistics.median(ms for _, ms in values)})
    return rows


def beside_markdown(document: dict, gpu: str, counts: cost.Counts = SLOTS) -> str:
    """The same as a table, and how far the one is from the other."""
    found = ["| block | runs as | predicted ms | measured ms | predicted / measured |", "| --- | --- | ---: | ---: | ---: |"]
    rows, ratios = beside(document, gpu, counts), []
    for row in rows:
        ratios.append(row["predicted"] / row["measured"])
        times = f"{row['predicted']:.3f} | {row['measured']:.3f} | {ratios[-1]:.2f}"
        found.append(f"| {row['case']} | {row['way']} | {times} |")
    spread = f"From {min(ratios):.2f} to {max(ratios):.2f} of what was measured; median {statistics.median(ratios):.2f}."
    return "\n".join([*found, "", spread])
