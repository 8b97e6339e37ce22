"""`fused_res::block`, what an exported program calls for a block: the fused operators where it runs, aten where it is taken apart.

Torch composes it of what `_block` calls (CompositeImplicitAutograd), and `torch.export.export` keeps such an operator as one node.
What takes programs apart asks for its composition: `ExportedProgram.run_decompositions()`, and with it ONNX and whatever else works
on core aten, and AOTInductor. It then calls convolutions, BNs and ReLUs as the child modules do.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from fused_res import reference
from fused_res.block.casting import as_dtype, present, with_dtype
from fused_res.block.packing import unpack
from fused_res.block.prepared import Prepared
from fused_res.internals import is_exporting
from fused_res.primitives.common import statistics_dtype
from fused_res.spec import FORMS, ConvBN

_library = Library("fused_res", "FRAGMENT")
_library.define(
    "block(Tensor x, Tensor? skip, Tensor? residual_scale, Tensor[] tensors, int[] spec, float[] eps, ScalarType dtype, "
    "bool evaluates, str level, str backend) -> (Tensor, Tensor[])"
)


def block_exported(
    x: Tensor,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    tensors: list[Tensor],
    call: Prepared,
    norms: list[ConvBN],
    settle: Callable[[list[Tensor | None]], None],
) -> Tensor:
    """The block as one operator of an exported program, on its own tensors.

    Of `norms`, its BNs, those that take the batch's statistics give them to `settle`. Whether anything is kept for backward is
    decided when the program runs.
    """
    numbers = call.spec, call.eps, call.dtype, call.evaluates, call.level, call.backend
    out, statistics = torch.ops.fused_res.block(x, skip, residual_scale, tensors, *numbers)
    rest = iter(statistics)
    settle([next(rest) if unit.training else None for unit in norms])
    return out


def expect_composition() -> None:
    """Torch warns once that it keeps an operator that is composed of others, which is what this one is for."""
    warnings.filterwarnings("ignore", message=r"At pre-dispatch tracing, .* Found fused_res\.block", category=UserWarning)


def _block(x, skip, residual_scale, tensors, spec, eps, dtype, evaluates, level, backend):
    wanted = (x, skip, residual_scale, *tensors)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in wanted)
    apart = _is_taken_apart()
    if evaluates and not save and not apart:
        numbers = spec, eps, dtype, level, backend
        return torch.ops.fused_res.block_evaluation(x, skip, residual_scale, tensors, *numbers), []
    x, skip, tensors = as_dtype(x, dtype), as_dtype(skip, dtype), present(with_dtype(unpack(tensors, spec, eps), dtype))
    if apart:
        return _composed(x, skip, residual_scale, tensors, spec, eps)
    out, saved = torch.ops.fused_res.block_forward(x, skip, residual_scale, tensors, spec, eps, save, level, backend)
    norms = unpack(tensors, spec, eps).norms()
    return out, [vectors[:2] for unit, vectors in zip(norms, saved, strict=False) if unit.training]


def _is_taken_apart() -> bool:
    """Whether a graph is made for others than torch.compile, which has the operators of `fused_res.block.op` in its graphs."""
    # Here, since it would import SymPy with the package.
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None and (is_exporting() or not torch.compiler.is_compiling())


def _composed(x, skip, residual_scale, tensors, spec, eps):
    block, statistics = unpack(tensors, spec, eps), []
    preactivated = FORMS[block.form].preactivated

    def conv(images: Tensor, unit: ConvBN) -> Tensor:
        return F.conv2d(images, unit.weight, unit.bias, unit.stride, unit.padding, unit.dilation, unit.groups)

    def bn(y: Tensor, unit: ConvBN, bias: Tensor | None) -> Tensor:
        """bias: of the convolution that made y, which the statistics are without."""
        if unit.training:
            wide = y.detach().to(statistics_dtype(y.dtype))
            var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            mean = mean if bias is None else mean - bias.detach()
            statistics.append(torch.stack((mean, var)))
        return F.batch_norm(y, unit.running_mean, unit.running_var, unit.gamma, unit.beta, unit.training, 0.0, unit.eps)

    def conv_bn(images: Tensor, unit: ConvBN) -> Tensor:
        return bn(conv(images, unit), unit, unit.bias)

    shortcut = None
    if block.projection is not None:
        project = conv if preactivated else conv_bn
        shortcut = lambda images: project(reference.pooled(images, block.pool), block.projection)  # noqa: E731
    elif block.given:
        shortcut = lambda _: skip  # noqa: E731
    if preactivated:
        biases = (None, *(unit.bias for unit in block.main[:-1]))
        pairs = [
            (lambda y, unit=unit, bias=bias: torch.relu(bn(y, unit, bias)), lambda z, unit=unit: conv(z, unit))
            for unit, bias in zip(block.main, biases, strict=True)
        ]
        return reference.compose_preactivated(x, pairs, shortcut, residual_scale), statistics
    main = [lambda images, unit=unit: conv_bn(images, unit) for unit in block.main]
    return reference.compose(x, main, shortcut, residual_scale, form=block.form), statistics


_library.impl("block", _block, "CompositeImplicitAutograd")
