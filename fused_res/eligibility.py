"""Whether a block's child modules may be replaced by the fused operator: one predicate that both decides and explains.

A module is only ever bypassed if calling it would do exactly what the operator does: its exact type, as torch defines it, nobody
listening. docs/limits.md lists the reasons.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_res import internals, known
from fused_res.originals import TENSORS, AvgPool2d, BatchNorm2d, Conv2d, Identity, Sequential, replaced
from fused_res.reading import lookup, same_padding
from fused_res.spec import AvgPool, pair

NO_DATA = "x is on the meta device, without data"
_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_PLAIN = {Tensor, nn.Parameter, type(None)}
_METHODS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl", "_compiled_call_impl")


def acts(tensor: Tensor | None) -> bool:
    """Whether a tensor's class has a say in the functions that are called with it."""
    kind = type(tensor)
    if kind in _PLAIN or kind.__module__.startswith("torch._subclasses."):  # those have kernels of ours
        return False
    function, dispatch = kind.__torch_function__, kind.__torch_dispatch__
    inherited = getattr(function, "__func__", None) is Tensor.__torch_function__.__func__
    return not (inherited or function is nn.Parameter.__torch_function__) or dispatch is not Tensor.__torch_dispatch__


def _acting(name: str, tensor: Tensor | None) -> str | None:
    return f"{name} is a {type(tensor).__name__}, a tensor that acts for itself" if acts(tensor) else None


def input_reason(x: Tensor) -> str | None:
    """Why the operator cannot take this input, whatever the modules are, or None where it can."""
    if type(x) in _PLAIN:
        return NO_DATA if x.is_meta else None
    if isinstance(x, Tensor):
        return _acting("x", x)
    return "torch.fx is tracing" if isinstance(x, torch.fx.Proxy) else f"x is a {type(x).__name__}"


def scale_reason(residual_scale: Tensor | None) -> str | None:
    """Why the operator cannot take this residual scale."""
    return None if type(residual_scale) in _PLAIN else _acting("residual_scale", residual_scale)


def is_traced() -> bool:
    """Whether torch.jit.trace records what is called."""
    return not torch.compiler.is_compiling() and internals.is_traced()


def observer_reason() -> str | None:
    """Why child modules are to run whatever they are: somebody watches, or changes, what is called."""
    compiling = torch.compiler.is_compiling()
    if not compiling and internals.is_traced():
        return "torch.jit.trace is tracing"
    if internals.has_global_hooks():
        return "a global module hook is registered"
    name = replaced()
    if name is not None:
        return f"{name} has been replaced"
    if not compiling and internals.has_modes():
        return _mode_reason()
    return None


def is_observed() -> bool:
    """Whether there may be a reason of that kind, or a transform that only ordinary autograd follows; asked in little time.

    Not for calls that a compiler traces.
    """
    watched = internals.is_traced() or internals.has_modes() or internals.is_dual() or internals.is_transformed()
    return watched or internals.has_global_hooks() or replaced() is not None


def _mode_reason() -> str | None:
    """Torch's own modes (devices, fake tensors, export, counters) know our operator or go by the modules' hooks."""
    for mode in internals.modes():
        if not type(mode).__module__.startswith("torch."):
            return f"the mode {type(mode).__name__} is active"
    return None


def foreign(name: str, module: nn.Module | None, expected: type[nn.Module], now: bool = True) -> str | None:
    """Why this child is not a plain module of the expected type, or None where it is."""
    return observed(name, module, now) if type(module) is expected else _other(name, module, expected)


def _other(name: str, module: nn.Module | None, expected: type[nn.Module]) -> str:
    kind = type(module)
    alike = f"{kind.__module__}." if kind.__name__ == expected.__name__ else ""
    return f"{name} is a {alike}{kind.__name__}, not nn.{expected.__name__}"


def observed(name: str, module: nn.Module, now: bool = True) -> str | None:
    """Why calling this module is not just what its type says: hooks, overrides, tensors that act for themselves.

    Unless `now`, sharded parameters are none: `fully_shard` has them whole while the module runs.
    """
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return f"{name} has {next(what for attribute, what in _HOOKS.items() if getattr(module, attribute))}"
    own = module.__dict__
    if (
        "forward" in own
        or "_call_impl" in own
        or "_compiled_call_impl" in own
        or "_conv_forward" in own
        or "_check_input_dim" in own
        or "weight" in own
        or "bias" in own
        or "running_mean" in own
        or "running_var" in own
        or "num_batches_tracked" in own
    ):
        reason = _overridden(name, module)
        if reason is not None:
            return reason
    for tensors in (module._parameters, module._buffers):
        if tensors and not _PLAIN.issuperset(map(type, tensors.values())):
            kept = {n: t for n, t in tensors.items() if now or type(t).__qualname__ != "DTensor"}
            reason = next((r for n, t in kept.items() if (r := _acting(f"{name}.{n}", t)) is not None), None)
            if reason is not None:
                return reason
    return None


def _overridden(name: str, module: nn.Module) -> str | None:
    """Why what was set on the module itself stands in the operator's way; a plain tensor that is not registered does not."""
    own = module.__dict__
    for method in _METHODS:
        if own.get(method) is not None:
            return f"{name} is compiled by itself" if method == "_compiled_call_impl" else f"{name}.{method} is overridden"
    for tensor in TENSORS:
        if tensor in own:
            if tensor in module._parameters or tensor in module._buffers:
                return f"{name}.{tensor} is overridden"
            if own[tensor] is not None and acts(own[tensor]):
                return _acting(f"{name}.{tensor}", own[tensor])
    return None


