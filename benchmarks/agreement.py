"""Whether the peers compute the same: results of fused_res against eager's, before and after they are timed."""

import torch
from torch import Tensor

from fused_res.benchmarks.peers import Peer, Setup

ORACLE = ("eager channels_last", "eager NCHW")


class ResultMismatchError(RuntimeError):
    """fused_res computed something else than eager: its times would mean nothing."""


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


def quantities(peer: Peer, results: list[Tensor]) -> dict[str, Tensor]:
    """Names for what a step returned, and the module's running statistics as they are after it."""
    names = ["out", "d x", *(f"d {name}" for name, _ in peer.module.named_parameters())]
    found = dict(zip(names, results, strict=False))
    if peer.module.training:
        found |= {name: buffer for name, buffer in peer.module.named_buffers() if buffer.is_floating_point()}
    return found


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor], unit: float) -> tuple[float, str | None]:
    """Largest relative error over a step's quantities, and what is beyond tolerance, or None."""
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    wrong = [name for name, error in errors.items() if not error <= tolerance(name, unit)]
    complaint = ", ".join(f"{name}: relative error {errors[name]:.2g} > {tolerance(name, unit):.2g}" for name in wrong)
    finite = [error for error in errors.values() if error == error]
    return max(finite) if len(finite) == len(errors) else float("nan"), complaint or None


def compare(ready: dict[str, Peer], reasons: dict[str, str], setup: Setup, i: int) -> dict[str, float]:
    """Largest relative error of each whole-block peer against eager, every one having run the same steps before.

    A peer that is wrong is taken out of `ready`; fused_res raises.
    """
    oracle = next((name for name in ORACLE if name in ready), None)
    if oracle is None:
        raise ResultMismatchError(f"{setup.case.name}: eager does not run here, so nothing can be compared with it: {reasons}")
    unit, errors = unit_roundoff(setup.dtype, setup.device), {oracle: 0.0}
    wanted = quantities(ready[oracle], ready[oracle].step(i))
    for name in [name for name, peer in ready.items() if peer.module is not None and name != oracle]:
        errors[name], complaint = difference(quantities(ready[name], ready[name].step(i)), wanted, unit)
        if complaint and name == "fused_res":
            raise ResultMismatchError(f"{setup.case.name}, batch {setup.batch}: fused_res differs from {oracle}: {complaint}")
        if complaint:
            del ready[name]
            reasons[name] = f"differs from {oracle}: {complaint}"
    return errors
