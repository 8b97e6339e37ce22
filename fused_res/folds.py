"""What blocks have prepared of their weights for evaluation: kept while every tensor that it follows from stays as it was.

Seen are all changes that PyTorch counts (in-place operations, `load_state_dict`, …), steps of optimizers, which PyTorch does not
count where they are fused, other tensors in the place of those that were there, and other memory behind them (`.data = …`,
`Module.to`). What PyTorch does not count, nobody can see: writes through `.data`, through `detach().numpy()` and other views of the
memory from outside, and by collectives of `torch.distributed`. After those call `refresh`.

What a block has prepared goes with the block. Compiled graphs and exported programs know of no block: what is prepared for these is
found by the weights, and goes when nobody else holds one of them. The vectors beside these may be others there at every call, since
compilers make constants anew whose elements are all alike: of vectors the values count, too.
"""

import functools
import gc
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_res import internals

T = TypeVar("T")

_MOST = 4
"""Heights and widths of images for which a block keeps what it has prepared: the library orders weights for one size each."""
_MOST_CALLS = 64
"""Calls, of any batch size, for which it is remembered which of these is theirs."""
_ENOUGH = 2
"""Times that something was prepared for nothing, after which weights without an owner are taken to be others at every call."""
_PATIENCE = 64
"""Such calls after which it is tried once more: the weights may be there to stay by now."""
_version = operator.attrgetter("_version")
_lock = threading.RLock()


