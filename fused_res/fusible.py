"""What our blocks and fused ones of other people have in common: they run as one operator, or through their children."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_res import again, known, planner, recompute, standing
from fused_res.again import Again
from fused_res.anatomy import Anatomy, containers
from fused_res.block.exported import expect_composition
from fused_res.block.validate import compute_dtype
from fused_res.call import Laid, lay
from fused_res.eligibility import (
    NO_DATA,
    NO_SHORTCUT,
    Shortcut,
    container_reason,
    foreign,
    idle_reason,
    input_reason,
    is_observed,
    observer_reason,
    scale_reason,
    shortcut_of,
    unit_reason,
)
from fused_res.functional import is_transformed, rerun, run
from fused_res.internals import constant_result, is_exporting, pack_hook
from fused_res.notices import say_once
from fused_res.originals import BatchNorm2d, Identity, ReLU
from fused_res.reading import child, convolution_of, lookup, unit_of
from fused_res.recompute import Way
from fused_res.spec import FORMS, Block

EMPTY = "the batch is empty"
NOT_IMAGES = "x has {} dimensions"
_UNSAID = (EMPTY, NO_DATA, *map(NOT_IMAGES.format, (0, 1, 2, 3, 5, 6)))
"""Reasons without a warning: there is nothing to compute, or eager raises."""


@constant_result  # torch.export is not to follow this, but to do it
def _speak_of_export() -> None:
    expect_composition()
    if torch.onnx.is_in_onnx_export():
        return
    say_once(
        "export",
        "torch.export keeps a block as one operator, in which quantisers see no convolution: export for those under "
        'fused_res.use_backend("eager"). run_decompositions() gives plain aten',
    )


def labels(anatomy: Anatomy) -> tuple[str, ...]:
    """What error messages call the units, each by its modules in the order of their calls."""
    preactivated = FORMS[anatomy.form].preactivated
    return tuple(f"{bn}/{conv}" if preactivated else f"{conv}/{bn}" for conv, bn in anatomy.units)


class _Reading(NamedTuple):
    """What a block's modules hold that a call asks for.

    names: what error messages call the units. frozen: those BNs, by name. looks: all tensors. seen: earlier calls, where it is
    kept.
    """

    laid: Laid
    names: tuple[str, ...]
    scale: Tensor | None
    frozen: Sequence[tuple[str, nn.Module]]
    looks: tuple[Tensor, ...]
    seen: list[Again] | None = None


class Fusible:
    """A mixin for `nn.Module`s that compute `out = relu(a * main(x) + shortcut(x))`, or what the form of `_anatomy` says, over the
    child modules that this names.

    Child modules are read anew whenever one of them has changed. What the operator cannot stand for (another type, a hook, a
    parametrization, …) runs through the child modules themselves, after one warning; `fused_res.explain` tells the reason.
    """

    _anatomy: Anatomy
    _promotes = False
    """Whether an unfused block's output may be of another dtype than its main branch (`fused_res.traced.Trace`)."""
    _fused_res_level: str | None = None
    """The level that `fuse` was asked for."""
    _labels: tuple[str, ...]
    """What error messages call the units of the main branch."""
    _containers: tuple[tuple[str, int], ...]

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        if isinstance(vars(cls).get("_anatomy"), Anatomy):
            cls._labels = labels(cls._anatomy)
            cls._containers = containers(cls._anatomy)

    def _layers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(child(self, conv), child(self, bn)) for conv, bn in self._anatomy.units]

    def _shortcut(self) -> Shortcut:
        name, form = self._anatomy.shortcut, FORMS[self._anatomy.form]
        if not form.skip:
            return NO_SHORTCUT
        bare = form.preactivated
        return shortcut_of(None if name is None else child(self, name), name or "", bare)

    def _scale(self) -> Tensor | None:
        name = self._anatomy.residual_scale
        return None if name is None else lookup(self._parameters, self, name)

    def unfused_reason(self, x: Tensor) -> str | None:
        """Why this block, called with x now, runs through its child modules; None where the operator runs.

        `use_backend("eager")`, an empty batch, tracing and function transforms are such reasons too.
        """
        return self._passing_reason(x) or self.standing_reason() or self._input_reason(x, self._frozen_norms())

    def _passing_reason(self, x: Tensor) -> str | None:
        """Of such reasons those that have nothing to do with the child modules."""
        if planner.is_eager_forced():
            return 'use_backend("eager")'
        reason = input_reason(x) or observer_reason()
        if reason is not None:
            return reason
        if x.numel() == 0:
            return EMPTY
        return "a torch.func transform or forward-mode AD is active" if is_transformed() else None

    def standing_reason(self, now: bool = True) -> str | None:
        """Why this block runs unfused as it stands, whatever it is called with.

        Unless `now`, less what is otherwise while it is called, or in evaluation mode.
        """
        anatomy = self._anatomy
        for name in anatomy.activations:
            reason = foreign(name, child(self, name), ReLU)
            if reason is not None:
                return reason
        if anatomy.residual_scale is not None:
            reason = scale_reason(self._scale())
            if reason is not None:
                return reason
        inner = (ReLU,) if anatomy.activated_norms else (ReLU, Identity)
        preactivated = FORMS[anatomy.form].preactivated
        last = None if preactivated else anatomy.units[-1]
        for unit, (conv, norm) in zip(anatomy.units, self._layers(), strict=True):
            conv_name, name = unit
            reason = unit_reason(conv_name, conv, name, norm, (Identity,) if unit is last else inner, now)
            if reason is None and anatomy.activated_norms and unit is not last and not _is_activated(norm):
                reason = f"{name} is a {type(norm).__name__}, without a ReLU of its own"
            if reason is not None:
                return reason
        if preactivated:
            shortcut = self._shortcut()
            if shortcut.kind == "as it is":  # it reads what only the operator has
                return shortcut.reason
        for name in anatomy.idle:
            reason = idle_reason(name, child(self, name), now)
            if reason is not None:
                return reason
        for name, children in self._containers:
            reason = container_reason(name, child(self, name), children)
            if reason is not None:
                return reason
        return None

    def _input_reason(self, x: Tensor, frozen: Iterable[tuple[str, nn.Module]]) -> str | None:
        """Where eager's output is of another dtype than what the operator computes in."""
        if x.dim() != 4:
            return NOT_IMAGES.format(x.dim())
        for name, bn in frozen:
            dtype, found = compute_dtype(x), torch.promote_types(compute_dtype(x), bn.weight.dtype)
            if bn.weight.dtype != dtype:
                return f"{name} is a {type(bn).__name__} in {bn.weight.dtype}: it makes {found} of images in {dtype}"
        if FORMS[self._anatomy.form].preactivated and compute_dtype(x) != x.dtype:
            return f"x is in {x.dtype}, in which its BN computes under autocast, and not in {compute_dtype(x)}"
        if self._promotes and torch.is_autocast_enabled(x.device.type):
            shortcut = self._shortcut()
            if shortcut.kind == "as it is" or (shortcut.kind == "identity" and compute_dtype(x) != x.dtype):
                return f"the sum of {compute_dtype(x)} and a shortcut of another dtype is of the wider one"
        return None

    def _norms(self) -> Iterator[tuple[str, nn.Module]]:
        for _, name in self._anatomy.units:
            yield name, child(self, name)
        shortcut = self._shortcut()
        if shortcut.bn is not None:
            yield shortcut.names.split("/")[1], shortcut.bn

    def _frozen_norms(self) -> list[tuple[str, nn.Module]]:
        return [(name, bn) for name, bn in self._norms() if _is_frozen(bn)]

    def frozen(self) -> tuple[bool, ...]:
        """For each of `parts().units()`, whether its BN is a product with a fixed scale."""
        return tuple([_is_frozen(bn) for _, bn in self._norms()])

    def _call(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            reason = self.unfused_reason(x)
            if reason is None and is_exporting():
                _speak_of_export()
        else:
            pack = pack_hook()
            return self._called(x) if pack is None else self._settled(x, pack)
        if reason is not None:
            return self._run_modules(x, reason)
        return self._run(x, self._reading(self._shortcut()), self._fused_res_level)

    def _is_as_it_was(self) -> bool:
        """Whether what a call goes by beside the child modules is what it was when the block was fused."""
        return True

    def _called(self, x: Tensor) -> Tensor:
        """The call where neither a compiler nor a checkpoint looks on."""
        read = standing.last(self)
        if read is not None and isinstance(x, Tensor) and self._is_as_it_was() and not is_observed():
            known = again.find(read.seen, (x, *read.looks), self._fused_res_level)
            if known is not None:
                return rerun(known, x, read.laid, read.scale, self)
        reason = self._passing_reason(x)
        if reason is None and read is None:
            reason = self.standing_reason()
            if reason is None:
                read = self._reading(self._shortcut())
                kept = read._replace(seen=[])
                if not read.laid.block.given and standing.keep(self, kept):
                    read = kept
        reason = reason or self._input_reason(x, read.frozen)
        return self._run(x, read, self._fused_res_level) if reason is None else self._run_modules(x, reason)

    def _settled(self, x: Tensor, pack: Callable) -> Tensor:
        """The call in a checkpoint, whose recompute runs as its forward did."""

        def decide() -> Way:
            return Way(planner.forced(), self._fused_res_level, self.unfused_reason(x), self._shortcut())

        way = recompute.settle(pack, self, decide)
        with planner.under(way.forced):
            if way.reason is not None:
                return self._run_modules(x, way.reason)
            return self._run(x, self._reading(way.shortcut), way.level)

    def _reading(self, shortcut: Shortcut) -> "_Reading":
        laid, scale = lay(self._parts(shortcut)), self._scale()
        looks = laid.held if scale is None else (scale, *laid.held)
        return _Reading(laid, (*self._labels, shortcut.names), scale, self._frozen_norms(), looks)

    def _run(self, x: Tensor, read: "_Reading", level: str | None) -> Tensor:
        skip = self._shortcuts_value(x) if read.laid.block.given else None
        return run(x, read.laid, skip, read.scale, read.names, level, self, read.seen)[0]

    def _shortcuts_value(self, x: Tensor) -> Tensor:
        """What a shortcut that runs by itself makes of x."""
        return child(self, self._anatomy.shortcut)(x)

    def parts(self) -> Block:
        """What the operator computes when this block is called now, less the value of a shortcut that runs by itself."""
        return self._parts(self._shortcut())

    def _parts(self, shortcut: Shortcut) -> Block:
        projection = None
        if shortcut.conv is not None:
            projection = convolution_of(shortcut.conv) if shortcut.bn is None else unit_of(shortcut.conv, shortcut.bn)
        main = [unit_of(conv, bn) for conv, bn in self._layers()]
        return Block(main, projection, shortcut.pool, shortcut.kind == "as it is", self._anatomy.form)

    def _run_modules(self, x: Tensor, reason: str) -> Tensor:
        if reason not in _UNSAID and not planner.is_eager_forced():
            asked = planner.forced()
            if asked is not None:
                raise RuntimeError(f"backend {asked.backend!r} cannot run this block: {reason}")
            if not torch.compiler.is_compiling():
                message = f"runs unfused, through its child modules: {reason}"
                say_once(f"{type(self).__name__} {message}", message, self)
        return self._unfused(x)

    def _unfused(self, x: Tensor) -> Tensor:
        """What the child modules make of x, called as this class calls them."""
        raise NotImplementedError


def _is_frozen(norm: nn.Module) -> bool:
    return type(norm) is not BatchNorm2d and known.FROZEN in (known.about(type(norm), "norms") or ())


def _is_activated(norm: nn.Module) -> bool:
    about = None if type(norm) is BatchNorm2d else known.about(type(norm), "norms")
    return about is not None and known.ACTIVATED in about
