"""Times of a block's step on a GPU: for each kernel the longest of what binds it, and what a launch takes.

    time = sum over kernels of launch + max(bytes / bandwidth, instructions / issue slots, FLOPs / peak, a small kernel)

Bandwidth, slots and peak are taken as the shares of the published ones that such kernels have been measured to reach
(`fused_res.cost.constants`).
"""

from collections.abc import Iterable, Mapping

import torch

from fused_res.block.levels import LEVELS, Level
from fused_res.cost import constants
from fused_res.cost.constants import GPUS, SLOTS, Gpu, Slots
from fused_res.cost.recorded import Step, meta_block, steps
from fused_res.geometry import Geometry

Counts = Mapping[str, Mapping[int, Slots]]
MERGES = {"moments_merge", "pointwise_tail_backward_merge", "conv_wgrad_sum"}
GAIN = 0.95
"""Of the first level's time: what another one's must stay under to be chosen. The model is not more exact than that."""


def _peak(gpu: Gpu, dtype: torch.dtype, double: bool) -> float:
    return gpu.double if double else gpu.peak("fp32" if dtype == torch.float32 else "bf16")


def instructions(step: Step, gpu: Gpu, counts: Counts = SLOTS) -> float:
    """What the warps of a kernel with a matrix product issue: as counted of its kind, or of the one that is most like it."""
    kind = step.kind
    while kind not in counts:
        kind = kind.rpartition(" ")[0] if " " in kind else next(found for found in counts if found.startswith(kind))
    slots = counts[kind][gpu.capability]
    return step.results * slots.result + step.macs * slots.mac


def seconds(step: Step, dtype: torch.dtype, gpu: Gpu, counts: Counts = SLOTS) -> float:
    """Time of one kernel, and of its launch. counts: instructions of kernels, those of now or of others that were measured."""
    found = [constants.SMALL]
    if step.macs and step.kind != "library":
        slots = instructions(step, gpu, counts)
        found.append(step.bytes / (constants.PRODUCT_STREAM * gpu.bandwidth))
        found.append(2 * step.macs / (constants.PRODUCT_PEAK * _peak(gpu, dtype, step.double)))
        found.append(slots / (constants.ISSUE * gpu.slots))
    elif step.kind == "library":
        found.append(step.bytes / (constants.LIBRARY_STREAM * gpu.bandwidth))
        found.append(2 * step.macs / (constants.LIBRARY_PEAK * _peak(gpu, dtype, step.double)))
    else:
        share = constants.MERGE if step.kind in MERGES else constants.STREAM
        found.append(step.bytes / (share * gpu.bandwidth))
    return constants.LAUNCH + max(found)


def total(found: Iterable[Step], dtype: torch.dtype, gpu: Gpu, counts: Counts = SLOTS) -> float:
    """Time of a step, its kernels one after another."""
    return sum(seconds(step, dtype, gpu, counts) for step in found)


def level(geometry: Geometry, dtype: torch.dtype, gpu: Gpu, backward_too: bool = True, counts: Counts = SLOTS) -> str:
    """The level that takes the least time, if that is clearly less than the first one's."""
    block, _ = meta_block(geometry, dtype)
    names = list(dict.fromkeys(Level.of(name, block).name for name in LEVELS))
    times = {name: total(steps(geometry, name, dtype, gpu.capability, backward_too), dtype, gpu, counts) for name in names}
    best = min(times, key=times.__getitem__)
    return best if times[best] < GAIN * times[LEVELS[0]] else LEVELS[0]


def nearest(name: str, capability: tuple[int, int] | None = None) -> Gpu | None:
    """The GPU of the table that one of this name is, or the first of its generation; None for a generation without one."""
    named = [gpu for gpu in GPUS.values() if gpu.name in name]
    return (named + [gpu for gpu in GPUS.values() if capability and gpu.capability // 10 == capability[0]] + [None])[0]
