"""Compiled kernels: C++ on CPUs, CUDA C++ on NVIDIA GPUs, from the library that csrc/ is built into.

The library is loaded when this backend is first asked for. FUSED_RES_NATIVE=0 in the environment leaves it alone.
"""

import ctypes
import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fused_res.geometry import Convolution, Geometry
from fused_res.spec import ConvBN
from fused_res.version import __version__

FILE = Path(__file__).parents[1] / "_native.so"
RECORD = FILE.with_suffix(".json")
PRIMITIVES = (
    "bn_stats",
    "bn_finalize",
    "bn_act",
    "bn_act_backward_reduce",
    "bn_act_backward_finalize",
    "bn_act_backward_apply",
)
_CONVOLUTIONS = ("conv_fprop", "conv_dgrad", "conv_wgrad")
_CALLS = (
    "masked_add",
    "move_statistics",
    "moments",
    "moments_finalize",
    "pointwise_tail",
    "pointwise_tail_backward_reduce",
    "pointwise_tail_backward_finalize",
    "pointwise_tail_backward_apply",
    "conv_bn_act",
    "unfolded_bn_act",
    "onednn_bn_act",
    *_CONVOLUTIONS,
)
# Which CPUs have beside them, called as they are.
_ON_CPU = (
    *("bn_stats_finalize", "bn_stats_act", "bn_act_backward"),
    *("im2col", "col2im", "max_pool", "unfolded_fprop", "folded_dgrad", "unfolded_wgrad"),
)
# Which of these have CUDA kernels.
CUDA_CALLS = (
    *("masked_add", "move_statistics", "multiplied", "scaled_weight", "moments", "moments_finalize", "pointwise_tail"),
    *("pointwise_tail_backward_reduce", "pointwise_tail_backward_finalize", "pointwise_tail_backward_apply", "conv_fprop"),
)
# Which of these multiply in tensor cores, with instructions of compute capability 8.0.
_MULTIPLYING = (*("moments", "pointwise_tail", "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply", "conv_fprop"),)
_FUNCTIONAL = (
    *PRIMITIVES,
    *_ON_CPU,
    "moments",
    "moments_finalize",
    "pointwise_tail",
    "pointwise_tail_backward_reduce",
    "pointwise_tail_backward_finalize",
    "pointwise_fprop",
    "pointwise_dgrad",
    "pointwise_wgrad",
    "winograd_fprop",
    "winograd_dgrad",
    "winograd_wgrad",
    "winograd_prepare",
    "winograd_bn_act",
    "pointwise_prepare",
    "pointwise_bn_act",
    "unfolded_bn_act",
    "onednn_bn_act",
)
# Of those that have no CPU kernels.
_FUNCTIONAL_ON_GPU = ("moments_finalize_direct", "scaled_weight", "pointwise_tail_backward_finalize_direct")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


_NEVER_BUILT = (
    f"it was never built in this source folder, {FILE.parent}; `pip install --editable .` builds it there, and after "
    "`pip install .`, Python started elsewhere, or with -P, imports what was installed"
)


@functools.cache
def record() -> dict:
    """What the library was built from and for; empty where this installation never tried to build one."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def missing() -> str | None:
    """Why there is no library to load, or None where there is one."""
    if os.environ.get("FUSED_RES_NATIVE") == "0":
        return "switched off by FUSED_RES_NATIVE=0"
    if FILE.is_file():
        return None
    return f"the compiled library is missing: {record().get('missing', _NEVER_BUILT)}"


def _refuse_gradient(ctx, *incoming):
    raise NotImplementedError("fused_res's primitives have no gradient of their own: call fused_res.residual_block")


@functools.cache
def load() -> None:
    """Load the library, once.

    Raises:
        RuntimeError: if it is missing, with the reason, or cannot be loaded, with the versions that matter.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"backend 'native': {reason}")
    try:
        torch.ops.load_library(FILE)
    except (OSError, RuntimeError) as error:
        built = record()
        raise RuntimeError(
            f"fused_res {__version__}: cannot load {FILE}, built with torch {built.get('torch')}, "
            f"CUDA {built.get('cuda')}, for {built.get('machine')}; here is torch {torch.__version__}, "
            f"CUDA {torch.version.cuda}. Reinstall fused_res, or set FUSED_RES_NATIVE=0 to do without. The loader says: {error}"
        ) from error
    for operator in (*_FUNCTIONAL, *(_FUNCTIONAL_ON_GPU if record().get("cuda_archs") else ())):
        torch.library.register_autograd(f"fused_res::{operator}", _refuse_gradient)


@functools.cache
def _functions() -> ctypes.CDLL:
    """What the library has beside its operators, which no mode sees called."""
    load()
    library = ctypes.CDLL(FILE)
    library.fused_res_free_program.argtypes, library.fused_res_free_program.restype = [ctypes.c_int64], None
    library.fused_res_has_kernel.argtypes, library.fused_res_has_kernel.restype = [ctypes.c_char_p], ctypes.c_bool
    library.fused_res_has_onednn.argtypes, library.fused_res_has_onednn.restype = [], ctypes.c_bool
    return library


