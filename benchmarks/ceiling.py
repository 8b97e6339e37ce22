"""What this machine can do at most, measured: copy bandwidth and matrix product, and where a peer stands below them."""

import functools
from collections.abc import Callable

import torch

from fused_res import environment
from fused_res.benchmarks.clocks import Clock

REPEATS, SLACK = 7, 1.05
"""Best of so many repeats; a rate may be above what they found by so much, the noise of the measurement."""
BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
SIDE = {"cpu": 1536, "cuda": 8192}


def _best(clock: Clock, call: Callable[[], object], repeats: int) -> float:
    call()
    return min(clock.time(call).ms for _ in range(repeats)) * 1e-3


def measure(device: torch.device, dtype: torch.dtype, clock: Clock, repeats: int = REPEATS) -> dict:
    """`bytes_per_s`: a large copy, read and write; `flops_per_s`: a large square matrix product in this dtype."""
    size, n = BYTES[device.type], SIDE[device.type]
    name = environment.dtype_name(dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = _best(clock, functools.partial(target.copy_, source), repeats)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product_seconds = _best(clock, functools.partial(torch.matmul, a, b), repeats)
    return {
        "bytes_per_s": 2 * size / copy_seconds,
        "flops_per_s": 2 * n**3 / product_seconds,
        "how": f"best of {repeats}: copy of {size >> 20} MiB; {n} x {n} matrix product in {name}",
    }


def higher(one: dict, other: dict) -> dict:
    """Of two measurements the higher rates."""
    return one | {name: max(one[name], other[name]) for name in ("bytes_per_s", "flops_per_s")}


def rates(row: dict) -> dict[str, float]:
    """What a row's time makes of its bytes and FLOPs, where they are counted."""
    seconds = row["ms"]["median"] * 1e-3
    found = {"flops_per_s": row["flops"], "bytes_per_s": row["bytes"]}
    return {name: amount / seconds for name, amount in found.items() if amount is not None}


def excess(row: dict, ceiling: dict) -> list[str]:
    """The rates of a row that are above what was measured."""
    return [name for name, rate in rates(row).items() if rate > SLACK * ceiling[name]]


def place(row: dict, ceiling: dict) -> dict:
    """A row's rates and its share of the roofline: `max(flops / peak, bytes / bandwidth) / time`.

    A rate above its ceiling is not reported, and no share with it: `refused` says so. On a CPU that happens where tensors stay
    in its caches, which a large copy does not, and on any machine where the library saves multiplications (Winograd).
    """
    found, beyond = rates(row), excess(row, ceiling)
    unit = {"flops_per_s": ("TFLOP/s", 1e12), "bytes_per_s": ("GB/s", 1e9)}
    refused = [f"{found[n] / unit[n][1]:.3g} {unit[n][0]} against {ceiling[n] / unit[n][1]:.3g} measured" for n in beyond]
    shares = {name: rate / ceiling[name] for name, rate in found.items()}
    return {
        **{name: None if name in beyond else found.get(name) for name in unit},
        "share": max(shares.values()) if shares and not beyond else None,
        "bound": max(shares, key=shares.get).removesuffix("_per_s") if shares else None,
        "refused": "; ".join(refused) or None,
    }
