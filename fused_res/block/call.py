"""What a call of a block needs beside its tensors: worked out once for all calls that are alike.

Alike means: the same shapes, dtypes and devices, the same numbers, autocast and `use_backend`. Values, strides and what requires
grad may differ; none of the checks asks for them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res import planner, plans
from fused_res.block.op import is_narrow, is_watched
from fused_res.block.validate import check_arguments, check_batch, compute_dtype
from fused_res.spec import AvgPool, Block, ConvBN, pack


class Call(NamedTuple):
    """dtype: what the block computes in; casts: whether anything is cast to it. pixels: of each unit's output, with the batch.

    outer: the shape of the block's output. given: whether the shortcut is a tensor, x itself if the caller gave none. spec, eps: as
    `fused_res.spec.pack` returns them. level, backend: of the plan; backend is `AUTO` where the call is watched.
    narrow: as `fused_res.block.op.is_narrow` says. programs: what has been recorded of such calls (`fused_res.block.program`).
    """

    dtype: torch.dtype
    casts: bool
    pixels: tuple[int, ...]
    outer: tuple[int, ...]
    given: bool
    spec: Sequence[int]
    eps: Sequence[float]
    level: str
    backend: str
    watched: bool
    narrow: bool
    programs: dict


def prepare(
    x: Tensor,
    block: Block,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    names: Sequence[str] | None,
    level: str | None = None,
) -> Call:
    """Checks the arguments and plans the call, unless one like it has been here before.

    Raises as `fused_res.functional.residual_block` documents.
    """
    if not _is_plain(x, block, skip, residual_scale):
        return _prepare(x, block, skip, residual_scale, names, level, watched=True)
    key = (level, *_key(x, block, skip, residual_scale))
    return plans.derived(key) or plans.derive(key, _prepare(x, block, skip, residual_scale, names, level, watched=False))


def _is_plain(x: Tensor, block: Block, skip: Tensor | None, residual_scale: Tensor | None) -> bool:
    """Whether every part is of the expected type, every tensor a plain one, and nobody watches."""
    tensors = [x, skip, residual_scale]
    for unit in block.units():
        if type(unit) is not ConvBN:
            return False
        tensors += unit[:7]
    return (block.pool is None or type(block.pool) is AvgPool) and not is_watched(*tensors)


def _key(x: Tensor, block: Block, skip: Tensor | None, residual_scale: Tensor | None) -> tuple:
    parts = ["call", compute_dtype(x), torch.is_autocast_enabled(x.device.type), planner.forced(), block.given, len(block.main)]
    tensors = [x, skip, residual_scale]
    if block.pool is not None:
        parts += [tuple(part) if isinstance(part, list) else part for part in block.pool]
    for unit in block.units():
        tensors += unit[:6]
        steps = tuple(unit.stride), tuple(unit.padding), tuple(unit.dilation)
        parts += (*steps, unit.groups, unit.training, unit.eps)
    for tensor in tensors:
        parts += (None,) if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
    return tuple(parts)


def _prepare(
    x: Tensor,
    block: Block,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    names: Sequence[str] | None,
    level: str | None,
    watched: bool,
) -> Call:
    names = check_arguments(x, block, skip, residual_scale, names)
    sizes = check_batch(x, block, names)
    dtype = compute_dtype(x)
    outer = (x.shape[0], block.main[-1].weight.shape[0], *sizes[len(block.main) - 1])
    if skip is None and block.projection is None and x.shape != outer:
        block = block._replace(given=True)
    _, spec, eps = pack(block)
    read = [x, skip, *(tensor for unit in block.units() for tensor in unit[:2])]
    casts = any(tensor is not None and tensor.dtype != dtype for tensor in read)
    plan = planner.plan(x, block, dtype, level=level)
    backend = plan.backend if watched else planner.resolve(plan.backend, x.device, dtype)
    pixels = tuple([x.shape[0] * height * width for height, width in sizes])
    return Call(
        dtype, casts, pixels, outer, block.given, tuple(spec), tuple(eps), plan.level, backend, watched, is_narrow(x, block), {}
    )