def free_program(number: int) -> None:
    """Let go of a program that `fused_res::make_program` has made."""
    _functions().fused_res_free_program(number)


def has_kernel(name: str) -> bool:
    """Whether a program can call this operator's CPU kernel."""
    return _functions().fused_res_has_kernel(name.encode())


def has_onednn() -> bool:
    """Whether this torch has oneDNN's convolutions where the library looks for them."""
    return _functions().fused_res_has_onednn()


@functools.cache
def loads() -> bool:
    """Whether there is a library that can be loaded; it is loaded then."""
    try:
        load()
    except RuntimeError:
        return False
    return True


def _runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for one of these architectures: of its own major version and no later, or PTX no later."""

    def runs(arch: str) -> bool:
        number = arch.removesuffix("+PTX")
        major, minor = (int(digits) for digits in number.rstrip("af").split("."))
        if number[-1] in "af":
            return (major, minor) == capability
        same = major == capability[0] and minor <= capability[1]
        return same or (arch.endswith("+PTX") and (major, minor) <= capability)

    return any(runs(arch) for arch in archs)


@functools.cache
def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"takes float32, float16, bfloat16 and float64, got {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip):
        return f"needs a CPU or an NVIDIA GPU, got a tensor on {device.type}"
    if device.type == "cuda" and dtype == torch.float64:
        return "takes float64 on the CPU only"
    reason = missing()
    if reason is not None:
        return reason
    load()
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU here that torch can use"
        archs = record().get("cuda_archs", [])
        if not archs:
            return "the compiled library has no CUDA kernels: there was no nvcc when it was built, or FUSED_RES_CUDA=0"
        capability = torch.cuda.get_device_capability(device)
        if not _runs_on(archs, capability):
            return (
                f"the compiled library is for compute capability {', '.join(archs)}, this GPU has {capability[0]}.{capability[1]}"
            )
    return None


def preference(device: torch.device) -> int:
    return 2


def lends(device: torch.device) -> bool:
    """On a GPU: its CUDA kernels are tried beside Triton's."""
    return device.type == "cuda"


