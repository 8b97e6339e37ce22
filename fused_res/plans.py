"""What has been decided in this process. The first decision stands: a block runs again as it ran before.

A checkpoint's recompute depends on that: what the forward saves follows from its level. Above lies what decides
(`fused_res.planner`), below what asks (`fused_res.primitives`).
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_decided: dict[Hashable, object] = {}


def decided(key: Hashable) -> object | None:
    """What stands for this key, or None where nothing has been decided yet."""
    return _decided.get(key)


def decide(key: Hashable, value: T) -> T:
    """Settle a key, unless it is settled; returns what stands. Safe in several threads: they all get the same."""
    return _decided.setdefault(key, value)


@contextmanager
def afresh() -> Iterator[None]:
    """Nothing is decided inside, and what is decided inside is forgotten: for tests and for comparing plans."""
    global _decided
    before, _decided = _decided, {}
    try:
        yield
    finally:
        _decided = before
