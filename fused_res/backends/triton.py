"""Triton kernels, from `fused_res.kernels`: NVIDIA GPUs of compute capability 8.0 and later, or Triton's CPU interpreter."""

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fused_res.geometry import Geometry
from fused_res.spec import ConvBN

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KERNELS = {
    "conv_fprop": "conv_fprop",
    "conv_dgrad": "conv_dgrad",
    "conv_wgrad": "conv_wgrad",
    "masked_add": "masked_add",
    "move_statistics": "move_statistics",
    "multiplied": "operands",
    "moments": "moments",
    "moments_finalize": "moments_finalize",
    "pointwise_direct_stats": "pointwise_direct",
    "pointwise_direct_sums": "pointwise_direct",
    "pointwise_tail": "pointwise_tail",
    "pointwise_tail_backward_reduce": "pointwise_tail_backward",
    "pointwise_tail_backward_finalize": "pointwise_tail_backward_finalize",
    "pointwise_tail_backward_apply": "pointwise_tail_backward",
    "scaled_weight": "pointwise_tail_backward_finalize",
    "bn_stats": "bn_stats",
    "bn_finalize": "bn_finalize",
    "bn_running": "bn_finalize",
    "bn_act": "bn_act",
    "bn_act_backward_reduce": "bn_act_backward",
    "bn_act_backward_finalize": "bn_act_backward",
    "bn_act_backward_apply": "bn_act_backward",
}


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _is_installed():
        return "the package triton is not installed"
    if dtype not in _DTYPES:
        return f"takes float32, float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    if _interpreting():
        return None if device.type == "cpu" else "the interpreter (TRITON_INTERPRET=1) takes CPU tensors"
    return _gpu_reason(device)


@functools.cache
def _gpu_reason(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, got a tensor on {device.type}"
    if not torch.cuda.is_available():
        return "there is no GPU here that torch can use"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or later, this GPU has {capability[0]}.{capability[1]}"
    return None


def preference(device: torch.device) -> int:
    return 3 if device.type == "cuda" else 0


def level(device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str:
    """What was measured to be fastest on an H200, training the blocks of ResNet-50 in bfloat16 at batch 256.

    The moment form is where a last 1x1 convolution has so few input channels, and so many pixels, that memory binds it. Elsewhere
    the library's convolutions with everything between them fused are faster.
    """
    channels, width, *kernel = geometry.main[-1].weight
    narrow = dtype.itemsize == 2 and kernel == [1, 1] and width <= 64 and channels >= 4 * width
    return "moment" if narrow and geometry.training and geometry.pixels is not None and geometry.pixels >= 2**18 else "bn_act"


def pays(primitive: str, unit: ConvBN, pixels: int) -> bool:
    """Whether a convolution with something fused into it runs in our kernel: 1x1 ones, which are bound by memory.

    Measured on an H200 in bfloat16: a 3x3 of the library's and the passes that it leaves take less time than ours with both
    fused, and so does the gradient of all but the smallest weights.
    """
    channels, width, *kernel = unit.weight.shape
    return kernel == [1, 1] and (primitive != "conv_wgrad" or channels * width <= 64 * 64)


def tiles(primitive: str, weight: Tensor, pixels: int, operands: tuple) -> list[tuple]:
    """The tiles worth trying for a convolution: weight [K, C, R, S] on the device, pixels of its result (for conv_wgrad, of dy),
    and the arguments of its kernel's launcher, less the unit.
    """
    tiling, direction = importlib.import_module("fused_res.kernels.conv_tiling"), primitive.removeprefix("conv_")
    able = tiling.configurations(direction, weight.dtype, pixels, tuple(weight.shape))
    return list(tiling.fitting(direction, able, weight, *operands[: 2 if direction == "wgrad" else 1]))


def tile(*numbers: int) -> tuple:
    """One of `tiles`."""
    return importlib.import_module("fused_res.kernels.conv_tiling").Config(*numbers)


def watching(call: Callable) -> AbstractContextManager:
    return _launching().watching(call)


def observed() -> bool:
    return _launching().is_hooked()


@functools.cache
def _launching() -> types.ModuleType:
    return importlib.import_module("fused_res.kernels.launching")


@functools.cache
def find(primitive: str, device: torch.device) -> Callable | None:
    stem = _KERNELS.get(primitive)
    return getattr(importlib.import_module(f"fused_res.kernels.{stem}"), primitive) if stem else None
