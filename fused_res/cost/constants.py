"""Everything that the model takes for granted, with its source: mend it here when a count or a measurement says otherwise.

- Peaks are NVIDIA's, dense; a multiprocessor issues 4 instructions of a warp in a cycle.
- Efficiencies were measured on one H200, in bfloat16 at batch 256. `python -m fused_res.benchmarks.calibration` works them out anew
  from `benchmarks/results/gpu/nvidia-h200/`: most from single kernels, LAUNCH, COMPILER and MERGE from whole blocks. A test holds
  these to what it finds. No other GPU has been measured: for them the shares are taken to be the same.
- Instructions are counted in machine code, by Triton 3.7.1: `make loops` writes them into docs/loops.csv, of which a test works
  out these. Other dtypes than bfloat16 are taken to need as many.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Published peaks: 16-bit, TF32 and float64 matrix products [FLOP/s], memory [bytes/s], and where they stand.

    capability: 90 for compute capability 9.0. macs: 16-bit multiply-adds of a multiprocessor's tensor cores in a cycle.
    """

    name: str
    capability: int
    multiprocessors: int
    macs: int
    half: float
    tf32: float
    double: float
    bandwidth: float
    source: str

    def peak(self, dtype: str) -> float:
        """Of "fp32", which is multiplied as TF32, "fp16" or "bf16"."""
        return self.tf32 if dtype == "fp32" else self.half

    @property
    def slots(self) -> float:
        """Instructions of a warp that it can issue in a second, at the clock that its peak is for."""
        return 4 * self.half / (2 * self.macs)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 1024, 312e12, 156e12, 19.5e12, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM"),
        Gpu("H100", 90, 132, 2048, 989.4e12, 494.7e12, 67e12, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM"),
        Gpu("H200", 90, 132, 2048, 989.4e12, 494.7e12, 67e12, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM"),
        Gpu("B200", 100, 148, 4096, 2250e12, 1100e12, 37e12, 8.0e12, "NVIDIA Blackwell architecture technical brief, HGX B200"),
        Gpu("RTX 5090", 120, 170, 256, 209.5e12, 104.8e12, 1.64e12, 1.792e12, "NVIDIA RTX Blackwell GPU architecture, RTX 5090"),
    )
}

LAUNCH = 0.74e-6
"""Seconds between a kernel's end and the next one's beginning, with a full queue."""
SMALL = 3.6e-6
"""Seconds that a kernel takes which has next to nothing to do."""
STREAM = 0.80
"""Share of the bandwidth that our passes without a matrix product reach."""
EAGER = 0.53
"""The same of eager's."""
COMPILER = 0.62
"""The same of torch.compile's."""
LIBRARY_STREAM = 0.73
"""The same of the library's convolutions, where memory binds them."""
LIBRARY_PEAK = 0.64
"""Share of the peak that the library's convolutions reach, where arithmetic binds them."""
PRODUCT_STREAM = 0.79
"""Share of the bandwidth that our passes with a matrix product reach, where memory binds them."""
PRODUCT_PEAK = 0.36
"""Share of the peak that they reach, where arithmetic binds them."""
ISSUE = 0.41
"""Share of the issue slots that they use, where those bind them: of a multiprocessor's few warps often none has anything ready."""
MERGE = 0.06
"""Share of the bandwidth at which partial results of the moment form are merged: they wait for one load after another."""


class Slots(NamedTuple):
    """Instructions of a warp: for each element of a product's result, outside of the loop, and for each multiply-add inside."""

    result: float
    mac: float


_COUNTED = {
    "conv_dgrad": {80: (0.208, 0.00156), 90: (0.162, 0.000496), 100: (0.295, 0.00151), 120: (0.226, 0.00148)},
    "conv_dgrad addend": {80: (0.419, 0.00156), 90: (0.357, 0.000496), 100: (0.498, 0.00151), 120: (0.398, 0.00148)},
    "conv_dgrad prologue": {80: (0.281, 0.0123), 90: (0.269, 0.00623), 100: (0.676, 0.00574), 120: (0.28, 0.0111)},
    "conv_dgrad prologue addend": {80: (0.401, 0.0123), 90: (0.387, 0.00623), 100: (0.783, 0.00596), 120: (0.385, 0.0111)},
    "conv_dgrad scattered": {80: (0.579, 0.00156), 90: (0.475, 0.000511), 100: (0.659, 0.00151), 120: (0.581, 0.0015)},
    "conv_dgrad sums": {80: (0.6, 0.00142), 90: (0.691, 0.00111), 100: (0.749, 0.00121), 120: (0.594, 0.00131)},
    "conv_fprop prologue sums": {80: (0.395, 0.00415), 90: (0.304, 0.00126), 100: (0.47, 0.00253), 120: (0.412, 0.0041)},
    "conv_fprop sums": {80: (0.385, 0.00128), 90: (0.294, 0.000378), 100: (0.4, 0.00117), 120: (0.384, 0.0013)},
    "conv_wgrad_partial prologue": {80: (0.53, 0.0076), 90: (0.579, 0.00733), 100: (1.01, 0.00613), 120: (0.549, 0.00731)},
    "moments": {80: (0.631, 0.00906), 90: (0.493, 0.00443), 100: (0.673, 0.00909), 120: (0.636, 0.00912)},
    "pointwise_tail": {80: (0.61, 0.00334), 90: (0.5, 0.00116), 100: (0.578, 0.00196), 120: (0.615, 0.00338)},
    "pointwise_tail_backward_apply": {80: (0.727, 0.00421), 90: (0.768, 0.00225), 100: (1.13, 0.00261), 120: (0.739, 0.00443)},
    "pointwise_tail_backward_reduce": {80: (0.422, 0.00531), 90: (0.357, 0.00371), 100: (0.601, 0.0051), 120: (0.436, 0.00523)},
}
SLOTS: dict[str, dict[int, Slots]] = {
    kind: {capability: Slots(*numbers) for capability, numbers in found.items()} for kind, found in _COUNTED.items()
}
"""By kind of kernel (`fused_res.cost.recorded.Step`) and capability: medians over the lines of docs/loops.csv."""
