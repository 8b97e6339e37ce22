"""The plain formulas of the primitives: any device, any floating-point dtype."""

from collections.abc import Callable

import torch

from fused_res.geometry import Geometry


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"needs a floating-point dtype, got {dtype}"


def preference(device: torch.device) -> int:
    return 1


def level(device: torch.device, dtype: torch.dtype, geometry: Geometry) -> str:
    """The plain formulas gain nothing from a deeper level."""
    return "bn_act"


def find(primitive: str, device: torch.device) -> Callable | None:
    return None
