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
    "conv_dgrad": {80: (0.22, 0.0018), 90: (0.169, 0.000648), 100: (0.316, 0.00172), 120: (0.24, 0.00177)},
    "conv_dgrad addend": {80: (0.415, 0.0018), 90: (0.359, 0.000648), 100: (0.531, 0.00172), 120: (0.409, 0.00174)},
    "conv_dgrad prologue": {80: (0.426, 0.0133), 90: (0.412, 0.00885), 100: (0.505, 0.00812), 120: (0.416, 0.0126)},
    "conv_dgrad prologue addend": {80: (0.527, 0.0133), 90: (0.529, 0.00885), 100: (0.484, 0.00824), 120: (0.518, 0.0126)},
    "conv_dgrad scattered": {80: (0.968, 0.00211), 90: (1.04, 0.000919), 100: (1.09, 0.00204), 120: (0.957, 0.00195)},
    "conv_dgrad sums": {80: (0.889, 0.00218), 90: (0.889, 0.00206), 100: (0.97, 0.00227), 120: (0.822, 0.00203)},
    "conv_fprop prologue sums": {80: (0.477, 0.00487), 90: (0.478, 0.00135), 100: (0.183, 0.0025), 120: (0.396, 0.00459)},
    "conv_fprop sums": {80: (0.447, 0.00128), 90: (0.464, 0.000378), 100: (1.22, 0.00117), 120: (0.38, 0.0013)},
    "conv_wgrad_partial prologue": {80: (0.699, 0.00912), 90: (0.669, 0.00898), 100: (0.869, 0.00883), 120: (0.685, 0.00872)},
    "moments": {80: (0.641, 0.0125), 90: (0.477, 0.00659), 100: (0.0327, 0.0128), 120: (0.647, 0.0128)},
    "pointwise_tail": {80: (0.857, 0.00394), 90: (0.557, 0.00127), 100: (0.674, 0.00207), 120: (0.797, 0.00395)},
    "pointwise_tail_backward_apply": {80: (1.09, 0.00453), 90: (0.789, 0.00439), 100: (0.986, 0.00367), 120: (1.06, 0.005)},
    "pointwise_tail_backward_reduce": {80: (0.676, 0.0061), 90: (0.716, 0.00558), 100: (0.617, 0.00581), 120: (0.708, 0.00632)},
}
SLOTS: dict[str, dict[int, Slots]] = {
    kind: {capability: Slots(*numbers) for capability, numbers in found.items()} for kind, found in _COUNTED.items()
}
"""By kind of kernel (`fused_res.cost.recorded.Step`) and capability: medians over the lines of docs/loops.csv."""
