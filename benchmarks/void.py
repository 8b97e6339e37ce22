"""What times are worth: those of a backend at a level are void where a test of it failed, or it computed something wrong."""

import re
from collections.abc import Iterable, Iterator

from fused_res.benchmarks.peers import level_peer
from fused_res.planner import LEVELS

BACKENDS = ("triton", "native")
_FIRST_LEVEL = {"conv_": "epilogue", "moment": "moment", "pointwise": "moment"}
"""The first level that uses the kernels whose test files begin so; all levels use the others."""

Way = tuple[str, str]
"""A backend and a level."""


def ways_of(test: str) -> list[Way]:
    """What a failed test makes void: the backend and level that its parameters name, or all that use the kernels it is about."""
    parameters = re.split(r"[\s\[\]-]", test.partition("[")[2])
    levels = [level for level in LEVELS if level in parameters]
    if not levels:
        stem = re.search(r"test_(\w+)\.py", test)
        first = next((level for start, level in _FIRST_LEVEL.items() if stem and stem[1].startswith(start)), LEVELS[0])
        levels = LEVELS[LEVELS.index(first) :]
    backends = [backend for backend in BACKENDS if backend in parameters] or BACKENDS
    return [(backend, level) for backend in backends for level in levels]


def by_tests(outcomes: dict[str, dict]) -> dict[Way, list[str]]:
    """The ways that failed tests make void, and these tests."""
    void: dict[Way, list[str]] = {}
    for test, outcome in outcomes.items():
        for way in ways_of(test) if outcome["outcome"] == "failed" else ():
            void.setdefault(way, []).append(test)
    return void


def by_rows(rows: Iterable[dict]) -> Iterator[tuple[Way, str]]:
    """The ways that failed in a measured case, and where: what is wrong there is not to be trusted elsewhere."""
    for row in rows:
        for level in LEVELS if row.get("failed") else ():
            if row["peer"] == level_peer(level):
                yield from (((backend, level), f"{row['case']}, batch {row['batch']}") for backend in BACKENDS)


def is_void(row: dict, void: Iterable[Way]) -> bool:
    """Whether a row that was measured is of such a way."""
    return any(tuple(way.split(", ")) in void for way in (row.get("backend") or "").split("; "))
