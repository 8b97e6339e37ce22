"""The moment form's steps that multiply on trial: the backend's own kernel against those that other backends lend.

The two steps back through a unit are tried together where they go on to what it reads: the first may leave g A to the second.
"""

import math

import torch
from torch import Tensor

from fused_res import backends
from fused_res.layout import to_rows
from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.choice import Choice, StepCall, lent_steps
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.conv_dgrad import Inflow
from fused_res.primitives.moments import moments
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_tail import Joined, Pointwise, pointwise_tail
from fused_res.primitives.pointwise_tail_backward import (
    Sums,
    TailGradients,
    pointwise_tail_backward_apply,
    pointwise_tail_backward_reduce,
)
from fused_res.primitives.run import PLAIN, Fixed
from fused_res.tuning import synthetic
from fused_res.tuning.convolutions import comparable_inflow
from fused_res.tuning.synthetic import Draw
from fused_res.tuning.trials import INPUTS, Candidate, Measure, Verdict, hold

OWN = "own"
Found = tuple[Tensor, ...] | Sums | Inflow


def shares(call: StepCall, following: StepCall | None) -> bool:
    """Whether the one may leave g A to the other."""
    first, second = "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply"
    if following is None or (call.primitive, following.primitive) != (first, second):
        return False
    return call.operands[4] is not None and call.operands[4] is following.operands[3]


def choices(call: StepCall) -> dict[str, Choice]:
    """The candidates' names, and what they stand for."""
    return {OWN: Choice(True, None, "measured"), **{name: Choice(True, None, "measured", name) for name in lent_steps(call)}}


def perform(call: StepCall, choice: Choice) -> Found:
    """What the primitive returns, run as chosen."""
    run = Fixed(call.backend, choice)
    if call.primitive == "moments":
        return moments(synthetic.renewed(call.operands[0]), run=run)
    if call.primitive == "pointwise_tail":
        main, shortcut, keep_signs = call.operands
        return pointwise_tail(_renewed(main), _renewed(shortcut), keep_signs=keep_signs, run=run)
    if call.primitive == "pointwise_tail_backward_reduce":
        dout, signs, z, mean, scaled = call.operands
        return pointwise_tail_backward_reduce(dout, signs, synthetic.renewed(z), mean, scaled, run=run)
    dout, signs, z, scaled, through, gradients, inner, into = call.operands
    ends = {"inner": inner, "into": into}
    return pointwise_tail_backward_apply(dout, signs, synthetic.renewed(z), scaled, through, gradients, **ends, run=run)


def _renewed(value: object) -> object:
    """With activations that have computed nothing yet."""
    if isinstance(value, Activation):
        return synthetic.renewed(value)
    return type(value)(*map(_renewed, value)) if isinstance(value, tuple) else value


def comparable(call: StepCall, found: Found) -> list[Tensor]:
    """What candidates must agree in. Signs are the candidate's own output's: of them, how many are not.

    Sums that are kept in float64 are of products in float32: as such they are judged.
    """
    if call.primitive == "moments":
        return [tensor.to(statistics_dtype(call.dtype)) for tensor in found]
    if call.primitive == "pointwise_tail":
        out, signs = found
        if signs is None:
            return [out]
        rows = to_rows(out)
        return [out, (unpack_signs(signs, rows.shape[1]) != ~(rows <= 0)).sum().double()]
    if isinstance(found, Sums):
        return [tensor.to(statistics_dtype(call.dtype)) for tensor in (found.total, found.product)]
    _, _, z, *_, inner, _ = call.operands
    return comparable_inflow(found, z if inner else None)


def truth(call: StepCall) -> list[Tensor]:
    """The same in float64, by the plain formulas."""
    wide = call._replace(backend=backends.LIBRARY, dtype=torch.float64, operands=_wide(call.operands))
    return comparable(wide, perform(_fresh(wide), Choice(True)))


