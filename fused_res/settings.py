"""The environment variables that steer a running program; docs/environment.md says what they do."""

import os


def _one_of(name: str, values: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, default)
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {value!r}")
    return value


def own_convolutions() -> bool:
    """Whether convolutions may be run by kernels of our own."""
    return _one_of("FUSED_RES_CONVOLUTIONS", ("auto", "library"), "auto") == "auto"
