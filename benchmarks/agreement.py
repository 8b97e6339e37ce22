"""Whether the peers compute the same: results of fused_res against eager's, before and after they are timed."""

import torch
from torch import Tensor

from fused_res.benchmarks.peers import Peer, Refusal, Setup, blamed, is_ours

ORACLES = ("eager channels_last", "eager NCHW")
DRIFT, MOST = 3.0, 0.9
"""A network's results may differ by DRIFT times what eager's own two layouts differ by, and by no more than MOST: a gradient of
zeros differs by 1. A ReLU's sign that flips meets one parameter in one run and another in the next, so that every gradient may
differ as much as the one of eager's that differs most."""


class NoOracleError(RuntimeError):
    """Eager does not run, so that no result can be compared with its."""


def unit_roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Half an ulp of 1: TF32's for fp32 on a GPU where the convolutions may use it."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return 2.0**-11
    return torch.finfo(dtype).eps / 2


def tolerance(quantity: str, unit: float) -> float:
    """Largest relative L2 difference between two right answers that round differently; coarse, `fused-res check` is exact.

    4 roundings u for what is computed forward, or fp32's own noise in deep sums. A gradient sees the ReLUs' signs: rounding
    flips a fraction of them in proportion to u, and a flip is an error of 100 %, so its L2 error goes with sqrt(u); in fp32 a
    handful of flips in all may still be 0.5 % of a small parameter's gradient.
    """
    return max(2 * unit**0.5, 5e-3) if quantity.startswith("d ") else max(4 * unit, 2.0**-16)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, in L2; NaN where either is not finite."""
    value, truth = value.detach().to(torch.float64), truth.detach().to(torch.float64)
    size = torch.linalg.vector_norm(truth)
    return float(torch.linalg.vector_norm(value - truth) / size.clamp_min(torch.finfo(torch.float64).tiny))


def buffers(peer: Peer) -> dict[str, Tensor]:
    """A copy of the module's running statistics."""
    return {} if peer.module is None else {name: buffer.clone() for name, buffer in peer.module.named_buffers()}


def quantities(peer: Peer, i: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a step returns that starts from the given running statistics, and what they are after it."""
    if peer.module is not None and peer.module.training:
        for name, buffer in peer.module.named_buffers():
            if name in start:
                buffer.copy_(start[name])
    found = peer.step(i)
    if peer.module is not None and peer.module.training:
        found |= {name: buffer for name, buffer in peer.module.named_buffers() if buffer.is_floating_point()}
    return found


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor], limits: dict[str, float]) -> tuple[float, str | None]:
    """Largest relative error over a step's quantities, and what is beyond its limit, or None."""
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    wrong = [name for name, error in errors.items() if not error <= limits[name]]
    complaint = ", ".join(f"{name}: relative error {errors[name]:.2g} > {limits[name]:.2g}" for name in wrong[:4])
    finite = [error for error in errors.values() if error == error]
    return max(finite) if len(finite) == len(errors) else float("nan"), complaint or None


def network_limits(limits: dict[str, float], natural: dict[str, float]) -> dict[str, float]:
    """What the quantities of a network may differ by, where eager's own layouts differ by `natural`."""
    gradients = max((error for name, error in natural.items() if name.startswith("d ")), default=0.0)
    usual = {name: gradients if name.startswith("d ") else error for name, error in natural.items()}
    return {name: min(max(limit, DRIFT * usual[name]), MOST) for name, limit in limits.items()}


def compare(ready: dict[str, Peer], refusals: dict[str, Refusal], setup: Setup, i: int) -> dict[str, float]:
    """Largest relative error of each whole-block peer against eager, from eager's running statistics.

    How many steps a peer has run before does not matter: some warm up more often, or are replayed as graphs beside.

    In a network roundings grow from block to block: what two right implementations may differ by is learnt from eager's two
    layouts. A peer that is wrong is taken out of `ready`, and joins the refusals: its times would mean nothing.

    Raises:
        NoOracleError: eager does not run.
        peers.StepFailedError, peers.DeviceLostError: a peer has failed in its step.
    """
    ran = [name for name in ORACLES if name in ready]
    if not ran:
        said = {name: refusal.reason for name, refusal in refusals.items()}
        raise NoOracleError(f"{setup.case.name}: eager does not run here, so nothing can be compared with it: {said}")
    oracle, unit, errors = ran[0], unit_roundoff(setup.dtype, setup.device), {ran[0]: 0.0}
    start = buffers(ready[oracle])
    with blamed(oracle, setup.device):
        wanted = quantities(ready[oracle], i, start)
    limits = {name: tolerance(name, unit) for name in wanted}
    if setup.case.is_network:
        if len(ran) < 2:
            raise NoOracleError(f"{setup.case.name}: a network is judged by eager in both layouts, got {ran[0]} alone")
        with blamed(ran[1], setup.device):
            other = quantities(ready[ran[1]], i, start)
            errors[ran[1]] = difference(other, wanted, limits)[0]
        limits = network_limits(limits, {name: relative_error(other[name], wanted[name]) for name in wanted})
    for name in [name for name, peer in ready.items() if peer.comparable and name not in errors]:
        with blamed(name, setup.device):
            errors[name], complaint = difference(quantities(ready[name], i, start), wanted, limits)
        if complaint:
            del ready[name]
            refusals[name] = Refusal(f"differs from {oracle}: {complaint}", failed=is_ours(name))
    return errors
