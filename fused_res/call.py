"""What a call of a block needs beside its tensors: worked out once for all calls that are alike.

Alike means: the same shapes, dtypes and devices, the same numbers, autocast and `use_backend`. Values, strides and what requires
grad may differ; none of the checks asks for them.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import planner, plans
from fused_res.block.casting import present
from fused_res.block.held import kept_of
from fused_res.block.op import is_narrow, is_watched
from fused_res.block.packing import pack
from fused_res.block.prepared import Moved, Prepared
from fused_res.block.validate import check_arguments, check_batch, compute_dtype
from fused_res.spec import FORMS, AvgPool, Block, ConvBN


class Laid(NamedTuple):
    """A block as a call asks for it.

    tensors: of every unit the seven that it may have. numbers: of every unit, and the form; None where a part is of another type
    than expected. held: those of the tensors that are there. present: the tensors that reach the operator. norms: as `Block.norms`
    returns them. moved: what a call under batch statistics writes to.
    """

    block: Block
    tensors: tuple[Tensor | None, ...]
    numbers: tuple | None
    held: tuple[Tensor, ...]
    present: list[Tensor]
    norms: list[ConvBN]
    moved: Moved


def lay(block: Block) -> Laid:
    """What calls of a block ask for of its parts alone. Nothing is checked."""
    units, pool, tensors, numbers = block.units(), block.pool, [], [block.given, block.form, len(block.main)]
    if not all(isinstance(unit, ConvBN) for unit in units):
        return Laid(block, (), None, (), [], [], Moved((), ()))
    for unit in units:
        tensors += unit[:7]
        numbers += *unit[7:12], unit.eps
    if pool is not None:
        numbers += [tuple(part) if isinstance(part, list) else part for part in pool]
    plain = {*map(type, units)} == {ConvBN} and (pool is None or type(pool) is AvgPool)
    norms = block.norms()
    live = [unit for unit in norms if unit.training]
    buffers = [b for unit in live for b in (unit.running_mean, unit.running_var, unit.num_batches_tracked) if b is not None]
    moved = Moved(tuple(buffers), tuple([unit.momentum for unit in live]))
    held = tuple([tensor for tensor in tensors if tensor is not None])
    return Laid(block, tuple(tensors), tuple(numbers) if plain else None, held, present(block), norms, moved)


def prepare(
    x: Tensor,
    laid: Laid,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    names: Sequence[str] | None,
    level: str | None = None,
) -> Prepared:
    """Checks the arguments and plans the call, unless one like it has been here before.

    Raises as `fused_res.functional.residual_block` documents.
    """
    key = _key(x, laid, skip, residual_scale, level)
    if key is None:
        return _prepare(x, laid.block, skip, residual_scale, names, level, watched=True)
    return plans.derived(key) or plans.derive(key, _prepare(x, laid.block, skip, residual_scale, names, level, watched=False))


_about = attrgetter("shape", "dtype", "device")


def _key(x: Tensor, laid: Laid, skip: Tensor | None, residual_scale: Tensor | None, level: str | None) -> tuple | None:
    """What calls that are alike have in common; None where a part is of another type than expected, or somebody watches."""
    tensors = x, skip, residual_scale, *laid.tensors
    if laid.numbers is None or is_watched(tensors):
        return None
    # Computed in, and where that is not all that matters to plans: under autocast x may be of another dtype.
    ways = level, compute_dtype(x), torch.is_autocast_enabled(x.device.type), planner.forced()
    return "call", ways, laid.numbers, tuple([None if tensor is None else _about(tensor) for tensor in tensors])


def _prepare(
    x: Tensor,
    block: Block,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    names: Sequence[str] | None,
    level: str | None,
    watched: bool,
) -> Prepared:
    names = check_arguments(x, block, skip, residual_scale, names)
    sizes = check_batch(x, block, names)
    dtype = compute_dtype(x)
    outer = (x.shape[0], block.main[-1].weight.shape[0], *sizes[len(block.main) - 1])
    if skip is None and block.projection is None and FORMS[block.form].skip and x.shape != outer:
        block = block._replace(given=True)
    _, spec, eps = pack(block)
    read = [x, skip, *(tensor for unit in block.units() for tensor in unit[:2])]
    casts = any(tensor is not None and tensor.dtype != dtype for tensor in read)
    plan = planner.plan(x, block, dtype, level=level)
    backend = plan.backend if watched else planner.resolve(plan.backend, x.device, dtype)
    if FORMS[block.form].preactivated:
        sizes = [tuple(x.shape[2:]), *sizes[: len(block.main) - 1]]
    pixels = tuple([x.shape[0] * height * width for height, width in sizes])
    numbers = dtype, casts, pixels, outer, block.given, tuple(spec), tuple(eps)
    prepared = (not watched or torch.compiler.is_compiling()) and planner.evaluation_level(block, dtype, backend, level) is not None
    kept = None if watched else kept_of(tuple(spec), residual_scale is not None)
    return Prepared(*numbers, plan.level, backend, watched, prepared, is_narrow(x, block), kept, {}, set())
