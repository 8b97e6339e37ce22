"""What blocks have prepared of their weights for evaluation: kept while every tensor that it follows from stays as it was.

Seen are all changes that PyTorch counts (in-place operations, `load_state_dict`, …), steps of optimizers, which PyTorch does not
count where they are fused, other tensors in the place of those that were there, and other memory behind them (`.data = …`,
`Module.to`). What PyTorch does not count, nobody can see:
writes through `.data`, through `detach().numpy()` and other views of the memory from outside, and by collectives of
`torch.distributed`. After those call `refresh`.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_res import internals

T = TypeVar("T")

_MOST = 4
"""Sizes of images for which a block keeps what it has prepared: the library orders weights for one size each."""
_lock = threading.RLock()


class _Source(NamedTuple):
    """A tensor as it was. A weak reference to it would keep `torch.utils.swap_tensors` from working."""

    tensor: Tensor
    version: int
    pointer: int
    strides: tuple[int, ...]
    storage: StorageWeakRef

    @classmethod
    def of(cls, tensor: Tensor) -> "_Source":
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(tensor, tensor._version, tensor.data_ptr(), tensor.stride(), storage)

    def holds(self, tensor: Tensor) -> bool:
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.pointer
            and tensor.stride() == self.strides
            # Memory that was let go may have been given out again, at the same address.
            and not self.storage.expired()
        )


class _Fold:
    """One owner's. `made` is None where nothing may be kept of these tensors."""

    def __init__(self, owner: object, tensors: Sequence[Tensor]) -> None:
        key = id(owner)
        self.owner = weakref.ref(owner, lambda _: _folds.pop(key, None))
        self.made: dict[tuple, tuple[object, object]] | None = {} if all(map(_is_followed, tensors)) else None
        self.sources = [_Source.of(tensor) for tensor in tensors] if self.made is not None else []
        self.refused = tensors if self.made is None else []

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        if self.made is None:
            return len(self.refused) == len(tensors) and all(a is b for a, b in zip(self.refused, tensors, strict=True))
        if len(self.sources) != len(tensors):
            return False
        return all(source.holds(tensor) for source, tensor in zip(self.sources, tensors, strict=True))


_folds: dict[int, _Fold] = {}


@functools.cache
def _watch_optimizers() -> None:
    """Fused optimizers' steps write past the count: what follows from their parameters is let go after each."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    written = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    if not written:
        return
    for key, fold in list(_folds.items()):
        if any(id(source.tensor) in written for source in fold.sources):
            _folds.pop(key, None)


def _is_followed(tensor: Tensor) -> bool:
    """Whether every change of this tensor can be seen: there is a count, and nobody writes past it."""
    return not (tensor.is_inference() or tensor.is_shared() or internals.is_sharded(tensor))


def find(owner: object, tensors: Sequence[Tensor], call: object, switches: tuple, make: Callable[[], T]) -> T | None:
    """What `make()` returns, or has returned for the same call while none of the tensors has changed.

    Args:
        owner: whose it is; it goes with that.
        tensors: all tensors that it follows from, plain ones.
        call: what else it follows from, the same object for all calls that are alike, and torch's switches.

    Returns:
        None where nothing may be kept for these tensors.
    """
    fold = _folds.get(id(owner))
    if fold is None or not fold.holds(tensors):
        with _lock:
            fold = _folds.get(id(owner))
            if fold is None or not fold.holds(tensors):
                _watch_optimizers()
                fold = _folds[id(owner)] = _Fold(owner, tensors)
    if fold.made is None:
        return None
    key = id(call), switches
    found = fold.made.get(key)
    if found is not None:
        return found[1]
    with _lock:  # threads that start together prepare it once
        found = fold.made.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                found = call, make()
            if fold.holds(tensors):  # else somebody has written meanwhile
                while len(fold.made) >= _MOST:
                    fold.made.pop(next(iter(fold.made)))
                fold.made[key] = found
    return found[1]


def drop(owner: object) -> None:
    """Let go of what is kept for an owner."""
    if _folds:
        _folds.pop(id(owner), None)


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
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module or None, got {type(model).__name__}")
    for module in model.modules():
        drop(module)
