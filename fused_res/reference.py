"""The residual block in ordinary PyTorch autograd: every dtype, any device, differentiable any number of times.

It is the oracle of the tests, the eager peer of the benchmarks, the source of second derivatives, and what runs when a block
cannot be fused. The formulas are written once, in `compose` and `compose_preactivated`.
"""

import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_res import internals
from fused_res.spec import FORMS, POST_ACTIVATION, AvgPool, ConvBN

__all__ = ["compose", "compose_preactivated", "conv_bn", "residual_block", "run_modules"]


def compose(
    x: Tensor,
    main: Sequence[Callable[[Tensor], Tensor]],
    shortcut: Callable[[Tensor], Tensor] | None = None,
    residual_scale: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    last_activation: Callable[[Tensor], Tensor] | None = None,
    form: str = POST_ACTIVATION,
) -> Tensor:
    """`out = act(a * main(x) + shortcut(x))`, with an activation after each unit of `main` (He et al.,
    https://arxiv.org/abs/1512.03385).

    The forms without a shortcut, or without an activation at the end, are this formula without them.

    The sum has the main branch's shape and dtype, as with the usual `out += identity`, but is not made in place: what hooks
    on the last BN see stays as it was, and full backward hooks may be registered.
    """
    out = x
    for unit in main[:-1]:
        out = activation(unit(out))
    out = main[-1](out)
    if FORMS[form].skip:
        out = _sum(out, residual_scale, x if shortcut is None else shortcut(x))
    return (last_activation or activation)(out) if FORMS[form].relu else out


def compose_preactivated(
    x: Tensor,
    main: Sequence[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]],
    shortcut: Callable[[Tensor], Tensor] | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """`out = a * main(x) + shortcut(x)`, main being pairs of what stands in front of a convolution, its normalisation and
    activation, and that convolution (He et al., https://arxiv.org/abs/1603.05027). A shortcut that is not the identity is given x
    normalised and activated, as the first convolution is.
    """
    (first, conv), *rest = main
    activated = first(x)
    out = conv(activated)
    for before, conv in rest:
        out = conv(before(out))
    return _sum(out, residual_scale, x if shortcut is None else shortcut(activated))


def _sum(out: Tensor, residual_scale: Tensor | None, skip: Tensor) -> Tensor:
    if residual_scale is not None:
        out = residual_scale * out
    if not isinstance(out, Tensor):
        return operator.iadd(out, skip)  # torch.fx records the usual `out += identity`
    total = out + skip
    # torch.jit.trace would warn that it cannot keep a comparison of shapes.
    if not internals.is_traced() and total.shape != out.shape:
        raise RuntimeError(f"shortcut: its shape {tuple(skip.shape)} does not fit the main branch's output {tuple(out.shape)}")
    return total if total.dtype == out.dtype else total.to(out.dtype)


def conv_bn(x: Tensor, unit: ConvBN) -> Tensor:
    """BN(conv(x)), updating the unit's buffers as `nn.BatchNorm2d` does."""
    return _bn(_conv(x, unit), unit)


def _conv(x: Tensor, unit: ConvBN) -> Tensor:
    return F.conv2d(x, unit.weight, unit.bias, unit.stride, unit.padding, unit.dilation, unit.groups)


def _bn(y: Tensor, unit: ConvBN) -> Tensor:
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
    form: str = POST_ACTIVATION,
    last_activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The block on tensors; arguments and meaning as `fused_res.functional.residual_block`."""
    preactivated = FORMS[form].preactivated
    if isinstance(shortcut, ConvBN):
        project = _conv if preactivated else conv_bn
        branch = lambda t: project(pooled(t, pool), shortcut)  # noqa: E731
    elif shortcut is None:
        branch = None
    else:
        branch = lambda _: shortcut  # noqa: E731
    if preactivated:
        pairs = [(lambda t, unit=unit: torch.relu(_bn(t, unit)), lambda t, unit=unit: _conv(t, unit)) for unit in main]
        return compose_preactivated(x, pairs, branch, residual_scale)
    units = [lambda t, unit=unit: conv_bn(t, unit) for unit in main]
    return compose(x, units, branch, residual_scale, last_activation=last_activation, form=form)


def run_modules(
    x: Tensor,
    main: Sequence[tuple[nn.Module, nn.Module]],
    downsample: nn.Module | None = None,
    residual_scale: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    form: str = POST_ACTIVATION,
) -> Tensor:
    """The block through its own child modules, so that hooks, parametrizations and foreign layers keep their effect."""
    if FORMS[form].preactivated:
        pairs = [(lambda t, bn=bn: activation(bn(t)), conv) for conv, bn in main]
        return compose_preactivated(x, pairs, downsample, residual_scale)
    units = [lambda t, conv=conv, bn=bn: bn(conv(t)) for conv, bn in main]
    return compose(x, units, downsample, residual_scale, activation, form=form)
