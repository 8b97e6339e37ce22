"""`fuse(model)` and `unfuse(model)`: the residual blocks of a model run as one operator each, in place, and as they were again.

A block keeps its identity, its children and all that hangs on it. Only its class changes, to one that is derived from its own, as
`torch.distributed.fsdp.fully_shard` does it: `isinstance` holds, `type(block) is …` does not.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fused_res import network
from fused_res.anatomy import Anatomy, recognise
from fused_res.block.levels import LEVELS
from fused_res.derived import as_class, derive
from fused_res.fusible import Fusible
from fused_res.notices import say_once
from fused_res.traced import trace

M = TypeVar("M", bound=nn.Module)

_LEVEL = "_fused_res_level"


class Fused(Fusible):
    """What a fused block's class puts before its original one."""

    _fused_res_original: type[nn.Module]
    _fused_res_forward: Callable
    """The original's, as it was when it was compared with the anatomy."""
    _fused_res_compared: bool
    """Whether it was, in this process: a pickle may come from one with another version of the original's library."""

    def _fused_res_dispatch(self, *args: object, **kwargs: object) -> Tensor:
        if len(args) + len(kwargs) != 1:
            return self._fused_res_original.forward(self, *args, **kwargs)
        return self._call(args[0] if args else next(iter(kwargs.values())))

    def _is_as_it_was(self) -> bool:
        return self._fused_res_original.forward is type(self)._fused_res_forward

    def _passing_reason(self, x: Tensor) -> str | None:
        if not self._is_as_it_was():
            return f"{self._fused_res_original.__name__}.forward has been replaced"
        return super()._passing_reason(x)

    def _unfused(self, x: Tensor) -> Tensor:
        return self._fused_res_original.forward(self, x)

    def __reduce_ex__(self, protocol: int) -> tuple:
        found = super().__reduce_ex__(max(protocol, 2))
        if found[0] is not copyreg.__newobj__:  # the original has a way of its own
            return found
        return (_rebuild, (self._fused_res_original, self._anatomy, self._promotes), *found[2:])

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        kind = type(self)
        if not kind._fused_res_compared:
            reason, promotes = trace(as_class(self, kind._fused_res_original), kind._anatomy)
            if reason is None and promotes == kind._promotes:
                kind._fused_res_compared = True
            else:
                self.__class__ = kind._fused_res_original
                say_once(f"unpickled {kind.__name__}", f"was fused when it was pickled, and is not here: {reason}", self)


@functools.cache
def _fused_class(original: type[nn.Module], called: Callable, anatomy: Anatomy, promotes: bool) -> type[nn.Module]:
    """`called` is the original's forward now."""
    return derive(Fused, original, called, {"_anatomy": anatomy, "_promotes": promotes})


def _rebuild(original: type[nn.Module], anatomy: Anatomy, promotes: bool) -> nn.Module:
    """An empty fused block, for pickle and copy to fill."""
    kind = _fused_class(original, original.forward, anatomy, promotes)
    return kind.__new__(kind)


def find(module: nn.Module) -> tuple[type[nn.Module] | None, str | None]:
    """The class that a module gets when it is fused, or why it cannot be; twice None where it is no block that is known."""
    if isinstance(module, torch.jit.ScriptModule):
        return None, None
    anatomy, reason = recognise(module)
    if anatomy is None or reason is not None:
        return None, reason
    reason, promotes = trace(module, anatomy)
    if reason is not None:
        return None, reason
    kind = _fused_class(type(module), type(module).forward, anatomy, promotes)
    kind._fused_res_compared = True
    reason = as_class(module, kind).standing_reason(now=False)
    return (kind, None) if reason is None else (None, reason)


