"""What has been decided in this process. The first decision stands: a block runs again as it ran before.

A checkpoint's recompute depends on that: what the forward saves follows from its level. Above lies what decides
(`fused_res.planner`, `fused_res.tuning.tuner`), below what asks (`fused_res.primitives`).
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_decided: dict[Hashable, object] = {}
_derived: dict[Hashable, object] = {}
_MOST_DERIVED = 1024
_remember: Callable[[Hashable], object | None] | None = None
_age = object()


def age() -> object:
    """One and the same object for as long as what has been decided stands."""
    return _age


def decided(key: Hashable) -> object | None:
    """What stands for this key, or None where nothing has been decided yet."""
    return _decided.get(key)


def decide(key: Hashable, value: T) -> T:
    """Settle a key, unless it is settled; returns what stands. Safe in several threads: they all get the same."""
    return _decided.setdefault(key, value)


def forget() -> None:
    """Settle everything anew from here on: for those who know that no recompute is to come of what ran before."""
    global _age
    _age = object()
    _decided.clear()
    _derived.clear()


def derived(key: Hashable) -> object | None:
    """What was derived from decisions under this key, or None."""
    return _derived.get(key)


def derive(key: Hashable, value: T) -> T:
    """Keep what follows from decisions and can be derived again; not for ever, since images may come in any number of sizes."""
    if len(_derived) >= _MOST_DERIVED:
        _derived.clear()
    return _derived.setdefault(key, value)


def remember_by(recall: Callable[[Hashable], object | None] | None) -> None:
    """Have `ask` look for what an earlier process decided: it calls `recall` with a key and gets the decision, or None."""
    global _remember
    _remember = recall


def remembers() -> bool:
    """Whether decisions other than the defaults can stand."""
    return _remember is not None


def ask(key: Hashable, default: T) -> T:
    """What stands for this key; where nothing does, settle it: as an earlier process did, or else by the default."""
    found = _decided.get(key)
    if found is None:
        found = None if _remember is None else _remember(key)
        found = decide(key, default if found is None else found)
    return found


@contextmanager
def afresh() -> Iterator[None]:
    """Nothing is decided inside, and what is decided inside is forgotten: for tests and for comparing plans."""
    global _decided, _derived, _remember, _age
    before = _decided, _derived, _remember, _age
    _decided, _derived, _remember, _age = {}, {}, None, object()
    try:
        yield
    finally:
        _decided, _derived, _remember, _age = before
