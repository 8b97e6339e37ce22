"""What a block stood for at its last call, kept while its modules are what they were: nothing replaced, set, or hooked since.

Reading a block's modules and asking each whether the operator may stand for it takes longer than to see that none of them has
changed. That shows in the dictionaries in which they have their attributes, parameters, buffers and children: Python counts the
changes of each. The values of tensors, their shapes and dtypes are not part of it; whoever calls looks at those.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Generic, TypeVar

from torch import nn

from fused_res import known
from fused_res.internals import dict_version
from fused_res.originals import AvgPool2d, BatchNorm2d, Conv2d, Identity, ReLU, Sequential

T = TypeVar("T")

_TORCHS = {AvgPool2d, BatchNorm2d, Conv2d, Identity, ReLU, Sequential}
_MOST = 24
"""Modules of a block for which this pays."""
_held = itemgetter("_parameters", "_buffers", "_modules")
_hooks = itemgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Kept(Generic[T]):
    """What was read of a block, and what its modules held then: the block itself is the first of them."""

    def __init__(self, modules: Sequence[nn.Module], found: T, forget: Callable) -> None:
        self.block, self.children, self.found = weakref.ref(modules[0], forget), modules[1:], found
        self.types = list(map(type, self.children))
        self.forwards = [(kind, kind.forward) for kind in set(self.types) - _TORCHS]
        self.hooks = list(chain.from_iterable(map(_hooks, map(vars, self.children))))
        spaces = list(map(vars, modules))
        self.dicts = [*spaces, *chain.from_iterable(map(_held, spaces))]
        self.versions, self.contents = list(map(dict_version, self.dicts)), _contents(self.dicts)

    def holds(self) -> bool:
        if any(self.hooks) or list(map(type, self.children)) != self.types:
            return False
        versions = list(map(dict_version, self.dicts))
        if versions != self.versions:
            # Something was taken away and put back, perhaps, as `fully_shard` does with parameters at every call.
            now = _contents(self.dicts)
            if len(now) != len(self.contents) or not all(map(is_, now, self.contents)):
                return False
            self.versions = versions
        return all(kind.forward is forward for kind, forward in self.forwards)


def _contents(dicts: Sequence[dict]) -> list[object]:
    """Keys and values of all of them."""
    return list(chain.from_iterable(chain.from_iterable(map(dict.items, dicts))))


_kept: dict[int, Kept] = {}
"""By the block's identity."""


def last(block: nn.Module) -> object | None:
    """What `keep` was given last for this block, if it holds still."""
    kept = _kept.get(id(block))
    if kept is None:
        return None
    if kept.holds():
        return kept.found
    _kept.pop(id(block), None)
    return None


def keep(block: nn.Module, found: object) -> bool:
    """Keep what was read of a block and of all modules below it, unless something in them may change without being seen.

    That may be attributes that are edited in place, layers of other classes than torch's and those of `fused_res.known`, or very
    many modules. Returns whether it is kept.
    """
    modules, key = list(block.modules()), id(block)
    if len(modules) > _MOST or not all(map(known.is_known, set(map(type, modules[1:])) - _TORCHS)):
        return False
    if any(isinstance(value, list) for module in modules[1:] for value in vars(module).values()):
        return False
    kept = Kept(modules, found, lambda _: _kept.pop(key, None))
    if any(kept.hooks):
        return False
    _kept[key] = kept
    return True
