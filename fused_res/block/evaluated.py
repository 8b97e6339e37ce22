"""A block in evaluation on what was prepared of its weights, and that as an operator, `fused_res::block_evaluation`.

Graphs of torch.compile and exported programs call the operator. It gets the modules' own tensors, in their dtypes: by these it
finds what was prepared before, which follows every change of them as it does for a block that is called by itself.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from fused_res import backends, folds, plans
from fused_res.block import evaluation, program
from fused_res.block.casting import as_dtype, present, with_dtype
from fused_res.block.op import (
    forward_in_graph,
    is_narrow,
    is_watched,
    no_autocast,
    output_fake,
    output_in_layout,
    refuse_gradient,
)
from fused_res.block.packing import unpack
from fused_res.block.prepared import Prepared
from fused_res.internals import alike as alike_to
from fused_res.internals import below_autograd
from fused_res.spec import Block

_library = Library("fused_res", "FRAGMENT")
_library.define(
    "block_evaluation(Tensor x, Tensor? skip, Tensor? residual_scale, Tensor[] tensors, int[] spec, float[] eps, "
    "ScalarType dtype, str level, str backend) -> Tensor"
)


class _Alike(NamedTuple):
    """What calls of the operator that are alike have in common, as `Prepared` has it for others."""

    dtype: torch.dtype
    backend: str
    narrow: bool
    evaluates: bool


def evaluated(
    x: Tensor,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    block: Block,
    tensors: list[Tensor],
    call: Prepared | _Alike,
    owner: object | None,
    alike: Hashable | None = None,
) -> Tensor | None:
    """The block's output from what was prepared of its weights; None where nothing could be.

    Args:
        skip: the value of a shortcut that is given, of the output's shape.
        tensors: the block's, in any dtype.
        owner: for whom it is kept; None: for as long as the tensors live.
        alike: what such calls are to be known by to `evaluated_again`, if they are.
    """
    sources = tensors if residual_scale is None else [*tensors, residual_scale]

    def make() -> evaluation.Evaluation | None:
        return evaluation.prepare(block, residual_scale, tuple(x.shape), call.dtype, call.backend)

    def kind() -> Hashable:
        return evaluation.kind(block, tuple(x.shape), call.dtype, call.backend)

    def schedule(x: Tensor, skip: Tensor | None, *_: Tensor) -> Tensor:
        out = found.call(as_dtype(x, call.dtype), as_dtype(skip, call.dtype))
        return output_in_layout(out, x, block, call.narrow)

    switches = program.switches(x.device.type)
    found = folds.find(owner, sources, call, switches, kind, make)
    if found is None:
        return None
    key = x.shape, x.dtype, x.stride(), None if skip is None else (skip.dtype, skip.stride()), switches
    with below_autograd(), no_autocast(x.device.type):  # computed as nobody watches
        out = program.run(found.programs, key, schedule, (x, skip, *found.tensors), call.backend)
    recorded = program.recorded(found.programs, key)
    beside = None if alike is None or recorded is None else folds.beside(owner, sources, found)
    if beside is not None and skip is None and not torch.is_autocast_enabled(x.device.type):
        beside[alike] = recorded, found.tensors
    return out


def evaluated_again(x: Tensor, owner: object, alike: Hashable) -> Tensor | None:
    """The output of `evaluated` in a call like an earlier one that was to be known; None where a tensor has changed since.

    The caller has seen that the block's tensors are the same objects and look as they did, strides and all.
    """
    beside = folds.beside(owner)
    found = None if beside is None else beside.get(alike)
    return None if found is None else _replayed(x, *found)


def _replayed(x: Tensor, recorded: Callable, tensors: Sequence[Tensor]) -> Tensor:
    with below_autograd():
        return program.replay(recorded, (x, None, *tensors))


class _Known:
    """A call of the operator without a shortcut or a scale, by which calls like it are known."""

    def __init__(self, x: Tensor, tensors: Sequence[Tensor], numbers: tuple) -> None:
        self._numbers, self._switches = numbers, _circumstances(x)
        self._alike = alike_to((x, *tensors))

    def fits(self, x: Tensor, tensors: Sequence[Tensor], numbers: tuple) -> bool:
        return self._alike(x, *tensors) and self._numbers == numbers and self._switches == _circumstances(x)


def _circumstances(x: Tensor) -> tuple:
    return program.switches(x.device.type), plans.age(), torch.is_autocast_enabled(x.device.type)


def _known(x: Tensor, tensors: Sequence[Tensor], numbers: tuple) -> Tensor | None:
    """The output of the operator in a call like an earlier one; None where there is none, or a tensor has changed since."""
    for known, found in list((folds.beside(None, tensors) or {}).items()):
        if known.fits(x, tensors, numbers):
            return _replayed(x, *found)
    return None


def block_evaluation(
    x: Tensor, skip: Tensor | None, residual_scale: Tensor | None, tensors: Sequence[Tensor], call: Prepared
) -> Tensor:
    """The operator on the block's own tensors."""
    numbers = call.spec, call.eps, call.dtype, call.level, call.backend
    return torch.ops.fused_res.block_evaluation(x, skip, residual_scale, tensors, *numbers)


def _call_of(x, skip, residual_scale, block, tensors, spec, eps, dtype, backend) -> _Alike:
    about = tuple([None if t is None else (t.shape, t.dtype) for t in (x, skip, residual_scale, *tensors)])
    key = "evaluation", tuple(spec), tuple(eps), dtype, backend, x.device, about
    found = plans.derived(key)
    if found is not None:
        return found
    name = backends.resolve(backend, x.device, dtype)
    prepares = getattr(backends.load(name), "evaluation", None)
    evaluates = prepares is not None and prepares(x.device, dtype) is not None
    return plans.derive(key, _Alike(dtype, name, is_narrow(x, block), evaluates))


def _evaluation(x, skip, residual_scale, tensors, spec, eps, dtype, level, backend):
    watched, numbers = is_watched((x, skip, residual_scale, *tensors)), (spec, eps, dtype, backend)
    plain = skip is None and residual_scale is None
    if plain and not watched:
        out = _known(x, tensors, numbers)
        if out is not None:
            return out
    block = unpack(tensors, spec, eps)
    if not watched:
        call = _call_of(x, skip, residual_scale, block, tensors, spec, eps, dtype, backend)
        known = _Known(x, tensors, numbers) if plain and call.evaluates else None
        out = evaluated(x, skip, residual_scale, block, tensors, call, None, known) if call.evaluates else None
        if out is not None:
            return out
    images = as_dtype(x, dtype), as_dtype(skip, dtype), residual_scale
    return forward_in_graph(*images, present(with_dtype(block, dtype)), spec, eps, False, level, backend)[0]


def _fake(x, skip, residual_scale, tensors, spec, eps, dtype, level, backend):
    return output_fake(x, unpack(tensors, spec, eps), dtype)


def _refuse(ctx, _):
    refuse_gradient("block_evaluation")


_library.impl("block_evaluation", _evaluation, "CompositeExplicitAutograd")
register_fake("fused_res::block_evaluation", _fake, lib=_library)
register_autograd("fused_res::block_evaluation", _refuse, lib=_library)