class Sources:
    """Tensors as they were. Weak references to them would keep `torch.utils.swap_tensors` from working."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.versions, self.places, self.strides = _versions(tensors), _places(tensors), _strides(tensors)
        # Memory that was let go may have been given out again, at the same address.
        self.storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same ones, as they were."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(operator.is_, tensors, self.tensors))
            and _versions(tensors) == self.versions
            and _places(tensors) == self.places
            and _strides(tensors) == self.strides
            and not internals.any_expired(self.storages)
        )

    def are_unchanged(self) -> bool:
        """Of these very tensors, in the strides that they had, whether they are as they were."""
        tensors = self.tensors
        if list(map(_version, tensors)) != self.versions or list(map(Tensor.data_ptr, tensors)) != self.places:
            return False
        return not internals.any_expired(self.storages)

    def hold_one(self, i: int, tensor: Tensor) -> bool:
        """Whether this is the one at place i, as it was."""
        if tensor is not self.tensors[i] or tensor._version != self.versions[i] or tensor.data_ptr() != self.places[i]:
            return False
        return tensor.stride() == self.strides[i] and not internals.any_expired(self.storages[i : i + 1])


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_version, tensors))


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _strides(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in tensors]


class _Fold:
    """One owner's, or that of tensors without one. `made` is None where nothing may be kept of these tensors."""

    def __init__(self, key: object, owner: object | None, tensors: Sequence[Tensor]) -> None:
        self.owner = None if owner is None else weakref.ref(owner, lambda _: _folds.pop(key, None))
        self.used = False
        self.made: dict[tuple, object] | None = {} if all(map(_is_followed, tensors)) else None
        self.calls: dict[tuple, tuple[object, object]] = {}
        self.beside: dict[Hashable, object] = {}
        self.sources = Sources([] if self.made is None else tensors)
        self.refused = tensors if self.made is None else []
        self.values = None if owner is not None else [t.detach().clone() if t.dim() < 2 else None for t in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        if self.made is None:
            return len(self.refused) == len(tensors) and all(a is b for a, b in zip(self.refused, tensors, strict=True))
        if self.sources.hold(tensors):
            return True
        if self.values is None or len(tensors) != len(self.values):
            return False
        found = enumerate(zip(self.values, tensors, strict=True))
        return all(self.sources.hold_one(i, tensor) or _are_alike(values, tensor) for i, (values, tensor) in found)

    def keep(self, key: tuple, found: tuple[object, object], which: tuple) -> None:
        """Keep what was made for a call and its kind, and let go of what goes beyond the bounds."""
        if which not in self.made and len(self.made) >= _MOST:
            self.made.pop(next(iter(self.made)))
            self.calls.clear()
            self.beside.clear()
        if len(self.calls) >= _MOST_CALLS:
            self.calls.clear()
        self.made[which] = found[1]
        self.calls[key] = found

    def is_left(self) -> bool:
        """Whether it is nobody's, and nobody else has one of its tensors any more, so that it cannot be asked for again."""
        if self.owner is not None:
            return False
        # Held by the fold, and by the call that counts.
        held = self.sources.tensors
        return any(held[i].dim() > 1 and sys.getrefcount(held[i]) == 2 for i in range(len(held)))


def _are_alike(values: Tensor | None, tensor: Tensor) -> bool:
    return values is not None and values.dtype == tensor.dtype and values.shape == tensor.shape and torch.equal(values, tensor)


_folds: dict[int | tuple[int, ...], _Fold] = {}
"""By the owner's identity, or where there is none by those of the weights, which live as long as the fold."""
_told: "weakref.WeakSet" = weakref.WeakSet()
"""Who keeps more of what was prepared."""
_wasted: dict[int, "_Waste"] = {}
"""By the identity of a call: what was prepared for it and let go without having been used again."""


class _Waste:
    """The call itself, how often that was, and how many calls have been refused since."""

    def __init__(self, call: object) -> None:
        self.call, self.times, self.refused = call, 0, 0

    def refuses(self) -> bool:
        if self.times < _ENOUGH:
            return False
        self.refused = (self.refused + 1) % _PATIENCE
        return self.refused > 0


@functools.cache
def _watch() -> None:
    """Fused optimizers' steps write past the count: what follows from their parameters is let go after each. What is left of
    tensors that nobody has any more goes with Python's garbage.
    """
    register_optimizer_step_post_hook(_after_step)
    gc.callbacks.append(_after_collection)


def _after_collection(phase: str, about: dict) -> None:
    if phase == "stop" and about["generation"] == 2:
        _sweep()


def _sweep() -> None:
    for key, fold in list(_folds.items()):
        if fold.is_left():
            _folds.pop(key, None)
            for call, _ in [] if fold.used else list(fold.calls.values()):
                _wasted.setdefault(id(call), _Waste(call)).times += 1


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    written = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    if written:
        _drop_of(written)


def _is_followed(tensor: Tensor) -> bool:
    """Whether every change of this tensor can be seen: there is a count, and nobody writes past it."""
    return not (tensor.is_inference() or tensor.is_shared() or internals.is_sharded(tensor))


def find(
    owner: object | None,
    tensors: Sequence[Tensor],
    call: object,
    switches: tuple,
    kind: Callable[[], Hashable],
    make: Callable[[], T],
) -> T | None:
    """What `make()` returns, or has returned for a call of the same kind while none of the tensors has changed.

    Args:
        owner: whose it is; it goes with that. None: it is that of the weights among the tensors, and goes with them.
        tensors: all tensors that it follows from, plain ones.
        call: the same object for all calls that are alike; with `switches`, torch's, all else that the kind follows from.
        kind: asked once for such calls. Calls of one kind share what was made.

    Returns:
        None where nothing may be kept for these tensors, or the weights are others at every call.
    """
    whose = id(owner) if owner is not None else _weights(tensors)
    fold = _folds.get(whose)
    if fold is None or not fold.holds(tensors):
        with _lock:
            fold = _folds.get(whose)
            if fold is None or not fold.holds(tensors):
                if owner is None:
                    _sweep()
                    waste = _wasted.get(id(call))
                    if (waste is not None and waste.refuses()) or not all(map(_is_followed, tensors)):
                        return None
                _watch()
                fold = _folds[whose] = _Fold(whose, owner, tensors)
    if fold.made is None:
        return None
    key = id(call), switches
    found = fold.calls.get(key)
    if found is not None:
        if not fold.used:
            fold.used = True
            _wasted.pop(id(call), None)
        return found[1]
    with _lock:  # threads that start together prepare it once
        found = fold.calls.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                which = switches, kind()
                found = call, fold.made[which] if which in fold.made else make()
            if fold.holds(tensors):  # else somebody has written meanwhile
                fold.keep(key, found, which)
    return found[1]


def _weights(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """By which tensors without an owner are found."""
    return tuple([id(tensor) for tensor in tensors if tensor.dim() > 1])


def beside(owner: object | None, tensors: Sequence[Tensor] = (), made: object = None) -> dict[Hashable, object] | None:
    """A place beside what is kept for an owner, which is let go with it; None where nothing is kept, or a tensor has changed.

    Whoever asks has seen that they are still the same tensors, in the same strides; without an owner, that they are in the same
    strides if these are the same. made: what has to be among what is kept, for who puts something there: another thread may have
    written since. Who gives none looks for what is there.
    """
    fold = _folds.get(id(owner) if owner is not None else _weights(tensors))
    if fold is None or not fold.made or not fold.sources.are_unchanged():
        return None
    if owner is None and not (len(tensors) == len(fold.sources.tensors) and all(map(operator.is_, tensors, fold.sources.tensors))):
        return None
    if made is not None and not any(kept is made for kept in list(fold.made.values())):
        return None
    if made is None and not fold.used:
        fold.used = True
        for call, _ in list(fold.calls.values()):
            _wasted.pop(id(call), None)
    if len(fold.beside) >= _MOST_CALLS:
        fold.beside.clear()
    return fold.beside


def tell(keeper: object) -> None:
    """Have `keeper.forget(tensors)` called whenever what follows from these, given by their identities, is to be let go of; or
    `keeper.forget()`, of all.
    """
    _told.add(keeper)


def drop(owner: object) -> None:
    """Let go of what is kept for an owner."""
    if _folds:
        _folds.pop(id(owner), None)


def _drop_of(tensors: set[int]) -> None:
    """Let go of what follows from one of these tensors, given by their identities."""
    for key, fold in list(_folds.items()):
        if any(id(tensor) in tensors for tensor in fold.sources.tensors):
            _folds.pop(key, None)
    for keeper in list(_told):
        keeper.forget(tensors)


def refresh(model: nn.Module | None = None) -> None:
    """Let go of all that the blocks of a model (None: of all models) have prepared of their weights for evaluation.

    In evaluation without gradients, on a CPU, a block folds its BNs and orders its weights once, and looks at every call whether a
    parameter or buffer has changed. That sees whatever PyTorch counts: in-place operations, optimizers, `load_state_dict`, new
    parameters, `Module.to`. It does not see writes through `.data` (`p.data.mul_(2)`), through NumPy and DLPack, or by collectives
    such as `torch.distributed.broadcast`: after those call this, and the next call prepares anew.

    Raises:
        TypeError: model is not an `nn.Module`.
    """
    if model is None:
        _folds.clear()
        for keeper in list(_told):
            keeper.forget()
        _wasted.clear()
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module or None, got {type(model).__name__}")
    for module in model.modules():
        drop(module)
    _drop_of({id(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors})
