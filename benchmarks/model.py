"""The roofline on paper: what `traffic` says a level moves and multiplies, over the published peaks of GPUs.

    time = sum over passes of max(bytes / bandwidth, flops / peak)

which no implementation reaches: it knows no launches, no caches, no tails, no convolution below its peak. Peaks are dense, per
GPU, from NVIDIA's data sheets, which give the tensor cores' with sparsity, twice as high.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fused_res.benchmarks import report, traffic
from fused_res.benchmarks.cases import NETWORKS, SUITES, Case, occurrences
from fused_res.benchmarks.peers import BARE, is_ours
from fused_res.benchmarks.results import device_name
from fused_res.console import table, wrapped

ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Gpu:
    """Published peaks: 16-bit and TF32 matrix products [FLOP/s], memory [bytes/s], and where they stand."""

    name: str
    half: float
    tf32: float
    bandwidth: float
    source: str

    def peak(self, dtype: str) -> float:
        return self.tf32 if dtype == "fp32" else self.half


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312e12, 156e12, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM"),
        Gpu("H100", 989.4e12, 494.7e12, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM"),
        Gpu("H200", 989.4e12, 494.7e12, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM"),
        Gpu("B200", 2250e12, 1100e12, 8.0e12, "NVIDIA Blackwell architecture technical brief, HGX B200"),
    )
}


def seconds(case: Case, way: str, mode: str, batch: int, dtype: str, gpu: Gpu) -> float:
    """The least time of a step on a GPU, pass by pass."""
    costs = (traffic.cost(found, batch, ITEMSIZES[dtype]) for found in traffic.passes(case, way, mode))
    return sum(max(cost.bytes / gpu.bandwidth, cost.flops / gpu.peak(dtype)) for cost in costs)


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
    suite: str, mode: str, batch: int, dtype: str, gpus: Sequence[str] = tuple(GPUS), documents: Sequence[dict] = ()
) -> list[dict]:
    """A row for each case of a suite and way to run it, and, for a suite that is a network, for all its blocks together.

    `bytes` and `flops` are of one step; `ms` by GPU is predicted; `measured` are pairs of device and milliseconds.

    Raises:
        ValueError: a suite of whole networks, which the model does not cover.
    """
    cases = SUITES[suite]
    if any(case.is_network for case in cases):
        raise ValueError(f"suite: the model is of single blocks, got {suite}")
    known, rows = measured(documents), []
    for case in cases:
        for way in ("bare", *traffic.WAYS):
            cost = traffic.total(case, way, mode, batch, ITEMSIZES[dtype])
            predicted = {name: 1e3 * seconds(case, way, mode, batch, dtype, GPUS[name]) for name in gpus}
            head = {"case": case.name, "batch": batch, "dtype": dtype, "mode": mode, "way": way}
            seen = known.get((case.name, batch, dtype, mode, way), [])
            rows.append(head | {"bytes": cost.bytes, "flops": cost.flops, "ms": predicted, "measured": seen})
    if suite in NETWORKS:
        rows += _together(suite, rows)
    return rows


def _together(network: str, rows: list[dict]) -> list[dict]:
    """All residual blocks of a network, each as often as it occurs."""
    counts = {case.name: count for case, count in occurrences(network).items()}
    found = []
    for way in ("bare", *traffic.WAYS):
        of_way = [(counts[row["case"]], row) for row in rows if row["way"] == way]
        head = of_way[0][1] | {"case": f"all {sum(counts.values())} blocks", "measured": []}
        sums = {name: sum(count * row[name] for count, row in of_way) for name in ("bytes", "flops")}
        predicted = {gpu: sum(count * row["ms"][gpu] for count, row in of_way) for gpu in head["ms"]}
        found.append(head | sums | {"ms": predicted})
    return found


def _lines(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    gpus = list(rows[0]["ms"])
    head = ["block", "runs as", "MB/image", "x eager", "GFLOP/image", *(f"{gpu} ms" for gpu in gpus), "measured ms"]
    eager = {row["case"]: row["bytes"] for row in rows if row["way"] == "eager"}
    lines = []
    for row in rows:
        seen = "; ".join(f"{ms:.3g} on {device}" for device, ms in row["measured"])
        per_image = [f"{row['bytes'] / row['batch'] / 1e6:.2f}", f"{eager[row['case']] / row['bytes']:.2f}"]
        times = [f"{row['ms'][gpu]:.3f}" for gpu in gpus]
        lines.append([row["case"], row["way"], *per_image, f"{row['flops'] / row['batch'] / 1e9:.2f}", *times, seen])
    return head, lines


def caption(rows: Sequence[dict]) -> str:
    """What the figures are and are not, and where the peaks come from."""
    names = list(rows[0]["ms"])
    dtype, batch, mode = (rows[0][name] for name in ("dtype", "batch", "mode"))
    peaks = "; ".join(
        f"{name}: {GPUS[name].peak(dtype) / 1e12:g} TFLOP/s, {GPUS[name].bandwidth / 1e12:g} TB/s ({GPUS[name].source})"
        for name in names
    )
    return (
        f"Predicted, not measured: the least time of a step ({mode}, {dtype}, batch {batch}) at published dense peaks, the sum "
        f"over kernels of the longer of bytes / bandwidth and FLOPs / peak. MB and FLOPs are those of a step over its images, "
        f"weights included. bare: the convolutions alone; fused BN: BN one with its ReLU or addition, as a compiler does it; below "
        f"them the levels of fused_res. Peaks: {peaks}."
    )


def text(rows: Sequence[dict]) -> str:
    head, lines = _lines(rows)
    seen = any(line[-1] for line in lines)
    lines = lines if seen else [line[:-1] for line in lines]
    return f"{table(head if seen else head[:-1], lines, shared=1)}\n\n{wrapped(caption(rows))}"


def markdown(suite: str, rows: Sequence[dict]) -> str:
    """The last group of rows, all blocks of a network together, as README shows them."""
    together = [row for row in rows if row["case"] == rows[-1]["case"]]
    head, lines = _lines(together)
    chosen = slice(1, -1)
    found = [f"| {' | '.join(head[chosen])} |", "| --- |" + " ---: |" * (len(head[chosen]) - 1)]
    found += [f"| {' | '.join(line[chosen])} |" for line in lines]
    return "\n".join([f"Predicted for {rows[-1]['case']} of {suite}:", "", *found, "", caption(rows)])
