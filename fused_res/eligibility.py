"""Whether a block's child modules may be replaced by the fused operator: one predicate that both decides and explains.

A module is only ever bypassed if calling it would do exactly what the operator does: its exact type, nobody listening.
"""

from typing import NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_res.spec import AvgPool, ConvBN

T = TypeVar("T")

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_PLAIN = (Tensor, nn.Parameter, type(None))


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def global_hooks() -> str | None:
    """The reason where a hook is registered on all modules, as module profilers and FLOP counters do."""
    hooked = (
        nn_module._global_forward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_backward_pre_hooks
        or nn_module._global_backward_hooks
    )
    return "a global module hook is registered" if hooked else None


def foreign(name: str, module: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """Why this child is not a plain module of the expected type, or None where it is."""
    if type(module) is not expected:
        return f"{name} is a {type(module).__name__}, not nn.{expected.__name__}"
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return f"{name} has {next(what for attribute, what in _HOOKS.items() if getattr(module, attribute))}"
    if "forward" in module.__dict__:
        return f"{name}.forward is overridden"
    for tensors in (module._parameters, module._buffers):
        for tensor_name, tensor in tensors.items():
            if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
                return f"{name}.{tensor_name} is a {type(tensor).__name__}"
    return None


def unit_reason(conv_name: str, conv: nn.Module, bn_name: str, bn: nn.Module) -> str | None:
    """Why a convolution and its BN cannot be part of the operator, or None where they can."""
    reason = foreign(conv_name, conv, nn.Conv2d) or foreign(bn_name, bn, nn.BatchNorm2d)
    if reason is not None:
        return reason
    if conv.padding_mode != "zeros":
        return f"{conv_name} has padding_mode={conv.padding_mode!r}"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return f"{conv_name} pads unevenly (padding='same')"
    if (lookup(bn._buffers, bn, "running_mean") is None) != (lookup(bn._buffers, bn, "running_var") is None):
        return f"{bn_name} has only one of running_mean and running_var"
    return None


def lookup(registered: dict[str, T], module: nn.Module, name: str) -> T:
    """`getattr(module, name)`, at once where it is registered."""
    try:
        return registered[name]
    except KeyError:
        return getattr(module, name)


def unit_of(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvBN:
    """Tensors and numbers of a convolution and its BN, with the BN's own `training` flag, as `nn.BatchNorm2d.forward` reads it."""
    if conv.padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    else:
        padding = (0, 0) if conv.padding == "valid" else conv.padding
    weights, parameters, buffers = conv._parameters, bn._parameters, bn._buffers
    running_mean, running_var = lookup(buffers, bn, "running_mean"), lookup(buffers, bn, "running_var")
    training, counted = bn.training, None
    live = training or running_mean is None
    if training and bn.track_running_stats:
        counted = lookup(buffers, bn, "num_batches_tracked")
    elif training:
        running_mean = running_var = None
    return ConvBN(
        weight=lookup(weights, conv, "weight"),
        bias=lookup(weights, conv, "bias"),
        gamma=lookup(parameters, bn, "weight"),
        beta=lookup(parameters, bn, "bias"),
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=counted,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        training=live,
        momentum=bn.momentum,
        eps=bn.eps,
    )


class Shortcut(NamedTuple):
    """How a block's `downsample` runs: as the identity, as a projection inside the operator, or by itself.

    `kind` is "identity", "projection", "pooled projection" or "as it is"; `reason` says why not as a projection.
    """

    kind: str
    conv: nn.Conv2d | None = None
    bn: nn.BatchNorm2d | None = None
    pool: AvgPool | None = None
    names: str = ""
    reason: str | None = None


_IDENTITY = Shortcut("identity")


def shortcut_of(downsample: nn.Module | None) -> Shortcut:
    """Reads `[AvgPool2d or Identity,] Conv2d, BatchNorm2d` in a Sequential, as torchvision and timm build it."""
    if downsample is None or foreign("downsample", downsample, nn.Identity) is None:
        return _IDENTITY
    reason = foreign("downsample", downsample, nn.Sequential)
    if reason is not None:
        return Shortcut("as it is", reason=reason)
    children = list(downsample)
    first = len(children) - 2
    if first not in (0, 1):
        return Shortcut("as it is", reason=f"downsample has {len(children)} layers, not [pool,] conv, bn")
    names = f"downsample.{first}", f"downsample.{first + 1}"
    pool = None
    if first == 1 and foreign("downsample.0", children[0], nn.Identity) is not None:
        reason = foreign("downsample.0", children[0], nn.AvgPool2d)
        if reason is None and children[0].divisor_override is not None:
            reason = "downsample.0 has a divisor_override"
        if reason is not None:
            return Shortcut("as it is", reason=reason)
        p = children[0]
        pool = AvgPool(_pair(p.kernel_size), _pair(p.stride), _pair(p.padding), p.ceil_mode, p.count_include_pad)
    conv, bn = children[first:]
    reason = unit_reason(names[0], conv, names[1], bn)
    if reason is not None:
        return Shortcut("as it is", reason=reason)
    return Shortcut("projection" if pool is None else "pooled projection", conv, bn, pool, "/".join(names))
