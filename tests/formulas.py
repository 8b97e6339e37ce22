"""Whole blocks on a backend held to the plain formulas under the same schedule."""

import torch

from fused_res import accuracy
from fused_res.tolerance import MARGIN, floor, scatter


def assert_as_accurate_as_the_formulas(make, dtype, backend, level, sign_tolerance=None, seeds=1):
    """On the backend `reference` at the same level, which other tests hold to eager: room for what chance does to so few values.

    make: as for `accuracy.judge`. One seed costs an eighth of that, where a backend is interpreted; a scalar takes more of them.
    """
    sizes, squares = {}, {backend: [], "reference": []}
    for seed in range(seeds):
        block, x, dout = make(seed)
        plain = accuracy._truth(block, x, dout)
        sizes = plain.tensors
        for name, found in squares.items():
            run = accuracy.step(block, x, dout, dtype, name, level, channels_last=True)
            if sign_tolerance is not None:
                accuracy.check_signs(run, plain, sign_tolerance)
            truth = accuracy._truth(block, x, dout, run.signs)
            truth.tensors["out"] = plain.tensors["out"]
            found.append(accuracy._squares(run, truth))
    errors = [accuracy._pooled(found) for found in squares.values()]
    for name, value in sizes.items():
        ours, formulas = (found[name] for found in errors)
        stored = dtype if value.dim() == 4 else torch.float32
        limit = max(MARGIN * scatter(value.numel() * seeds) * formulas, floor(stored))
        assert ours <= limit, f"{name}: {ours:.2e}, the formulas {formulas:.2e}, limit {limit:.2e}"