def fuse(model: M, *, filter: Callable[[nn.Module, str], bool] | None = None, level: str | None = None, strict: bool = False) -> M:
    """Make the residual blocks of a model run as one operator each, in place. `unfuse` takes it back.

    Known are the blocks of torchvision's ResNets (also inside its detection and segmentation models), of timm's and of Hugging Face
    transformers', and classes that say what they are made of (`fused_res.Anatomy`). Before a block is fused its `forward` is traced
    and compared with what is known of it. What would not be the same afterwards stays as it is: blocks with hooks or
    parametrizations inside, other activations and normalisations than ReLU and BN, attention, anti-aliasing, a patched `forward`;
    `fused_res.explain(model, x)` says why. So it is at every later call: a block whose children have changed runs through them.

    A torchvision or timm ResNet with such blocks is fused itself, too, where its `forward`, traced, calls its layers one after the
    other: in evaluation without gradients, on a CPU, the convolution, BN, ReLU and pooling in front of the blocks run on prepared
    weights as the blocks do, and all of these as one call. Else, and under torch.compile, its layers are called as they are. A
    network of another class is fused like that if the class names these layers, as `fused_res_stem = ("conv1", "bn1", "relu",
    "maxpool")`, and its `forward` always calls them one after the other.

    Modules, parameters, buffers, their names, state dicts, hooks and optimisers stay the same objects. A fused block's class is
    derived from its original one. Models can be copied, pickled, compiled, exported, scripted, traced and sharded, fused or not; a
    model that `fully_shard` has wrapped after it was fused cannot be unfused. A whole model that was pickled fused needs this
    package where it is loaded; state dicts need nothing.

    Args:
        model: any module, a block itself included. What is fused already stays so.
        filter: which blocks, given each and its name in the model; all if None.
        level: one of `fused_res.planner.LEVELS`, for forward, recompute and backward, in training and evaluation, or None for what
            was measured or follows from the sizes. `use_backend(name, level)` goes before it. Calling `fuse` again sets it anew.
        strict: whether to raise instead of leaving alone what cannot be fused.

    Returns:
        The model itself.

    Raises:
        TypeError: model is not an `nn.Module`, or filter is not callable.
        ValueError: an unknown level; with `strict` a block that cannot be fused, with the reasons of all, or no block at all. Then
            nothing has changed.
    """
    _check(model)
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: expected a callable or None, got {type(filter).__name__}")
    if level is not None and level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    chosen: list[tuple[nn.Module, type[nn.Module]]] = []
    refused: list[str] = []
    for name, module in model.named_modules():
        kind, reason = (type(module), None) if isinstance(module, Fusible) else find(module)
        if (kind is None and reason is None) or (filter is not None and not filter(module, name)):
            continue
        if reason is None:
            chosen.append((module, kind))
        else:
            refused.append(f"{name or type(module).__name__}: {reason}")
    if strict and (refused or not chosen):
        raise ValueError("model: " + ("; ".join(refused) if refused else "no residual block that is known was found"))
    for module, kind in chosen:
        if type(module) is not kind:
            module.__class__ = kind
        _set_level(module, level)
    _fuse_networks(model, {block for block, _ in chosen}, level)
    return model


def _fuse_networks(model: nn.Module, blocks: set[nn.Module], level: str | None) -> None:
    """Fuse the networks that these blocks are in, where they are known."""
    for module in list(model.modules()):
        if isinstance(module, network.Network) and _is_derived_again(module):
            continue
        found = network.find(network.plain(module))
        if found is not None and not blocks.isdisjoint(module.modules()):
            network.remember(module, *found)
            _set_level(module, level)


def _is_derived_again(module: nn.Module) -> bool:
    """Whether somebody has changed its class after it was fused, as `fully_shard` does."""
    return "_fused_res_original" not in vars(type(module))


def unfuse(model: M) -> M:
    """Give every block of a model that `fuse` has fused its original class again, in place.

    Returns:
        The model itself, each block of exactly the class that it had, and without a level.

    Raises:
        TypeError: model is not an `nn.Module`.
        RuntimeError: a block's class was changed again after it was fused, by `fully_shard`, say. Then nothing has changed.
    """
    _check(model)
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Fusible | network.Network)]
    for name, module in blocks:
        if isinstance(module, Fused | network.Network) and _is_derived_again(module):
            raise RuntimeError(
                f"{name or 'model'}: its class became {type(module).__name__} after it was fused (by fully_shard?): unfuse before"
            )
    for _, module in blocks:
        if isinstance(module, network.Network):
            network.forget(module)
        elif isinstance(module, Fused):
            module.__class__ = type(module)._fused_res_original
        _set_level(module, None)
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _set_level(block: nn.Module, level: str | None) -> None:
    vars(block).pop(_LEVEL, None)
    if level is not None:
        vars(block)[_LEVEL] = level
