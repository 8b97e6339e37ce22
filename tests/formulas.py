"""Whole blocks on a backend held to the plain formulas under the same schedule."""

import torch

from fused_res import accuracy
from fused_res.tolerance import MARGIN, floor, scatter


def assert_as_accurate_as_the_formulas(make, dtype, backend, level, sign_tolerance=None):
    """On the backend `reference` at the same level, which other tests hold to eager, on one seed: room for what chance does to it.

    make: as for `accuracy.judge`. Costs an eighth of that, where a backend is interpreted.
    """
    block, x, dout = make(0)
    plain, errors = accuracy._truth(block, x, dout), []
    for name in (backend, "reference"):
        run = accuracy.step(block, x, dout, dtype, name, level, channels_last=True)
        if sign_tolerance is not None:
            accuracy.check_signs(run, plain, sign_tolerance)
        truth = accuracy._truth(block, x, dout, run.signs)
        truth.tensors["out"] = plain.tensors["out"]
        errors.append(accuracy._pooled([accuracy._squares(run, truth)]))
    for name, value in plain.tensors.items():
        ours, formulas = (found[name] for found in errors)
        stored = dtype if value.dim() == 4 else torch.float32
        limit = max(MARGIN * scatter(value.numel()) * formulas, floor(stored))
        assert ours <= limit, f"{name}: {ours:.2e}, the formulas {formulas:.2e}, limit {limit:.2e}"
