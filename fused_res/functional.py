"""The residual block on tensors: what `fused_res.BasicBlock` and `fused_res.Bottleneck` call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res import again, folds, internals, planner, reference
from fused_res.again import Again
from fused_res.backends import native
from fused_res.block.casting import as_dtype, present, with_dtype
from fused_res.block.evaluated import block_evaluation, evaluated, evaluated_again
from fused_res.block.exported import block_exported
from fused_res.block.op import Called, block_forward
from fused_res.block.prepared import Prepared
from fused_res.block.validate import check_arguments
from fused_res.call import Laid, lay, prepare
from fused_res.eligibility import acts, is_traced
from fused_res.geometry import Geometry, numbers_of
from fused_res.primitives import library
from fused_res.primitives.move_statistics import Move, move_statistics
from fused_res.primitives.run import PLAIN
from fused_res.primitives.run import of as run_of
from fused_res.spec import FORMS, POST_ACTIVATION, AvgPool, Block, ConvBN, pair

__all__ = ["AvgPool", "ConvBN", "residual_block"]


def residual_block(
    x: Tensor,
    main: Sequence[ConvBN],
    shortcut: ConvBN | Tensor | None = None,
    *,
    pool: AvgPool | None = None,
    residual_scale: Tensor | None = None,
    form: str = POST_ACTIVATION,
    names: Sequence[str] | None = None,
) -> Tensor:
    """`out = relu(a * main(x) + shortcut(x))`, `main` being `conv-BN-ReLU-…-conv-BN`, as one autograd operator.

    Other forms leave out the last ReLU, or the shortcut, or have the BNs and ReLUs in front of the convolutions:

    =================  ================================  =========================================
    form               out                               main
    =================  ================================  =========================================
    post-activation    relu(a * main(x) + shortcut(x))   conv-BN-ReLU-…-conv-BN
    linear             a * main(x) + shortcut(x)         conv-BN-ReLU-…-conv-BN
    chain              relu(main(x))                     conv-BN-ReLU-…-conv-BN
    linear chain       main(x)                           conv-BN-ReLU-…-conv-BN
    pre-activation     a * main(x) + shortcut(x)         BN-ReLU-conv-…-BN-ReLU-conv
    =================  ================================  =========================================

    In a pre-activation block (https://arxiv.org/abs/1603.05027) the BN of each `ConvBN` is that in front of its convolution, and a
    projection is a convolution without a BN (`training=False`), which reads what the first convolution reads.

    Args:
        x: [N, C, H, W], float16, bfloat16, float32 or float64, any strides.
        main: the convolutions and BNs of the main branch, first to last.
        shortcut: None for the identity; a `ConvBN` for a projection; or a tensor that is added as it is, of the output's
            shape or one that broadcasts to it.
        pool: average pooling of x in front of the projection (ResNet-D).
        residual_scale: the scalar tensor a; None for 1.
        form: one of the above.
        names: what error messages call the units of `main`, then the projection.

    Returns:
        [N, K, H', W'], in the dtype and memory layout that eager PyTorch would return. Under autocast x and the convolutions'
        weights are cast as eager casts them; BN's tensors keep their dtype.

    The running statistics and `num_batches_tracked` of a unit with `training=True` are updated in place as `nn.BatchNorm2d`
    does, after the block has been computed. Differentiable twice; the second derivative runs in ordinary autograd. An empty
    batch, tensors on the meta device or of a class that acts for itself, and any call under `use_backend("eager")`,
    `torch.jit.trace`, forward-mode AD or a `torch.func` transform, run through `fused_res.reference`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: x is not 4-D; an unknown form, or a shortcut or residual scale for a form that has none; one value per channel
            under batch statistics (the BN that meets it has then counted the batch, as in eager); an epsilon BN does not take.
        RuntimeError: shapes, dtypes or devices that do not fit; a backend forced by `use_backend` that cannot run.
    """
    if isinstance(x, Tensor) and _is_unfused(x, main, shortcut, residual_scale):
        check_arguments(x, *_parts(main, shortcut, pool, form), residual_scale, names)
        return reference.residual_block(x, main, shortcut, pool=pool, residual_scale=residual_scale, form=form)
    options = {"pool": pool, "residual_scale": residual_scale, "form": form, "names": names}
    return residual_block_with_saved(x, main, shortcut, **options)[0]


def _is_unfused(x: Tensor, main: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, residual_scale: Tensor | None) -> bool:
    if planner.is_eager_forced() or is_traced():
        return True
    units = [unit for unit in (*main, shortcut) if isinstance(unit, ConvBN)]
    tensors = [x, shortcut, residual_scale, *(tensor for unit in units for tensor in unit[:7])]
    acting = any(isinstance(tensor, Tensor) and acts(tensor) for tensor in tensors)
    return acting or x.numel() == 0 or x.is_meta or is_transformed()


def is_transformed() -> bool:
    """Whether forward-mode AD or a `torch.func` transform is active, which only ordinary autograd can follow."""
    return internals.is_dual() or internals.is_transformed()


@internals.constant_result
def is_inductors(dtype: torch.dtype, numbers: tuple | None) -> bool:
    """Whether a graph without gradients has a block on a CPU, for which nobody has asked for a backend or a level, in torch's own
    operators.

    That is where Inductor freezes weights, and so prepares the library's convolutions as we do and fuses them with what stands
    around the block: in 16 bits, in which all convolutions are the library's, and where ours would not pay for the operator's call.

    Args:
        dtype: what the block computes in.
        numbers: of `fused_res.geometry.numbers_of`.
    """
    if numbers is None or not internals.is_freezing() or not library.fuses(dtype):
        return False
    return dtype != torch.float32 or not native.pays_in_frozen_graph(Geometry.from_numbers(numbers))


def _parts(
    main: Sequence[ConvBN], shortcut: ConvBN | Tensor | None, pool: AvgPool | None, form: str
) -> tuple[Block, Tensor | None]:
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    given = isinstance(shortcut, Tensor)
    units = [_paired(unit) for unit in main]
    return Block(units, None if given else _paired(shortcut), pool, given, form), shortcut if given else None


def _paired(unit: ConvBN | None) -> ConvBN | None:
    """The unit with pairs of numbers where one number was given for both."""
    if type(unit) is not ConvBN or all(type(steps) is tuple and len(steps) == 2 for steps in unit[7:10]):
        return unit
    return unit._replace(**{name: pair(getattr(unit, name), name) for name in ("stride", "padding", "dilation")})


def residual_block_with_saved(
    x: Tensor,
    main: Sequence[ConvBN],
    shortcut: ConvBN | Tensor | None = None,
    *,
    pool: AvgPool | None = None,
    residual_scale: Tensor | None = None,
    form: str = POST_ACTIVATION,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """As `residual_block`, never unfused; also returns what was saved for backward (`fused_res.block.forward.Saved`)."""
    block, skip = _parts(main, shortcut, pool, form)
    return run(x, lay(block), skip, residual_scale, names)


def run(
    x: Tensor,
    laid: Laid,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    names: Sequence[str] | None,
    level: str | None = None,
    owner: object | None = None,
    seen: list[Again] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """`residual_block_with_saved` of a block, with the value of a shortcut that is given, at the level that the block asks for.

    `owner`: for whom what evaluation prepares is kept. Nothing is saved in evaluation then. `seen`: earlier calls of the same
    block, whose shortcut is not given; this one, which is like none of them, joins them.
    """
    call, save = prepare(x, laid, skip, residual_scale, names, level), _saves(x, laid, skip, residual_scale)
    asked = level is not None or planner.forced() is not None
    found, called = _run(x, laid, skip, residual_scale, call, save, owner, asked=asked)
    if seen is not None and not call.watched:
        replayed = None if called is None or not save else called.program(x, None, residual_scale, laid.present)
        looks = laid.held if residual_scale is None else (residual_scale, *laid.held)
        again.keep(seen, Again(call, save, replayed, laid.moved.buffers).looks_for((x, *looks), level))
    return found


def rerun(known: Again, x: Tensor, laid: Laid, residual_scale: Tensor | None, owner: object) -> Tensor:
    """The output of a block whose shortcut is not given, in a call like an earlier one."""
    if known.program is not None:
        folds.drop(owner)
        return block_forward(known, x, None, residual_scale, laid.present)[0]
    out = evaluated_again(x, owner, known)
    return _run(x, laid, None, residual_scale, known.call, known.save, owner, known)[0][0] if out is None else out


def _saves(x: Tensor, laid: Laid, skip: Tensor | None, residual_scale: Tensor | None) -> bool:
    """Whether a backward may come."""
    tensors = x, skip, residual_scale, *laid.present
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _run(
    x: Tensor,
    laid: Laid,
    skip: Tensor | None,
    residual_scale: Tensor | None,
    call: Prepared,
    save: bool,
    owner: object | None,
    known: Again | None = None,
    asked: bool = False,
) -> tuple[tuple[Tensor, list[Tensor]], Called | None]:
    """The block's output and what was saved; and how the operator was called, if it has computed them, of uncast tensors.

    known: the earlier call that this one is like. asked: whether somebody has asked for a backend or a level.
    """
    block, tensors = laid.block, laid.present
    if call.given:
        block, skip = block._replace(given=True), (x if skip is None else skip).expand(call.outer)
    if owner is not None and not call.watched:
        if save or not call.evaluates:
            folds.drop(owner)
        else:
            out = evaluated(x, skip, residual_scale, block, tensors, call, owner, known)
            if out is not None:
                return (out, []), None
    if call.watched and call.evaluates and not save and not internals.is_exporting():
        if not asked and is_inductors(call.dtype, numbers_of(x, block)):
            x, skip, block = as_dtype(x, call.dtype), as_dtype(skip, call.dtype), with_dtype(block, call.dtype)
            shortcut = skip if call.given else block.projection
            options = {"pool": block.pool, "residual_scale": residual_scale, "form": block.form}
            return (reference.residual_block(x, block.main, shortcut, **options), []), None
        return (block_evaluation(x, skip, residual_scale, tensors, call), []), None
    norms = laid.norms

    def settle(saved: list[Tensor | None]) -> None:
        moves = [Move(unit, v, pixels) for unit, v, pixels in zip(norms, saved, call.pixels, strict=False) if unit.training]
        if moves:
            move_statistics(moves, run=PLAIN if call.watched else run_of(call.backend))

    if call.watched and internals.is_exporting():
        return (block_exported(x, skip, residual_scale, tensors, call, norms, settle), []), None
    if call.casts:
        x, block, skip = as_dtype(x, call.dtype), with_dtype(block, call.dtype), as_dtype(skip, call.dtype)
        tensors = present(block)
    called = Called(call, block, save, settle, laid.moved)
    found = block_forward(called, x, skip, residual_scale, tensors)
    return found, None if call.casts or call.given else called
