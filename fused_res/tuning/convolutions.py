"""One convolution on trial: the library's against the backend's own, with its default tile and with every other, and against those
that other backends lend.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fused_res import backends
from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives.bn_act_backward import masked
from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.choice import Call, Choice, lent_kernels
from fused_res.primitives.conv_dgrad import Inflow, conv_dgrad
from fused_res.primitives.conv_fprop import Convolved, conv_fprop
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.operands import Activation, Gradient
from fused_res.primitives.run import Fixed, of
from fused_res.tuning import synthetic
from fused_res.tuning.trials import INPUTS, Candidate, Measure, Verdict, hold

LIBRARY = "library"


def perform(call: Call, choice: Choice) -> Convolved | Inflow | Tensor:
    """What the primitive returns, run as chosen."""
    return _run(synthetic.anew(call), choice)


def _run(call: Call, choice: Choice) -> Convolved | Inflow | Tensor:
    run = Fixed(call.backend, choice)
    if call.primitive == "conv_fprop":
        x, sums, output = call.operands
        return conv_fprop(x, call.unit, statistics=sums, output=output, run=run)
    if call.primitive == "conv_dgrad":
        dy, like, inner, add = call.operands
        return conv_dgrad(dy, like, call.unit, inner=inner, add=add, run=run)
    dy, x = call.operands
    return conv_wgrad(dy, x, call.unit, run=run)


def comparable(call: Call, found: Convolved | Inflow | Tensor) -> list[Tensor]:
    """What candidates for a convolution must agree in: of partial sums their total, and of a gradient that the next kernel is to
    mask the masked one.
    """
    if isinstance(found, Convolved):
        if found.partials is None:
            return [found.image]
        image = found.image
        pixels = image.numel() // image.shape[1]
        vectors = bn_finalize(found.partials, found.rows, pixels, None, None, 1e-5, run=of(backends.LIBRARY))
        return [image, vectors[0], vectors[1]]
    return comparable_inflow(found, call.operands[2]) if isinstance(found, Inflow) else [found]


def comparable_inflow(found: Inflow, inner: Activation | None) -> list[Tensor]:
    """Likewise of a gradient. inner: the activation whose ReLU is to mask it."""
    if found.partials is None:
        return [found.image]
    if found.masked:
        return [found.image, *found.partials.sum(0)]
    image = nhwc(found.image)
    n, _, h, w = image.shape
    g = masked(to_rows(image), to_rows(inner.image), inner.vectors, None)
    return [to_image(g.to(image.dtype), n, h, w), *found.partials.sum(0)]


def truth(call: Call) -> list[Tensor]:
    """The same in float64, by the plain formulas."""
    wide = synthetic.anew(call, torch.float64)._replace(backend=backends.LIBRARY)
    return comparable(wide, perform(wide, Choice(False)))


def variants(call: Call) -> list[Call]:
    """The call, and as it will be if the convolution that made its gradient has masked it already."""
    dy = call.operands[0]
    if isinstance(dy, Gradient) and dy.coefficients is not None and dy.signs is None and not dy.masked:
        return [call, call._replace(operands=(replace(dy, masked=True), *call.operands[1:]))]
    return [call]


def tiles(call: Call) -> Sequence[tuple]:
    """The tiles worth trying for the kernel of `call.backend`."""
    found = getattr(backends.load(call.backend), "tiles", None)
    if found is None:
        return ()
    first = call.operands[0].image
    n, _, height, width = first.shape if call.primitive != "conv_dgrad" else call.operands[1].shape
    if call.primitive == "conv_fprop":
        height, width = call.unit.output_size(height, width)
    return found(call.primitive, call.unit.weight, n * height * width, call.operands)


def choices(call: Call) -> dict[str, Choice]:
    """The candidates' names, and what they stand for."""
    found = {LIBRARY: Choice(False, why="measured")}
    for name, lender in [("own", ""), *((name, name) for name in lent_kernels(call))]:
        found[name] = Choice(True, None, "measured", lender)
        able = tiles(call._replace(backend=lender or call.backend))
        found |= {f"{name} {tuple(tile)}": Choice(True, tile, "measured", lender) for tile in able}
    return found


def shares(call: Call, following: Call | None) -> bool:
    """Whether both gradients of a convolution follow from one that is still to be computed: what one computes of it serves both."""
    if following is None or (call.primitive, following.primitive) != ("conv_wgrad", "conv_dgrad"):
        return False
    return call.operands[0] is following.operands[0] and call.operands[0].coefficients is not None


def try_both(wgrad: Call, dgrad: Call, device: torch.device, measure: Measure) -> list[tuple[Choice, Verdict]]:
    """The choices for two calls that share their gradient, tried together, as a step runs them: the library's convolution of either
    needs its values in memory, which the other one then finds there.

    Of all kernels but the library's only the one, with the tile, that is the fastest by itself takes part.
    """
    alone = [try_convolution(call, device, measure)[1] for call in (wgrad, dgrad)]
    able: list[dict[str, Choice]] = []
    for call, verdict in zip((wgrad, dgrad), alone, strict=True):
        own = {name: time for name, time in verdict.seconds.items() if name != LIBRARY and name not in verdict.rejected}
        found, best = choices(call), min(own, key=own.__getitem__, default=None)
        able.append({LIBRARY: found[LIBRARY]} | ({} if best is None else {best: found[best]}))
    pairs = {f"{w} + {d}": (able[0][w], able[1][d]) for w in able[0] for d in able[1]}
    calls = list(zip(*(_draws(call, device) for call in (wgrad, dgrad)), strict=True))

    def both(i: int, pair: tuple[Choice, Choice]) -> list[Convolved | Inflow | Tensor]:
        first, second = (synthetic.anew(call) for call in calls[i])
        second = second._replace(operands=(first.operands[0], *second.operands[1:]))
        return [_run(first, pair[0]), _run(second, pair[1])]

    def results(i: int, pair: tuple[Choice, Choice]) -> list[Tensor]:
        return [tensor for call, found in zip(calls[i], both(i, pair), strict=True) for tensor in comparable(call, found)]

    candidates = {
        name: Candidate(lambda i, pair=pair: both(i, pair), lambda i, pair=pair: results(i, pair)) for name, pair in pairs.items()
    }
    incumbent = f"{LIBRARY} + {LIBRARY}"
    verdict = hold(candidates, incumbent, lambda i: [*truth(calls[i][0]), *truth(calls[i][1])], device, measure, queued=True)
    return [(choice, verdict) for choice in pairs[verdict.winner]]


def _draws(call: Call, device: torch.device) -> list[Call]:
    """The call on each draw of the data, the last of them `ADVERSE`."""
    calls = [synthetic.operands(call, device, seed) for seed in range(INPUTS)]
    return [*calls, synthetic.adverse_operands(calls[0])]


def try_convolution(call: Call, device: torch.device, measure: Measure) -> tuple[Choice, Verdict]:
    """The choice for a convolution, tried on random data of the shapes of its operands, which need have none."""
    calls = _draws(call, device)
    able = choices(call)

    def candidate(choice: Choice) -> Candidate:
        return Candidate(lambda i: perform(calls[i], choice), lambda i: comparable(calls[i], perform(calls[i], choice)))

    candidates = {name: candidate(choice) for name, choice in able.items()}
    verdict = hold(candidates, LIBRARY, lambda i: truth(calls[i]), device, measure, queued=True)
    return able[verdict.winner], verdict
