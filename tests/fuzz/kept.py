"""Failures that were found once, as hypothesis shrank them: they are held for ever."""

KEPT: list[tuple[str, str, tuple]] = []
"""Name of the target, backend, case."""
