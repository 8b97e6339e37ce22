"""What a block stood for at its last call, kept while its modules are what they were: nothing replaced, set, or hooked since.

Reading a block's modules and asking each whether the operator may stand for it takes longer than to see that none of them has
changed. To see that, all that they hold is compared by identity: their attributes, parameters, buffers and children. The values of
tensors, their shapes and dtypes are not part of it; whoever calls looks at those.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Generic, TypeVar

from torch import nn

from fused_res import known
from fused_res.originals import AvgPool2d, BatchNorm2d, Conv2d, Identity, ReLU, Sequential

T = TypeVar("T")

_TORCHS = {AvgPool2d, BatchNorm2d, Conv2d, Identity, ReLU, Sequential}
_MOST = 24
"""Modules of a block for which this pays."""
_held = itemgetter("_parameters", "_buffers", "_modules")
_hooks = itemgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Module:
    """What a module held: its attributes, and in which dictionaries it has parameters, buffers and children."""

    def __init__(self, module: nn.Module) -> None:
        self.space = vars(module)
        names = [name for name, value in self.space.items() if not isinstance(value, dict)]
        # With one name alone, itemgetter returns no tuple.
        self.size, self.get = len(self.space), itemgetter(*names, names[0])
        self.values, self.held = self.get(self.space), _held(self.space)

    def holds(self) -> bool:
        space, (parameters, buffers, modules) = self.space, self.held
        return (
            len(space) == self.size
            and self.get(space) == self.values
            and space["_parameters"] is parameters
            and space["_buffers"] is buffers
            and space["_modules"] is modules
        )


class _Kept(Generic[T]):
    """What was read of a block, and what its modules held then."""

    def __init__(self, modules: Sequence[nn.Module], found: T, forget: Callable) -> None:
        self.block, self.children, self.found = weakref.ref(modules[0], forget), modules[1:], found
        self.types = list(map(type, self.children))
        self.forwards = [(kind, kind.forward) for kind in set(self.types) - _TORCHS]
        self.modules = list(map(_Module, modules))
        self.hooks = list(chain.from_iterable(map(_hooks, map(vars, self.children))))
        # What these views show is what the dictionaries hold now.
        self.views = [held.values() for module in self.modules for held in module.held]
        self.tensors = list(chain.from_iterable(self.views))

    def holds(self) -> bool:
        if any(self.hooks) or list(map(type, self.children)) != self.types:
            return False
        if sum(map(len, self.views)) != len(self.tensors) or not all(map(is_, chain.from_iterable(self.views), self.tensors)):
            return False
        for module in self.modules:
            if not module.holds():
                return False
        return all(kind.forward is forward for kind, forward in self.forwards)


_kept: dict[int, _Kept] = {}
"""By the block's identity."""


def last(block: nn.Module) -> object | None:
    """What `keep` was given last for this block, if it holds still."""
    kept = _kept.get(id(block))
    if kept is None:
        return None
    try:
        if kept.holds():
            return kept.found
    except (KeyError, TypeError, ValueError, RuntimeError):
        pass  # an attribute is gone, or is an array: what cannot be compared with what was there is something else
    _kept.pop(id(block), None)
    return None


def keep(block: nn.Module, found: object) -> None:
    """Keep what was read of a block and of all modules below it, unless something in them may change without being seen.

    That may be attributes that are edited in place, layers of other classes than torch's and those of `fused_res.known`, or very
    many modules.
    """
    modules, key = list(block.modules()), id(block)
    if len(modules) > _MOST or not all(map(known.is_known, set(map(type, modules[1:])) - _TORCHS)):
        return
    if any(isinstance(value, list) for module in modules[1:] for value in vars(module).values()):
        return
    kept = _Kept(modules, found, lambda _: _kept.pop(key, None))
    if not any(kept.hooks):
        _kept[key] = kept
