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
    "conv_dgrad": {80: (0.267, 0.00204), 90: (0.211, 0.000851), 100: (0.367, 0.00209), 120: (0.269, 0.00197)},
    "conv_dgrad addend": {80: (0.474, 0.00204), 90: (0.499, 0.000839), 100: (0.583, 0.00204), 120: (0.468, 0.00197)},
    "conv_dgrad prologue": {80: (0.528, 0.0103), 90: (0.525, 0.0104), 100: (0.585, 0.00995), 120: (0.513, 0.00961)},
    "conv_dgrad prologue addend": {80: (0.675, 0.0107), 90: (0.668, 0.0109), 100: (0.585, 0.01), 120: (0.614, 0.00961)},
    "conv_dgrad scattered": {80: (0.968, 0.00211), 90: (1.04, 0.000919), 100: (1.09, 0.00204), 120: (0.957, 0.00195)},
    "conv_dgrad sums": {80: (0.986, 0.00258), 90: (0.987, 0.00249), 100: (1.1, 0.00272), 120: (0.941, 0.0024)},
    "conv_fprop prologue sums": {80: (0.63, 0.00412), 90: (0.62, 0.0028), 100: (0.253, 0.00398), 120: (0.614, 0.00388)},
    "conv_fprop sums": {80: (0.55, 0.0016), 90: (0.578, 0.000668), 100: (1.34, 0.00151), 120: (0.536, 0.00156)},
    "conv_wgrad_partial prologue": {80: (0.699, 0.00912), 90: (0.669, 0.00898), 100: (0.869, 0.00883), 120: (0.685, 0.00872)},
    "moments": {80: (0.641, 0.0125), 90: (0.477, 0.00659), 100: (0.0327, 0.0128), 120: (0.647, 0.0128)},
    "pointwise_tail": {80: (0.992, 0.00435), 90: (0.649, 0.00158), 100: (0.798, 0.00241), 120: (0.912, 0.00436)},
    "pointwise_tail_backward_apply": {80: (1.26, 0.0053), 90: (0.956, 0.00486), 100: (1.17, 0.00439), 120: (1.25, 0.00565)},
    "pointwise_tail_backward_reduce": {80: (0.711, 0.0072), 90: (0.749, 0.00674), 100: (0.686, 0.007), 120: (0.758, 0.00737)},
}
SLOTS: dict[str, dict[int, Slots]] = {
    kind: {capability: Slots(*numbers) for capability, numbers in found.items()} for kind, found in _COUNTED.items()
}
"""By kind of kernel (`fused_res.cost.recorded.Step`) and capability: medians over the lines of docs/loops.csv."""
