"""A block in evaluation without gradients: every convolution one launch, on weights that were prepared once.

`fused_res.folds` keeps what is prepared here for as long as the block's tensors stay as they are.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.block.casting import with_dtype
from fused_res.block.forward import running
from fused_res.block.packing import pack
from fused_res.block.pool import pooled
from fused_res.layout import nhwc
from fused_res.primitives import library
from fused_res.primitives.conv_bn_act import Place, conv_bn_act, way
from fused_res.primitives.run import of
from fused_res.primitives.step import Step
from fused_res.spec import FORMS, Block, ConvBN


class Evaluation(NamedTuple):
    """call: of x and the value of a shortcut that is given the block's output, channels_last, in the block's dtype.

    tensors: all that have been prepared. programs: what has been recorded of calls (`fused_res.block.program`).
    """

    call: Callable[[Tensor, Tensor | None], Tensor]
    tensors: tuple[Tensor, ...]
    programs: dict


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What the block is computed in: its dtype, or float32 where the library has no convolutions in 16 bits for this CPU."""
    return dtype if dtype == torch.float32 or library.fuses(dtype) else torch.float32


def places(block: Block, shape: tuple[int, ...]) -> Iterator[tuple[ConvBN, Place]]:
    """Each of the block's units, and where it stands if x has this shape."""
    projected, last = block.projection is not None, len(block.main) - 1
    n, channels, *size = shape
    for i, unit in enumerate(block.main):
        yield unit, Place((n, channels, *size), i < last or FORMS[block.form].relu, spare=i == last and projected)
        channels, size = unit.weight.shape[0], unit.output_size(*size)
    if projected:
        size = shape[2:] if block.pool is None else block.pool.output_size(*shape[2:])
        yield block.projection, Place((n, shape[1], *size), relu=False)


def kind(block: Block, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> Hashable:
    """What is prepared for x of this shape, beside the tensors: batches of all sizes share it where the same kernels run.

    Nothing in it depends on the number of images but who runs a convolution: oneDNN's order of a weight was as fast for any other.
    """
    _, spec, eps = pack(block)
    cast = with_dtype(block, arithmetic(dtype))
    ways = tuple([way(unit, place, of(backend)) for unit, place in places(cast, shape)])
    return tuple(spec), tuple(eps), shape[1:], dtype, backend, ways


def prepare(
    block: Block, residual_scale: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> Evaluation | None:
    """The block on x of this shape, with what follows from its tensors' values worked out.

    Args:
        block: as its modules have it: convolutions' tensors in any dtype.
        dtype: what the block computes in.

    Returns:
        None where the folded weights are not as precise as the block's own: where they are not finite, or in 16 bits fall below
        the smallest normal numbers.
    """
    wide = arithmetic(dtype)
    last, run = len(block.main) - 1, of(backend)
    steps: list[Step] = []
    for i, (unit, place) in enumerate(places(block, shape)):
        # As the operator casts it, and from there to what is computed in.
        unit = unit._replace(weight=unit.weight.to(dtype).to(wide), bias=None if unit.bias is None else unit.bias.to(dtype))
        vectors = running(unit, wide, residual_scale if i == last else None, run)
        if not _is_precise(unit, vectors):
            return None
        steps.append(conv_bn_act(unit, vectors, place, run=run))
    main, side, pool = steps[:last], steps[last + 1] if block.projection is not None else None, block.pool
    end, adds = steps[last], FORMS[block.form].skip

    def evaluate(x: Tensor, skip: Tensor | None) -> Tensor:
        image = nhwc(x.to(wide))
        z = image
        for step in main:
            z = step.call(z, None)
        if side is not None:
            added = side.call(pooled(image, pool), None)
        else:
            added = (image if skip is None else nhwc(skip.to(wide))) if adds else None
        return end.call(z, added).to(dtype)

    return Evaluation(evaluate, tuple([tensor for step in steps for tensor in step.tensors]), {})


def _is_precise(unit: ConvBN, vectors: Tensor) -> bool:
    """Whether the weight with the scale inside loses no more to rounding than the weight itself has."""
    weight, shift = library.folded(unit, vectors)
    if not (weight.isfinite().all() and shift.isfinite().all()):
        return False
    if weight.dtype == torch.float32:
        return True
    exact = unit.weight.double() * vectors[3].double().view(-1, 1, 1, 1)
    lost, size = ((weight - exact).flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1))
    return bool((lost <= torch.finfo(weight.dtype).eps * size).all())
