"""The residual block in ordinary PyTorch autograd: every dtype, any device, differentiable any number of times.

It is the oracle of the tests, the eager peer of the benchmarks, the source of second derivatives, and what runs when a block
cannot be fused. The formula is written once, in `compose`.
"""

import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_res import internals
from fused_res.spec import AvgPool, ConvBN

__all__ = ["compose", "conv_bn", "residual_block", "run_modules"]


def compose(
    x: Tensor,
    main: Sequence[Callable[[Tensor], Tensor]],
    shortcut: Callable[[Tensor], Tensor] | None = None,
    residual_scale: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    last_activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`out = act(a * main(x) + shortcut(x))`, with an activation after each unit of `main` (He et al., https://arxiv.org/abs/1512.03385).

    The sum has the main branch's shape and dtype, as with the usual `out += identity`, but is not made in place: what hooks
    on the last BN see stays as it was, and full backward hooks may be registered.
    """
    out = x
    for unit in main[:-1]:
        out = activation(unit(out))
    out = main[-1](out)
    if residual_scale is not None:
        out = residual_scale * out
    skip = x if shortcut is None else shortcut(x)
    if not isinstance(out, Tensor):
        total = operator.iadd(out, skip)  # torch.fx records the usual `out += identity`
    else:
        total = out + skip
        # torch.jit.trace would warn that it cannot keep a comparison of shapes.
        if not internals.is_traced() and total.shape != out.shape:
            raise RuntimeError(f"shortcut: its shape {tuple(skip.shape)} does not fit the main branch's output {tuple(out.shape)}")
        total = total if total.dtype == out.dtype else total.to(out.dtype)
    return (last_activation or activation)(total)


def conv_bn(x: Tensor, unit: ConvBN) -> Tensor:
    """BN(conv(x)), updating the unit's buffers as `nn.BatchNorm2d` does."""
    y = F.conv2d(x, unit.weight, unit.bias, unit.stride, unit.padding, unit.dilation, unit.groups)
    if unit.training and unit.num_batches_tracked is not None:
        unit.num_batches_tracked.add_(1)
    momentum = unit.momentum
    if momentum is None:
        momentum = 1.0 / float(unit.num_batches_tracked) if unit.training and unit.num_batches_tracked is not None else 0.0
    return F.batch_norm(y, unit.running_mean, unit.running_var, unit.gamma, unit.beta, unit.training, momentum, unit.eps)


def pooled(x: Tensor, pool: AvgPool | None) -> Tensor:
    """Average pooling of x, or x itself without a pool."""
    return x if pool is None else F.avg_pool2d(x, *pool)


def residual_block(
    x: Tensor,
    main: Sequence[ConvBN],
    shortcut: ConvBN | Tensor | None = None,
    *,
    pool: AvgPool | None = None,
    residual_scale: Tensor | None = None,
    last_activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Tensor:
    """The block on tensors; arguments and meaning as `fused_res.functional.residual_block`."""
    if isinstance(shortcut, ConvBN):
        branch = lambda t: conv_bn(pooled(t, pool), shortcut)  # noqa: E731
    elif shortcut is None:
        branch = None
    else:
        branch = lambda _: shortcut  # noqa: E731
    units = [lambda t, unit=unit: conv_bn(t, unit) for unit in main]
    return compose(x, units, branch, residual_scale, last_activation=last_activation)


def run_modules(
    x: Tensor,
    main: Sequence[tuple[nn.Module, nn.Module]],
    downsample: nn.Module | None = None,
    residual_scale: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Tensor:
    """The block through its own child modules, so that hooks, parametrizations and foreign layers keep their effect."""
    units = [lambda t, conv=conv, bn=bn: bn(conv(t)) for conv, bn in main]
    return compose(x, units, downsample, residual_scale, activation)
