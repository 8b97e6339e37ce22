"""The kernels of a block's step on a GPU, as its schedules launch them: they run once, on tensors without data."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_res import settings
from fused_res.aot import SHARED
from fused_res.block.backward import Gradients, backward
from fused_res.block.forward import Saved, forward
from fused_res.block.packing import pack, unpack
from fused_res.geometry import Convolution, Geometry
from fused_res.primitives.choice import switches
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.run import of
from fused_res.spec import Block, ConvBN

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}


class Step(NamedTuple):
    """A kernel of ours, by its name in `kernels/`, or an operation of torch's.

    kind: of a convolution with what is fused into it: "prologue" where it computes what it reads; "sums", "addend" or "scattered",
    an addend at every second pixel or so. bytes: of all that it reads and writes, once.
    results: elements of a matrix product's result, macs: its multiply-adds; 0 without one. double: whether these are float64.
    """

    kind: str
    bytes: float
    results: float = 0.0
    macs: float = 0.0
    double: bool = False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _bytes(*values: Any) -> float:
    return float(sum(tensor.nbytes for tensor in _tensors(values)))


def _product(name: str, found: dict, constants: dict) -> tuple[str, float, float]:
    """Kind, results and multiply-adds of a launch; none but for the kernels with a matrix product."""
    p, c, k = (found.get(size, 0) for size in ("P", "C", "K"))
    taps = constants.get("R", 1) * constants.get("S", 1)
    if name == "conv_fprop":
        words = [name, "prologue" * (found["x"].vectors is not None), "sums" * (found["partials"] is not None)]
        return " ".join(filter(None, words)), p * k, p * k * c * taps
    if name == "conv_dgrad":
        macs = found["dy"].image.numel() * c * taps
        added = (
            "" if found["addend"].image is None else "scattered" if (constants["DOWN"], constants["RIGHT"]) != (1, 1) else "addend"
        )
        words = [name, "prologue" * (found["dy"].coefficients is not None), "sums" * (found["partials"] is not None), added]
        return " ".join(filter(None, words)), found["dx"].numel(), macs
    if name == "conv_wgrad_partial":
        computed = found["dy"].coefficients is not None or found["x"].vectors is not None
        return f"{name} prologue" if computed else name, found["partials"].numel(), p * k * c * taps
    if name == "moments":
        return name, found["products"].numel(), p * k * (k + constants["BLOCK_K"]) / 2
    if name == "pointwise_tail":
        return name, p * c, p * c * (k + (found["K2"] if found["weight2"] is not None else 0))
    if name == "pointwise_tail_backward_reduce":
        return name, found["products"].numel(), p * c * k * (1 if found["through"] is None else 2)
    if name == "pointwise_tail_backward_apply":
        through, quadratic = found["through"] is None, found["quadratic"] is not None
        return name, p * k, p * k * (c * through + k * quadratic)
    return name, 0.0, 0.0


def _read(name: str, found: dict, constants: dict) -> float:
    """Bytes of all arguments; of a sample of the pixels only these, and once more what is read and written."""
    total = _bytes(tuple(found.values()))
    for operand, channels in ((found.get("z"), "K"), (found.get("z2"), "K2")):
        if getattr(operand, "step", None) is not None:
            total += found["P"] * found[channels] * operand.data.element_size() - operand.data.nbytes
    if constants.get("JOINS"):
        total += 2 * found["P"] * found["K"] * found["dz"].element_size() - found["dz"].nbytes
    if name == "masked_add":
        total += 2 * found["image"].nbytes - found["dx"].nbytes
    if name in ("conv_fprop", "conv_wgrad_partial") and constants["R"] * constants["S"] == 1:
        total -= found["x"].image.nbytes * (1 - 1 / (found["g"].stride_h * found["g"].stride_w))
    return float(total)


def of_launch(launch: Any) -> Step:
    """A launch of `fused_res.kernels`."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    found = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    kind, results, macs = _product(name, found, launch.constants)
    return Step(kind, _read(name, found, launch.constants), float(results), float(macs))


