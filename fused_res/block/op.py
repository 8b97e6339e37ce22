"""The two operators of a block, `fused_res::block_forward` and `fused_res::block_backward`, and their registration.

Both are functional. What the forward saves depends on its arguments `save` and `level` alone, so that the fake kernels know
it; a new level adds neither an argument nor an output. The backward's own derivatives, of any order, come from
`fused_res.block.through_reference`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from fused_res import backends, internals, plans
from fused_res.block import program
from fused_res.block.backward import Gradients, backward
from fused_res.block.forward import Saved, forward
from fused_res.block.held import copy_of, kept_of
from fused_res.block.levels import Level
from fused_res.block.packing import tensor_fields, unpack
from fused_res.block.prepared import Moved, Prepared
from fused_res.block.through_reference import reference_gradients, second_gradients
from fused_res.layout import as_parameter, empty_like_parameter, in_layout, is_channels_last, memory_format
from fused_res.primitives.bn_act import sign_bytes
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.run import of as run_of
from fused_res.spec import FORMS, Block

_library = Library("fused_res", "FRAGMENT")
_library.define(
    "block_forward(Tensor x, Tensor? skip, Tensor? residual_scale, Tensor[] tensors, int[] spec, float[] eps, "
    "bool save, str level, str backend) -> (Tensor, Tensor[])"
)
_library.define(
    "block_backward(Tensor dout, Tensor x, Tensor? residual_scale, Tensor[] tensors, Tensor[] saved, int[] spec, "
    "float[] eps, bool[] needs, str level, str backend) -> Tensor[]"
)


def _output_channels_last(x: Tensor, block: Block, narrow: bool) -> bool:
    """Whether eager's output is channels_last.

    Its convolutions are as soon as their input or their weight is. On a CPU its BNs make what is contiguous as well, one channel
    or one pixel, contiguous; `narrow` says whether there is such an output (`is_narrow`).
    """
    found, preactivated = is_channels_last(x), FORMS[block.form].preactivated
    if not narrow or x.device.type != "cpu":
        return found or any(is_channels_last(unit.weight) for unit in block.main)
    for unit, one in zip(block.main, _are_narrow(x, block), strict=True):
        convolved = is_channels_last(unit.weight)
        found = (found and not one) or convolved if preactivated else not one and (found or convolved)
    return found


def _are_narrow(x: Tensor, block: Block) -> Iterator[bool]:
    """For each unit whether what its BN normalises has one channel or one pixel."""
    images = [(x.shape[1], tuple(x.shape[2:]))]
    images += [(unit.weight.shape[0], size) for unit, size in zip(block.main, block.sizes(*x.shape[2:]), strict=True)]
    for channels, size in images[:-1] if FORMS[block.form].preactivated else images[1:]:
        yield channels == 1 or size[0] * size[1] == 1


def is_narrow(x: Tensor, block: Block) -> bool:
    """Whether anything that a BN of the main branch normalises has one channel or one pixel."""
    return any(_are_narrow(x, block))


def output_in_layout(out: Tensor, x: Tensor, block: Block, narrow: bool) -> Tensor:
    """The block's output in the layout of eager's."""
    return in_layout(out, _output_channels_last(x, block, narrow))


def no_autocast(device_type: str) -> AbstractContextManager:
    """Entering `torch.autocast` where it is off would cost more than a small primitive."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def forward_in_graph(x, skip, residual_scale, tensors, spec, eps, save, level, backend):
    """What `fused_res::block_forward` does where it is called as an operator."""

    def schedule(x, skip, residual_scale, *tensors):
        block = unpack(tensors, spec, eps)
        if (skip is not None) != block.given:
            raise ValueError(f"skip: expected {'a tensor' if block.given else 'None'} for this spec")
        return _run(x, skip, residual_scale, block, save, level, backend, is_narrow(x, block))

    return _replayed(schedule, ("forward", save), (x, skip, residual_scale, *tensors), spec, eps, level, backend)


