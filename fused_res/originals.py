"""Torch's own classes and functions as they were at import, and whether any of those that a block stands for has been replaced.

A plug-in may replace `nn.Conv2d.forward`, `F.conv2d` or the like for the whole process: the operator would pass its work by.
"""

from operator import getitem
from types import BuiltinFunctionType, FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch.nn.modules import activation, batchnorm, container, conv, linear, module, pooling

from fused_res.internals import constant_result

Conv2d, BatchNorm2d, ReLU = conv.Conv2d, batchnorm.BatchNorm2d, activation.ReLU
Sequential, Identity, AvgPool2d = container.Sequential, linear.Identity, pooling.AvgPool2d
MaxPool2d = pooling.MaxPool2d

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""The names under which a convolution and a BN read their tensors."""

_OWN = {
    Conv2d: ("forward", "_conv_forward"),
    batchnorm._BatchNorm: ("forward",),
    BatchNorm2d: ("_check_input_dim",),
    **dict.fromkeys((ReLU, Sequential, Identity, AvgPool2d, MaxPool2d), ("forward",)),
    module.Module: ("__call__", "_call_impl", "__getattr__"),
    F: ("conv2d", "batch_norm", "relu", "avg_pool2d", "max_pool2d"),
    torch: ("batch_norm", "relu", "relu_"),
    # A module's view of the functional interface may be replaced alone.
    **dict.fromkeys((conv, batchnorm, activation, pooling), ("F",)),
}
_OWNERS, _NAMES = zip(*((owner, name) for owner, names in _OWN.items() for name in names), strict=True)
_SPACES = tuple(map(vars, _OWNERS))
_VALUES = tuple(map(getitem, _SPACES, _NAMES))

# What a class inherits may be replaced by an attribute that it is given: those counts tell.
_CLASSES = {c for kept in (Conv2d, BatchNorm2d, ReLU, Sequential, Identity, AvgPool2d, MaxPool2d) for c in kept.__mro__[:-1]}
_CLASS_SPACES = tuple(map(vars, _CLASSES))
_COUNTS = tuple(map(len, _CLASS_SPACES))
_BEFORE = {
    Conv2d: ("__call__", "_call_impl", "__getattr__", "__getattribute__", *TENSORS),
    BatchNorm2d: ("forward", "__call__", "_call_impl", "__getattr__", "__getattribute__", *TENSORS),
    **dict.fromkeys(
        (ReLU, Sequential, Identity, AvgPool2d, MaxPool2d), ("__call__", "_call_impl", "__getattr__", "__getattribute__")
    ),
}


def _inherited() -> dict[tuple[type, str], object]:
    return {(owner, name): getattr(owner, name, None) for owner, names in _BEFORE.items() for name in names}


_INHERITED = _inherited()


def _full(owner: type | ModuleType, name: str) -> str:
    return f"torch.nn.{owner.__name__}.{name}" if isinstance(owner, type) else f"{owner.__name__}.{name}"


def _is_written_in_torch(value: object) -> bool:
    """Whether a function is torch's own: `functools.wraps` copies a function's names, but not what it was defined among."""
    return isinstance(value, FunctionType) and value.__globals__.get("__name__", "").startswith("torch.")


def _is_torchs(owner: type | ModuleType, name: str, value: object) -> bool:
    """Whether a value found at import is torch's own. Its built-in functions belong to one type or to `torch._C._nn`."""
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ in (torch.conv2d.__self__, torch._C._nn)
    return value is F if name == "F" else _is_written_in_torch(value)


_ALL = tuple(zip(_OWNERS, _NAMES, _VALUES, strict=True))
_FOREIGN = next((_full(owner, name) for owner, name, value in _ALL if not _is_torchs(owner, name, value)), None)


@constant_result  # torch.compile, which follows it, makes a guard of every one of these values
def replaced() -> str | None:
    """The name of a method or a function of torch that is not torch's own any more, or None where all are."""
    # Map and tuple run in C; equal values are looked for by identity first.
    if tuple(map(getitem, _SPACES, _NAMES)) == _VALUES and tuple(map(len, _CLASS_SPACES)) == _COUNTS and _FOREIGN is None:
        return None
    return _find_replaced()


def _find_replaced() -> str | None:
    if _FOREIGN is not None:
        return _FOREIGN
    now = {(owner, name): vars(owner).get(name) for owner, name, _ in _ALL} | _inherited()
    kept = {(owner, name): value for owner, name, value in _ALL} | _INHERITED
    # Torch's tracers replace some themselves while they run.
    changed = (place for place, value in now.items() if value is not kept[place] and not _is_written_in_torch(value))
    place = next(changed, None)
    return None if place is None else _full(*place)
