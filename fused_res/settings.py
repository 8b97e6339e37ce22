"""The environment variables that steer a running program; docs/environment.md says what they do."""

import os


def _one_of(name: str, values: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, default)
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r}")
    return value


def convolutions() -> str:
    """Who runs the convolutions that a kernel of our own could run: `"library"`, `"own"`, or `"auto"`, as sizes say."""
    return _one_of("FUSED_RES_CONVOLUTIONS", ("auto", "library", "own"), "auto")


def tune() -> bool:
    """Whether blocks are tuned at their first call."""
    return _one_of("FUSED_RES_TUNE", ("0", "1"), "0") == "1"


def cache_folder() -> str | None:
    """Where tuned plans are kept: a path, the empty string for nowhere, or None for the usual place."""
    return os.environ.get("FUSED_RES_CACHE")


def cpu_capability() -> str | None:
    """The instruction set that was asked for; the compiled library reads the variable itself."""
    return os.environ.get("FUSED_RES_CPU_CAPABILITY")