def _replayed(schedule, what, inputs, spec, eps, level, backend):
    """The schedule of an operator that a graph calls, by its program; x is the first of its tensors, or the second in backward."""
    if is_watched(inputs):
        return schedule(*inputs)
    x = inputs[what[0] == "backward"]
    alike = (*what, level, backend, tuple(spec), tuple(eps))
    alike += tuple([None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in inputs])
    programs = plans.derived(alike)
    programs = plans.derive(alike, {}) if programs is None else programs
    with no_autocast(x.device.type):
        key, name = _circumstances(x.device, inputs), backends.resolve(backend, x.device, x.dtype)
        return program.run(programs, key, schedule, inputs, name)


def _run(x, skip, residual_scale, block, save, level, backend, narrow):
    run = run_of(backends.resolve(backend, x.device, x.dtype))
    with no_autocast(x.device.type):
        out, saved = forward(x, skip, residual_scale, block, level, save, run)
    return output_in_layout(out, x, block, narrow), saved


class Called(NamedTuple):
    """A call that is not watched, on its way through autograd.

    settle: called once with what was saved. Where it can be, it is before autograd packs that: a checkpoint without reentry stops
    its recompute there, and eager's BNs have moved their statistics by then. moved: what it writes to.
    """

    call: Prepared
    block: Block
    save: bool
    settle: Callable[[list[Tensor]], None]
    moved: Moved

    def _key(self, inputs: Sequence[Tensor | None]) -> tuple[bool, tuple]:
        """Whether its program has what `settle` writes in it, unless that is unusual, and the program's key."""
        buffers, momenta = self.moved
        plain = _are_usual(buffers, momenta, self.call.momenta)
        return plain, (self.save, plain and momenta, *_circumstances(inputs[0].device, inputs))

    def program(self, x: Tensor, skip: Tensor | None, residual_scale: Tensor | None, tensors: Sequence[Tensor]) -> Callable | None:
        """What has been recorded of such calls, with all that they write to in it; None if nothing has been."""
        plain, key = self._key((x, skip, residual_scale, *tensors, *self.moved.buffers))
        return program.recorded(self.call.programs, key) if plain else None

    def forward(
        self, x: Tensor, skip: Tensor | None, residual_scale: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """`_run` by its program, below autograd."""
        call, inputs = self.call, (x, skip, residual_scale, *tensors, *self.moved.buffers)
        plain, key = self._key(inputs)

        def schedule(x, skip, residual_scale, *_):
            out, saved = _run(x, skip, residual_scale, self.block, self.save, call.level, call.backend, call.narrow)
            if plain:
                self.settle(saved)
            return out, saved

        with no_autocast(x.device.type):
            out, saved = program.run(call.programs, key, schedule, inputs, call.backend)
        if not plain:
            self.settle(saved)
        elif self.moved.buffers:
            torch.autograd.graph.increment_version(self.moved.buffers)
        return out, saved


_MOST_MOMENTA = 4
"""A momentum that changes at every step would have a program recorded at every step."""


def _are_usual(buffers: Sequence[Tensor], momenta: tuple, known: set[tuple]) -> bool:
    """Whether a program may move these buffers, by these momenta. BNs that two units share move one after the other."""
    for buffer in buffers:
        if buffer.requires_grad or buffer.is_inference():
            return False
    if len({*map(id, buffers)}) < len(buffers):
        return False
    if momenta in known:
        return True
    if len(known) >= _MOST_MOMENTA or not {*map(type, momenta)} <= {float, type(None)}:
        return False
    known.add(momenta)
    return True


def _circumstances(device: torch.device, inputs: Sequence[Tensor | None]) -> tuple:
    """What decides who runs what, and which compilation of a kernel, beside the plan."""
    strides = tuple([tensor.stride() for tensor in inputs if tensor is not None])
    places = () if device.type == "cpu" else tuple([None if tensor is None else tensor.data_ptr() % 16 for tensor in inputs])
    return program.switches(device.type), strides, places


def output_fake(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """An output without values, of the shape and layout of eager's."""
    layout = memory_format(_output_channels_last(x, block, is_narrow(x, block)))
    return torch.empty(block.output_shape(x), dtype=dtype, device=x.device, memory_format=layout)


def _forward_fake(x, skip, residual_scale, tensors, spec, eps, save, level, backend):
    block = unpack(tensors, spec, eps)
    pixels = [x.shape[0] * height * width for height, width in block.sizes(*x.shape[2:])]
    pixels += pixels[-1:] if block.projection is not None else []
    channels = [unit.weight.shape[0] for unit in block.units()]
    out = output_fake(x, block, x.dtype)
    normalised = [x.shape[1], *channels[: len(block.main) - 1]] if FORMS[block.form].preactivated else channels
    saved = [x.new_empty((5, k), dtype=statistics_dtype(x.dtype)) for k in normalised]
    if save:
        depth = Level.of(level, block)
        saved += [x.new_empty((p, k)) for p, k, stored in zip(pixels, channels, depth.stores, strict=True) if stored]
        for unit, kept in zip(block.units(), depth.keeps_moments(block), strict=True):
            if kept:
                c, k = unit.weight.shape[:2]
                saved += [x.new_empty(shape, dtype=torch.float64) for shape in ((k,), (k, k))]
                saved.append(x.new_empty(c, dtype=torch.bool))
        if FORMS[block.form].relu:
            saved.append(x.new_empty((pixels[-1], sign_bytes(out.shape[1])), dtype=torch.uint8))
    return out, saved


@functools.cache
def _requested(needs: tuple[bool, ...], spec: tuple[int, ...], eps: tuple[float, ...]) -> Gradients:
    return Gradients(needs[0], needs[1], needs[2], unpack(needs[3:], spec, eps))


def _backward(dout, x, residual_scale, tensors, saved, spec, eps, needs, level, backend):
    def schedule(dout, x, residual_scale, *rest):
        kept = rest[: len(tensors)], rest[len(tensors) :]
        return _run_backward(dout, x, residual_scale, *kept, spec, eps, needs, level, backend, apart=True)

    # How kernels read sign bits depends on where they lie.
    what = "backward", tuple(needs), saved[-1].data_ptr() % 16
    return _replayed(schedule, what, (dout, x, residual_scale, *tensors, *saved), spec, eps, level, backend)


def _run_backward(dout, x, residual_scale, tensors, saved, spec, eps, needs, level, backend, apart):
    """`apart`: whether no two gradients may share memory, as those of vectors do otherwise, as rows of one tensor."""
    block = unpack(tensors, spec, eps)
    run = run_of(backends.resolve(backend, x.device, x.dtype))
    with no_autocast(x.device.type):
        kept = Saved.from_list(saved, block, level)
        requested = _requested(tuple(needs), tuple(spec), tuple(eps))
        gradients = backward(dout, x, residual_scale, block, kept, requested, level, run)
    found = []
    if needs[0]:
        found.append(in_layout(gradients.x, is_channels_last(x)))
    if needs[1]:
        found.append(gradients.skip)
    if needs[2]:
        found.append(gradients.residual_scale.to(residual_scale.dtype))
    units = gradients.block.units()
    for tensor, (u, name), needed in zip(tensors, tensor_fields(spec), needs[3:], strict=True):
        if needed:
            found.append(as_parameter(getattr(units[u], name), tensor, apart))
    return found


def _backward_key(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple:
    # How kernels read sign bits, which come last where there are any, depends on where they lie.
    return tuple(needs), inputs[-1].data_ptr() % 16, *_circumstances(inputs[1].device, inputs)


def _backward_as_called(call, dout, x, residual_scale, tensors, saved, spec, eps, needs, level, backend):
    """`_backward`, gradients of vectors not apart, of a call that is not watched, by its program."""

    def schedule(dout, x, residual_scale, *rest):
        kept = rest[: len(tensors)], rest[len(tensors) :]
        return _run_backward(dout, x, residual_scale, *kept, *numbers, level, backend, apart=False)

    numbers = spec, eps, needs
    inputs = dout, x, residual_scale, *tensors, *saved
    with no_autocast(x.device.type):
        return program.run(call.programs, _backward_key(inputs, needs), schedule, inputs, call.backend)


def _backward_fake(dout, x, residual_scale, tensors, saved, spec, eps, needs, level, backend):
    found = []
    if needs[0]:
        found.append(torch.empty_like(x, memory_format=memory_format(is_channels_last(x))))
    if needs[1]:
        found.append(torch.empty_like(dout, memory_format=torch.channels_last))
    if needs[2]:
        found.append(torch.empty_like(residual_scale))
    found += [empty_like_parameter(t) for t, needed in zip(tensors, needs[3:], strict=True) if needed]
    return found


def _keep(ctx, kept, x, residual_scale, tensors, saved, eps, level, backend):
    # Without this, autograd makes a tensor of zeros for each output, also for those whose gradient nobody reads.
    ctx.set_materialize_grads(False)
    # Running statistics are not kept: the next forward may write to them, and the backward reads `vectors` instead.
    scales = () if residual_scale is None else (residual_scale,)
    ctx.held = kept, scales != (), [tensors[i] for i in kept.biases], copy_of(kept, tensors)
    ctx.rest = eps, level, backend
    ctx.save_for_backward(x, *scales, *[tensors[i] for i in kept.saved], *saved)


def _kept(ctx, first):
    """What was kept from the tensor `first` of those saved: that one, the residual scale, the tensors, and what stands behind."""
    kept, scaled, biases, copy = ctx.held
    found = ctx.saved_tensors
    rest = found[first + 1 + scaled :]
    return found[first], found[first + 1] if scaled else None, kept.tensors(rest, biases, copy), rest[len(kept.saved) :]


def _gradients(ctx, dout, wanted_x, wanted_skip, wanted_scale, wanted_tensors, call):
    """Gradients of x, skip and residual scale, and the list of those of the tensors; `call` is block_backward."""
    if dout is None:
        return None, None, None, [None] * len(wanted_tensors)
    eps, level, backend = ctx.rest
    kept, spec = ctx.held[0].indices, ctx.held[0].spec
    x, residual_scale, tensors, saved = _kept(ctx, 0)
    needs = [wanted_x, wanted_skip, wanted_scale, *[wanted_tensors[i] for i in kept]]
    if internals.is_batched(dout) or internals.is_dual():
        # Ordinary autograd has rules for batched and dual tensors.
        found = iter(reference_gradients(dout, x, residual_scale, tensors, saved, spec, eps, needs, level))
    else:
        found = iter(call(dout, x, residual_scale, tensors, saved, spec, eps, needs, level, backend))
    dx, dskip, dscale = (next(found) if need else None for need in needs[:3])
    of_tensors = [None] * len(wanted_tensors)
    for i in kept:
        if wanted_tensors[i]:
            of_tensors[i] = next(found)
    return dx, dskip, dscale, of_tensors


def _save_for_backward(ctx, inputs, output):
    x, _, residual_scale, tensors, spec, eps, save, level, backend = inputs
    _, saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.save = save
    if save:
        kept = kept_of(tuple(spec), residual_scale is not None)
        _keep(ctx, kept, x, residual_scale, tensors, saved, eps, level, backend)


def refuse_gradient(operator: str) -> NoReturn:
    """Raises RuntimeError: a graph that was made without gradients is trained."""
    raise RuntimeError(
        f"{operator} kept nothing for backward (save=False): this graph was made under torch.no_grad(); to train it, make it with "
        "gradients enabled"
    )


def _forward_gradient(ctx, dout, _):
    if not ctx.save:
        refuse_gradient("block_forward")
    found = _gradients(ctx, dout, *ctx.needs_input_grad[:4], torch.ops.fused_res.block_backward.default)
    return *found, None, None, None, None, None


def _save_for_double_backward(ctx, inputs, output):
    dout, x, residual_scale, tensors, saved, spec, eps, needs, level, _ = inputs
    ctx.set_materialize_grads(False)
    scales = () if residual_scale is None else (residual_scale,)
    kept = kept_of(tuple(spec), bool(scales))
    ctx.held = kept, scales != (), [tensors[i] for i in kept.biases], copy_of(kept, tensors)
    ctx.rest = eps, [*needs[:3], *(needs[3 + i] for i in kept.indices)], level
    ctx.tensors_count = len(tensors)
    ctx.save_for_backward(dout, x, *scales, *[tensors[i] for i in kept.saved], *saved)


def _backward_gradient(ctx, incoming):
    x, residual_scale, tensors, saved = _kept(ctx, 1)
    kept = ctx.held[0]
    arguments = ctx.saved_tensors[0], x, residual_scale, tensors, saved, kept.spec, *ctx.rest
    of_dout, of_x, of_scale, of_kept = second_gradients(incoming, *arguments)
    of_tensors = [None] * ctx.tensors_count
    for i, gradient in zip(kept.indices, of_kept, strict=True):
        of_tensors[i] = gradient
    return of_dout, of_x, of_scale, of_tensors, [None] * len(saved), None, None, None, None, None


for _name, _kernel, _fake in (("block_forward", forward_in_graph, _forward_fake), ("block_backward", _backward, _backward_fake)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    register_fake(f"fused_res::{_name}", _fake, lib=_library)
register_autograd("fused_res::block_forward", _forward_gradient, setup_context=_save_for_backward, lib=_library)
register_autograd("fused_res::block_backward", _backward_gradient, setup_context=_save_for_double_backward, lib=_library)

_operator = torch.ops.fused_res.block_forward.default
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def is_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody traces or transforms the operators that are called, or a tensor is not a plain one."""
    return (
        torch.compiler.is_compiling()
        or internals.has_modes()
        or internals.is_transformed()
        or internals.is_traced()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _below_autograd(function, *arguments):
    with internals.below_autograd():
        return function(*arguments)


class _Direct(internals.Function):
    """The operator without its registration, in which lists of tensors are taken apart and put together at every layer."""

    @staticmethod
    def forward(ctx, called, found, x, skip, residual_scale, *tensors):
        out, saved = _below_autograd(called.forward, x, skip, residual_scale, tensors)
        call = called.call
        ctx.call, ctx.again = call, None if isinstance(called, Called) else called
        _keep(ctx, call.kept, x, residual_scale, tensors, saved, call.eps, call.level, call.backend)
        found += saved
        return out

    @staticmethod
    def backward(ctx, dout):
        again, inputs, needs = ctx.again, None, ctx.needs_input_grad
        watched = torch.is_grad_enabled() or is_watched((dout,))
        if again is not None and not watched and dout is not None and not internals.is_dual():
            x, residual_scale, tensors, saved = _kept(ctx, 0)
            inputs = dout, x, residual_scale, *tensors, *saved
            gradients = again.backward(needs, inputs)
            if gradients is not None:
                return None, None, *gradients
        call = torch.ops.fused_res.block_backward.default
        if not watched:
            call = functools.partial(_below_autograd, _backward_as_called, ctx.call)
        *found, of_tensors = _gradients(ctx, dout, *needs[2:5], needs[5:], call)
        gradients = *found, *of_tensors
        if inputs is not None:
            asked = [*needs[2:5], *(needs[5 + i] for i in ctx.held[0].indices)]
            recorded = program.recorded(ctx.call.programs, _backward_key(inputs, asked))
            if recorded is not None:
                again.keep_backward(needs, inputs, recorded, gradients)
        return None, None, *gradients


def block_forward(called, x, skip, residual_scale, tensors):
    """The operator `fused_res::block_forward` on the block's tensors and the numbers of its call; directly where nobody watches.

    called: a `Called`, or a `fused_res.again.Again`, which has the same method.
    """
    call = called.call
    if call.watched:
        out, saved = _operator(x, skip, residual_scale, tensors, call.spec, call.eps, called.save, call.level, call.backend)
        called.settle(saved)
        return out, saved
    if called.save:
        saved: list[Tensor] = []
        return _Direct.call((called, saved), (x, skip, residual_scale, *tensors)), saved
    return _below_autograd(called.forward, x, skip, residual_scale, tensors)
