"""Which convolutions a block asks for at a level, and what it keeps: its schedules run once, on tensors without data."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import backends
from fused_res.block.backward import Gradients, backward
from fused_res.block.forward import Saved, forward
from fused_res.block.packing import pack, unpack
from fused_res.primitives.choice import Call, StepCall
from fused_res.primitives.run import Recording
from fused_res.spec import FORMS, Block, ConvBN


class Asked(NamedTuple):
    """A convolution: the number of its unit in `block.units()`, and the call, whose operands have no data."""

    unit: int
    call: Call


def _meta(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("meta")


def _without_data(unit: ConvBN | None) -> ConvBN | None:
    if unit is None:
        return None
    return unit._replace(**{name: _meta(value) for name, value in unit._asdict().items() if isinstance(value, Tensor)})


def _bare(block: Block) -> Block:
    return block._replace(main=[_without_data(unit) for unit in block.main], projection=_without_data(block.projection))


def _recorded(
    x: Tensor, residual_scale: Tensor | None, block: Block, level: str, backend: str, training: bool
) -> tuple[Recording, Block]:
    """What is asked for, and the block without data for which that is."""
    image, scale, bare = _meta(x), _meta(residual_scale), _bare(block)
    skip = image.new_empty(block.output_shape(x)) if block.given else None
    run = Recording(backend)
    with torch.no_grad():
        out, saved = forward(image, skip, scale, bare, level, training, run)
        if training:
            tensors, spec, eps = pack(bare)
            needs = Gradients(True, skip is not None, scale is not None, unpack([True] * len(tensors), spec, eps))
            backward(out, image, scale, bare, Saved.from_list(saved, bare, level), needs, level, run)
    return run, bare


def convolutions(x: Tensor, residual_scale: Tensor | None, block: Block, level: str, backend: str, training: bool) -> list[Asked]:
    """The convolutions of a forward and, if `training`, of a backward to everything, in order.

    Args:
        x: [N, C, H, W]; x and the block's tensors in the dtypes of the operator. Their values are not read.
        level, backend: as the operator takes them.

    Returns:
        The calls, with the block's own weights.
    """
    run, bare = _recorded(x, residual_scale, block, level, backend, training)
    units = {id(unit.weight): i for i, unit in enumerate(bare.units())}
    numbered = ((units[id(call.unit.weight)], call) for call in run.calls)
    return [Asked(i, call._replace(unit=call.unit._replace(weight=block.units()[i].weight))) for i, call in numbered]


def steps(x: Tensor, residual_scale: Tensor | None, block: Block, level: str, backend: str, training: bool) -> list[StepCall]:
    """The steps of the moment form that backends lend each other, of the same forward and backward, in order.

    Arguments: as of `convolutions`. The calls' operands have no data; their device is x's.
    """
    run, _ = _recorded(x, residual_scale, block, level, backend, training)
    return [call._replace(device=x.device) for call in run.step_calls]


# Primitives that the plain formulas of others ask for, and their kernels do without.
_INSIDE = {"pointwise_direct_stats": "moments_finalize", "pointwise_direct_sums": "pointwise_tail_backward_finalize"}


def by_formula(x: Tensor, residual_scale: Tensor | None, block: Block, level: str, backend: str, training: bool) -> dict[str, str]:
    """The steps beside convolutions that run by plain formulas because the backend has no kernel for x, and why.

    Empty for a backend that does not say (`fused_res.backends`). Arguments: as of `convolutions`.
    """
    declined = getattr(backends.load(backend), "formula", None)
    if declined is None:
        return {}
    run, _ = _recorded(x, residual_scale, block, level, backend, training)
    reasons = {step: declined(step, x.device, x.dtype) for step in dict.fromkeys(run.steps)}
    return {step: why for step, why in reasons.items() if why is not None and reasons.get(_INSIDE.get(step, step)) is not None}


def saved_bytes(x: Tensor, residual_scale: Tensor | None, block: Block, level: str, frozen: Sequence[bool]) -> tuple[int, int]:
    """What a call keeps for a backward to everything, without parameters, the output, and what a given shortcut keeps.

    Args:
        frozen: for each of `block.units()`, whether eager's BN is no function of torch's but a product with a fixed scale.

    Returns:
        At this level, and in eager: x; what each convolution made, where its BN keeps that, and each ReLU in front of another
        one; two vectors for each BN, or the fixed scale; and with a residual scale what it multiplies.
    """
    image, bare = _meta(x), _bare(block)
    skip = image.new_empty(block.output_shape(x)) if block.given else None
    tensors, spec, eps = pack(bare)
    _, saved = torch.ops.fused_res.block_forward(image, skip, _meta(residual_scale), tensors, spec, eps, True, level, "reference")
    own = x.numel() * x.element_size() + sum(tensor.nbytes for tensor in saved)
    form, sizes = FORMS[block.form], block.sizes(*x.shape[2:])
    if form.preactivated:  # x, where its BN keeps that, and what the first ReLU made of it
        eager, fixed_behind, frozen = x.numel() * (2 - frozen[0]), [*frozen[1:], True], [*frozen, True]
    else:
        eager, fixed_behind = x.numel(), frozen
    for i, (unit, size, fixed) in enumerate(zip(block.main, sizes, fixed_behind, strict=False)):
        activated = i < len(block.main) - 1 or residual_scale is not None
        images = (not fixed) + activated
        eager += _pixels(x, size) * unit.weight.shape[0] * images
    if block.projection is not None:
        if block.pool is not None:
            eager += x.shape[1] * _pixels(x, block.pool.output_size(*x.shape[2:]))
        if not frozen[-1]:
            eager += _pixels(x, sizes[-1]) * block.projection.weight.shape[0]
    channels = [unit.weight.shape[1] * unit.groups if form.preactivated else unit.weight.shape[0] for unit in block.units()]
    units = zip(block.norms(), channels, frozen, strict=False)
    vectors = sum(k * (1 if fixed else 2 * unit.training) * _statistic_bytes(x, unit) for unit, k, fixed in units)
    return own, eager * x.element_size() + vectors


def _statistic_bytes(x: Tensor, unit: ConvBN) -> int:
    """Of one value that eager's BN keeps for backward: on a CPU of the dtype of its parameters."""
    if x.device.type == "cpu":
        return (x if unit.gamma is None else unit.gamma).element_size()
    return max(4, x.element_size())


def _pixels(x: Tensor, size: tuple[int, int]) -> int:
    return x.shape[0] * size[0] * size[1]