def unit_reason(
    conv_name: str, conv: nn.Module, bn_name: str, bn: nn.Module, acts: tuple[type, ...] = (Identity,), now: bool = True
) -> str | None:
    """Why a convolution and its BN cannot be part of the operator, or None where they can.

    Args:
        acts: what the activation may be of a BN that has one of its own.
        now: as for `observed`.
    """
    reason = foreign(conv_name, conv, Conv2d, now)
    if reason is None:
        reason = observed(bn_name, bn, now) if type(bn) is BatchNorm2d else _norm_reason(bn_name, bn, acts, now)
    if reason is None:
        reason = _padding_reason(conv_name, conv)
    if reason is not None:
        return reason
    buffers = bn._buffers
    if (lookup(buffers, bn, "running_mean") is None) != (lookup(buffers, bn, "running_var") is None):
        return f"{bn_name} has only one of running_mean and running_var"
    return None


def _padding_reason(name: str, conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros":
        return f"{name} has padding_mode={conv.padding_mode!r}"
    if conv.padding == "same" and any(2 * p != d * (k - 1) for p, d, k in zip(*same_padding(conv), strict=True)):
        return f"{name} pads unevenly (padding='same')"
    return None


def _norm_reason(name: str, norm: nn.Module, acts: tuple[type, ...], now: bool) -> str | None:
    about = known.about(type(norm), "norms")
    if about is None:
        return _other(name, norm, BatchNorm2d)
    reason = observed(name, norm, now)
    if reason is None and known.ACTIVATED in about:
        reason = foreign(f"{name}.drop", norm.drop, Identity)
        if reason is None:
            act = next((kind for kind in acts if type(norm.act) is kind), acts[0])
            reason = foreign(f"{name}.act", norm.act, act)
    return reason


def idle_reason(name: str, module: nn.Module | None, now: bool = True) -> str | None:
    """Why calling this child, where a block calls it at all, does something; in evaluation mode, unless `now`."""
    if module is None:
        return None
    if type(module) is Identity or known.about(type(module), "drops") is None:
        return foreign(name, module, Identity)
    if now and module.training and module.drop_prob:
        return f"{name} drops at random (drop_prob={module.drop_prob})"
    return observed(name, module)


def container_reason(name: str, module: nn.Module, children: int) -> str | None:
    """Why calling this module is not just to call its children one after the other, as many as are expected."""
    if type(module) is not Sequential and known.about(type(module), "containers") is None:
        return _other(name, module, Sequential)
    if len(module._modules) != children:
        return f"{name} has {len(module._modules)} layers, not {children}"
    return observed(name, module)


class Shortcut(NamedTuple):
    """How a block's `downsample` runs: as the identity, as a projection inside the operator, or by itself.

    `kind` is "identity", "projection", "pooled projection", "as it is" or "none"; `reason` says why not inside the operator.
    """

    kind: str
    conv: nn.Conv2d | None = None
    bn: nn.BatchNorm2d | None = None
    """None of a pre-activation block's."""
    pool: AvgPool | None = None
    names: str = ""
    reason: str | None = None


_IDENTITY = Shortcut("identity")
NO_SHORTCUT = Shortcut("none")


def shortcut_of(downsample: nn.Module | None, name: str = "downsample", bare: bool = False) -> Shortcut:
    """Reads `[AvgPool2d or Identity,] Conv2d, BatchNorm2d` in a Sequential, as torchvision builds it, or in a known class.

    With `bare` that of a pre-activation block: instead of the BN nothing, or an Identity; or a Conv2d alone.
    """
    if downsample is None or foreign(name, downsample, Identity) is None:
        return _IDENTITY
    if bare and type(downsample) is Conv2d:
        return _projection([(name, downsample)], None)
    names = known.about(type(downsample), "shortcuts")
    reason = foreign(name, downsample, Sequential) if names is None else observed(name, downsample)
    if reason is not None:
        return Shortcut("as it is", reason=reason)
    if names is None and not downsample._modules:
        return _IDENTITY
    children = downsample._modules if names is None else {child: getattr(downsample, child) for child in names}
    named = [(f"{name}.{child}", module) for child, module in children.items()]
    if bare and len(named) > 1 and foreign(*named[-1], Identity) is None:
        named.pop()
    last = 1 if bare else 2
    if len(named) not in (last, last + 1):
        return Shortcut("as it is", reason=f"{name} has {len(children)} layers, not [pool,] conv{'' if bare else ', bn'}")
    pool = None
    if len(named) > last and foreign(*named[0], Identity) is not None:
        pool_name, p = named[0]
        reason = foreign(pool_name, p, AvgPool2d)
        if reason is None and p.divisor_override is not None:
            reason = f"{pool_name} has a divisor_override"
        if reason is not None:
            return Shortcut("as it is", reason=reason)
        kernel = pair(p.kernel_size, "kernel_size")
        stride = kernel if p.stride is None or p.stride == () else pair(p.stride, "stride")
        pool = AvgPool(kernel, stride, pair(p.padding, "padding"), p.ceil_mode, p.count_include_pad)
    return _projection(named[-last:], pool)


def _projection(named: list[tuple[str, nn.Module]], pool: AvgPool | None) -> Shortcut:
    """Of a convolution and a BN, or of a convolution alone, each with its name."""
    (name, conv), (_, bn) = named[0], named[1] if len(named) > 1 else ("", None)
    alone = bn is None
    reason = (foreign(name, conv, Conv2d) or _padding_reason(name, conv)) if alone else unit_reason(*named[0], *named[1])
    if reason is not None:
        return Shortcut("as it is", reason=reason)
    return Shortcut("projection" if pool is None else "pooled projection", conv, bn, pool, "/".join(name for name, _ in named))