def _wide(value: object) -> object:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Activation):
        return Activation(_wide(value.image), _wide(value.vectors), value.stride)
    if not isinstance(value, tuple):
        return value
    parts = map(_wide, value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _fresh(call: StepCall) -> StepCall:
    """With memory of its own for what is written to in place: g A, and what dz joins."""
    if call.primitive != "pointwise_tail_backward_apply":
        return call
    *first, through, gradients, inner, into = call.operands
    through, into = (None if tensor is None else tensor.clone() for tensor in (through, into))
    return call._replace(operands=(*first, through, gradients, inner, into))


def _pointwise(draw: Draw, like: Pointwise) -> Pointwise:
    channels, inner = like.weight.shape[:2]
    vectors = draw.vectors(channels, like.vectors.dtype)
    return Pointwise(synthetic.activation(draw, like.z), draw.weight((channels, inner, 1, 1), like.weight.dtype), vectors)


def _joined(draw: Draw, like: Joined) -> Joined:
    if like.projection is not None:
        return Joined(projection=_pointwise(draw, like.projection))
    image = like.skip if like.y2 is None else like.y2
    found = draw.image(tuple(image.shape), image.dtype)
    return Joined(found) if like.y2 is None else Joined(y2=found, vectors2=draw.vectors(image.shape[1], like.vectors2.dtype))


def _gradients(draw: Draw, like: TailGradients, z: Activation, scaled: Tensor) -> TailGradients:
    """What the last step reads of them: of the sizes that they have behind a BN with random statistics."""
    nothing = dict.fromkeys(TailGradients._fields)
    if like.quadratic is None:
        return TailGradients(**nothing)
    inner = scaled.shape[1]
    quadratic = draw.normal((inner, inner), scaled.dtype, 0.2 * inner**-0.5)
    constant = draw.normal((inner,), statistics_dtype(scaled.dtype), 0.1)
    return TailGradients(**nothing | {"mean": _mean(z), "quadratic": quadratic, "constant": constant})


def _mean(z: Activation) -> Tensor:
    return synthetic.renewed(z).rows(PLAIN).double().mean(0)


def operands(call: StepCall, device: torch.device, seed: int) -> StepCall:
    """The call with random tensors of the same shapes and dtypes, but for g A, which the step before may leave."""
    draw = Draw(seed, device)
    if call.primitive == "moments":
        return call._replace(operands=(synthetic.activation(draw, call.operands[0]),))
    if call.primitive == "pointwise_tail":
        main, shortcut, keep_signs = call.operands
        return call._replace(operands=(_pointwise(draw, main), _joined(draw, shortcut), keep_signs))
    dout, signs, z, *rest = call.operands
    first = draw.image(tuple(dout.shape), dout.dtype), draw.signs(tuple(signs.shape)), synthetic.activation(draw, z)
    channels, inner, dtype = dout.shape[1], z.image.shape[1], z.image.dtype
    scaled = draw.normal((channels, inner), dtype, inner**-0.5)
    if call.primitive == "pointwise_tail_backward_reduce":
        mean, wanted = rest
        return call._replace(operands=(*first, None if mean is None else _mean(first[2]), None if wanted is None else scaled))
    _, _, gradients, ends, into = rest
    into = None if into is None else draw.image(tuple(into.shape), into.dtype)
    return call._replace(operands=(*first, scaled, None, _gradients(draw, gradients, first[2], scaled), ends, into))


def _spoilt(image: Tensor, stride: tuple[int, int] = (1, 1), aside: bool = False) -> Tensor:
    """A copy with a NaN in the first pixel and an infinity in the last one that the stride takes; or `aside`, in the first line's
    last one and the last line's first one.
    """
    found = image.clone()
    line, last = ((size - 1) // step * step for size, step in zip(image.shape[2:], stride, strict=True))
    found[0, 0, 0, last if aside else 0] = math.nan
    found[-1, -1, line, 0 if aside else last] = math.inf
    return found


def _spoilt_activation(z: Activation, aside: bool = False) -> Activation:
    return Activation(_spoilt(z.image, z.stride, aside), z.vectors, z.stride)


def adverse(call: StepCall) -> StepCall:
    """The call with a NaN and an infinity in each of its images, in pixels of their own, and all signs open: none hides another."""
    if call.primitive == "moments":
        return call._replace(operands=(_spoilt_activation(call.operands[0]),))
    if call.primitive == "pointwise_tail":
        main, shortcut, keep_signs = call.operands
        skip, y2, _, side = shortcut
        skip, y2 = (None if image is None else _spoilt(image, aside=True) for image in (skip, y2))
        side = None if side is None else side._replace(z=_spoilt_activation(side.z, aside=True))
        shortcut = shortcut._replace(skip=skip, y2=y2, projection=side)
        return call._replace(operands=(main._replace(z=_spoilt_activation(main.z)), shortcut, keep_signs))
    dout, signs, z, *rest = call.operands
    return call._replace(operands=(_spoilt(dout, aside=True), torch.full_like(signs, 255), _spoilt_activation(z), *rest))


def _draws(call: StepCall, device: torch.device) -> list[StepCall]:
    """The call on each draw of the data, the last of them `ADVERSE`."""
    calls = [operands(call, device, seed) for seed in range(INPUTS)]
    return [*calls, adverse(calls[0])]


def try_step(call: StepCall, device: torch.device, measure: Measure) -> tuple[Choice, Verdict]:
    """The choice for a step, tried on random data of the shapes of its operands, which need have none."""
    calls, able = _draws(call, device), choices(call)

    def candidate(choice: Choice) -> Candidate:
        return Candidate(lambda i: perform(calls[i], choice), lambda i: comparable(calls[i], perform(_fresh(calls[i]), choice)))

    candidates = {name: candidate(choice) for name, choice in able.items()}
    verdict = hold(candidates, OWN, lambda i: truth(calls[i]), device, measure, queued=True)
    return able[verdict.winner], verdict


def try_both(reduce: StepCall, apply: StepCall, device: torch.device, measure: Measure) -> list[tuple[Choice, Verdict]]:
    """The choices for the first and the last step back through a unit, tried together, as a step runs them: where the first one's
    kernel writes g A, it is there for the last one.
    """
    able = [choices(call) for call in (reduce, apply)]
    pairs = {f"{r} + {a}": (able[0][r], able[1][a]) for r in able[0] for a in able[1]}
    calls = list(zip(*(_draws(call, device) for call in (reduce, apply)), strict=True))

    def both(i: int, pair: tuple[Choice, Choice]) -> tuple[Sums, Inflow]:
        first, last = calls[i]
        sums = perform(first, pair[0])
        dout, signs, z, scaled, _, *rest = last.operands
        return sums, perform(last._replace(operands=(dout, signs, z, scaled, sums.through, *rest)), pair[1])

    def results(i: int, pair: tuple[Choice, Choice]) -> list[Tensor]:
        return [tensor for call, found in zip(calls[i], both(i, pair), strict=True) for tensor in comparable(call, found)]

    candidates = {
        name: Candidate(lambda i, pair=pair: both(i, pair), lambda i, pair=pair: results(i, pair)) for name, pair in pairs.items()
    }
    verdict = hold(candidates, f"{OWN} + {OWN}", lambda i: [*truth(calls[i][0]), *truth(calls[i][1])], device, measure, queued=True)
    return [(choice, verdict) for choice in pairs[verdict.winner]]