class _Library(TorchDispatchMode):
    """Notes what torch itself is asked for."""

    def __init__(self, steps: list) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name == "convolution":
            x, weight = arguments[:2]
            result = result.contiguous(memory_format=torch.channels_last)  # as on a GPU; without data torch does not know
            self.steps.append(Step("library", _bytes(x, weight, result), result.numel(), result.numel() * weight[0].numel()))
        elif name == "convolution_backward":
            dy, x, weight = arguments[:3]
            for wanted, other in zip(arguments[-1][:2], ((dy, weight, x), (dy, x, weight)), strict=True):
                if wanted:
                    self.steps.append(Step("library", _bytes(other), other[-1].numel(), dy.numel() * weight[0].numel()))
        elif name in ("mm", "addmm", "bmm", "matmul", "linear"):
            inner = arguments[-2].shape[-1]
            moved = _bytes(arguments, result)
            self.steps.append(Step("library", moved, result.numel(), result.numel() * inner, result.dtype == torch.float64))
        elif not (function.is_view or name in _FREE):
            self.steps.append(Step("torch", _bytes(arguments, result)))
        return result


def meta_block(geometry: Geometry, dtype: torch.dtype) -> tuple[Block, Tensor]:
    """A block of this geometry, whose `images` are known, and an x for it, without data."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def unit(found: Convolution) -> ConvBN:
        weight = empty(*found.weight, dtype=dtype).contiguous(memory_format=torch.channels_last)
        vectors = [empty(found.weight[0], dtype=statistics_dtype(dtype)) for _ in range(4)]
        steps = {"stride": found.stride, "padding": found.padding, "dilation": found.dilation, "groups": found.groups}
        return ConvBN(weight, None, *vectors, training=found.training, **steps)

    n, h, w = geometry.images
    first = geometry.main[0]
    projection = None if geometry.projection is None else unit(geometry.projection)
    x = empty(n, first.weight[1] * first.groups, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return Block([unit(found) for found in geometry.main], projection, geometry.pool, geometry.given), x


def launches(geometry: Geometry, level: str, dtype: torch.dtype, capability: int, backward_too: bool = True) -> list:
    """What a step of the block launches at a level on such a GPU: `Launch`es of ours, and `Step`s of torch's, in their order.

    Args:
        capability: 90 for compute capability 9.0; of `fused_res.aot.SHARED`, since it says what tiles fit.
        backward_too: whether a backward to everything follows the forward.
    """
    from fused_res.kernels.launching import recording
    from fused_res.kernels.tiling import compiling_for

    block, x = meta_block(geometry, dtype)
    with torch.no_grad(), compiling_for(capability, SHARED[capability]), recording() as found, _Library(found):
        skip = None
        if geometry.given:
            skip = x.new_empty(block.output_shape(x))
        run = of("triton")
        out, saved = forward(x, skip, None, block, level, backward_too, run)
        if backward_too:
            tensors, spec, eps = pack(block)
            needs = Gradients(True, skip is not None, False, unpack([True] * len(tensors), spec, eps))
            backward(out, x, None, block, Saved.from_list(saved, block, level), needs, level, run)
    return found


def steps(geometry: Geometry, level: str, dtype: torch.dtype, capability: int, backward_too: bool = True) -> tuple[Step, ...]:
    """The same, as what each of them costs."""
    return _steps(geometry, level, dtype, capability, backward_too, switches(torch.device("cuda")), settings.convolutions())


def clear() -> None:
    """Forget what has been recorded: where a backend's rules have been replaced."""
    _steps.cache_clear()


@functools.lru_cache(maxsize=256)
def _steps(geometry: Geometry, level: str, dtype: torch.dtype, capability: int, backward_too: bool, *_: object) -> tuple[Step, ...]:
    """`_`: what else decides who runs a convolution, and how."""
    found = launches(geometry, level, dtype, capability, backward_too)
    return tuple(step if isinstance(step, Step) else of_launch(step) for step in found)