def level(device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str:
    """What was measured to be fastest on a CPU, for ResNet's blocks at batch 1 to 128. Nothing has been measured on a GPU yet.

    Our own 1x1 convolutions pay once they save more traffic to memory than they lose to the library's in arithmetic: where there
    are many pixels for the channels. The moment form also multiplies matrices of channels by channels, so it needs more of them
    still, and an output that no cache holds. Our own 3x3 convolutions, F(2x2, 3x3), save arithmetic as well, which pays sooner than
    their transforms cost but for narrow layers; of unknown sizes few pixels are expected.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return "bn_act"
    channels, width, *kernel = geometry.main[-1].weight
    if geometry.pixels is not None and kernel == [1, 1] and width <= 256 and geometry.pixels >= 3000:
        widest = width if geometry.projection is None else max(width, geometry.projection.weight[1])
        out_of_cache = dtype.itemsize * geometry.pixels * channels >= 24 * 2**20
        return "moment" if out_of_cache and widest**2 <= 6 * geometry.pixels else "prologue"
    wide = [unit.weight for unit in geometry.main if _is_filtered(unit) and min(unit.weight[:2]) >= 48]
    pixels = 64 if geometry.pixels is None else geometry.pixels
    return "prologue" if any(_pays(weight, pixels) for weight in wide) else "bn_act"


def evaluation(device: torch.device, dtype: torch.dtype) -> str | None:
    """In evaluation without gradients every convolution is one launch on a weight that is prepared: that is level `epilogue`."""
    return "epilogue" if device.type == "cpu" and dtype != torch.float64 else None


def pays_in_frozen_graph(geometry: Geometry) -> bool:
    """Whether a block in float32 that is evaluated in a graph is faster by its operator, which is a call of Python, than as
    Inductor makes it where it freezes weights: then it prepares the library's convolutions as we do.

    It is where our own 3x3 convolutions have pixels to save time on; measured for ResNet's blocks at batch 1 and 8, with AVX-512.
    Of unknown sizes many pixels are expected.
    """
    filtered = any(_is_filtered(unit) and min(unit.weight[:2]) >= 32 for unit in geometry.main)
    return filtered and (geometry.pixels is None or geometry.pixels >= 256)


def _is_filtered(unit: ConvBN | Convolution) -> bool:
    """Whether the convolution's geometry is that of F(2x2, 3x3)."""
    *_, height, width = unit.weight if isinstance(unit, Convolution) else unit.weight.shape
    plain = tuple(unit.stride) == (1, 1) and tuple(unit.dilation) == (1, 1) and unit.groups == 1
    return (height, width) == (3, 3) and plain and max(unit.padding) <= 2


def _pays(weight: tuple[int, ...], pixels: int) -> bool:
    """Whether what is fused into a convolution, and what F(2x2, 3x3) saves, outweighs the library's products in float32.

    Measured for ResNet's convolutions at batch 1 to 32. Of 1x1 ones the library makes better products where the weight does not
    stay in a cache; filters have to be transformed at every call, which takes pixels to pay for.
    """
    out, channels, *kernel = weight
    return out * channels <= (2**16 if kernel == [1, 1] else 1024 * pixels)


def before_ampere(device: torch.device) -> bool:
    """Whether this is a GPU without the tensor cores that the kernels multiply in."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


@functools.cache
def find(primitive: str, device: torch.device) -> Callable | None:
    if primitive not in {"cpu": PRIMITIVES + _ON_CPU + _CALLS, "cuda": PRIMITIVES + CUDA_CALLS}.get(device.type, ()):
        return None
    if primitive in _MULTIPLYING and before_ampere(device):
        return None
    if primitive == "onednn_bn_act" and not has_onednn():
        return None
    load()
    if primitive in PRIMITIVES + _ON_CPU:
        return getattr(torch.ops.fused_res, primitive).default
    return getattr(importlib.import_module("fused_res.backends._native_calls"), primitive)


def declined(primitive: str, unit: ConvBN, pixels: int) -> str | None:
    """Why the backend's convolution does not run this unit over so many pixels, or None where it does.

    On a CPU it runs 1x1 without padding as one product, going back unstrided only, and unstrided 3x3. On a GPU it runs forward 1x1
    without padding, in tensor cores, which do not multiply float32 as IEEE 754 has it.

    With few pixels BN's gradients are small differences of large sums, and the library's order of summation loses less there. In
    evaluation there are none, but F(2x2, 3x3) computes four pixels at a time.
    """
    weight = unit.weight
    few = pixels <= 16 and not (primitive == "conv_bn_act" and unit.is_pointwise())
    if few or unit.groups != 1:
        return "no kernel"
    if not weight.is_cpu:
        old = before_ampere(weight.device)
        return "no kernel before compute capability 8.0" if old else declined_on_gpu(primitive, unit)
    if weight.dtype not in (torch.float32, torch.float64):
        return "no kernel"
    taken = unit.is_pointwise() and (primitive != "conv_dgrad" or not unit.is_strided())
    return None if taken or _is_filtered(unit) else "no kernel"


def declined_on_gpu(primitive: str, unit: ConvBN) -> str | None:
    """The same of the CUDA kernels, on a GPU that has the instructions."""
    if primitive != "conv_fprop" or not unit.is_pointwise():
        return "no kernel"
    return None if multiplies(unit.weight.dtype) else "no kernel for float32 without TF32"


def formula(primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a step beside convolutions runs by its plain formula on a GPU, or None where it has a kernel, and on a CPU."""
    if device.type != "cuda":
        return None
    if primitive in _MULTIPLYING and before_ampere(device):
        return "no kernel before compute capability 8.0"
    return formula_on_gpu(primitive, dtype)


def formula_on_gpu(primitive: str, dtype: torch.dtype) -> str | None:
    """The same on a GPU that has the instructions."""
    if primitive not in PRIMITIVES + CUDA_CALLS:
        return "no kernel"
    declined = primitive in _MULTIPLYING and not multiplies(dtype)
    return "no kernel for float32 without TF32" if declined else None


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the products on a GPU take this dtype: 16 bits, and float32 where torch's convolutions may round it to TF32."""
    if dtype == torch.float32:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
    return dtype in (torch.float16, torch.bfloat16)


def pays(primitive: str, unit: ConvBN, pixels: int) -> bool:
    """Whether a convolution that it takes, with something fused into it, is no slower than the library's and what that leaves.

    Prepared 3x3 filters need no pixels to pay for their transforms: with 32 channels and more F(2x2, 3x3) was the faster one at
    every size of ResNet's that was measured, at batch 1 and 8, with AVX2 and AVX-512. Prepared 1x1 weights pay with AVX-512, which
    was 0.99 to 1.4 times as fast as the library; with AVX2 they go by the rule for those that are not prepared, but where they make
    more channels than they read, since the library's ReLU is a pass of its own.

    On a GPU nothing has been measured; there it runs 1x1 ones only, which memory binds, and Triton's paid on an H200.
    """
    if not unit.weight.is_cpu:
        return True
    if primitive == "conv_bn_act":
        if _is_filtered(unit):
            return min(unit.weight.shape[:2]) >= 32
        out, channels = unit.weight.shape[:2]
        capability = torch.backends.cpu.get_cpu_capability()
        taken = capability == "AVX512" or (capability == "AVX2" and out > channels)
        return taken or _pays(tuple(unit.weight.shape), pixels)
    return unit.weight.dtype != torch.float32 or _pays(tuple(unit.weight.shape), pixels)
