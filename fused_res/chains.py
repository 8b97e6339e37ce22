"""`Chain` and `Residual`: sequences of convolution, BN and ReLU as one operator, and the residual connection around any module."""

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from fused_res import known
from fused_res.anatomy import Anatomy, containers
from fused_res.eligibility import NO_SHORTCUT, Shortcut, is_traced
from fused_res.fusible import Fusible, labels
from fused_res.reading import child, convolution_of
from fused_res.spec import CHAIN, FORMS, LINEAR, LINEAR_CHAIN, PRE_ACTIVATION

_PROJECTION = "projection"


def layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a module calls one after the other, each with its path, through all that is a container and no more."""
    if type(module) is nn.Sequential or known.about(type(module), "containers") is not None:
        for child, inner in module._modules.items():
            yield from layers(f"{name}.{child}" if name else child, inner)
    else:
        yield name, module


def _kind(module: nn.Module) -> str:
    """ "conv", "norm", "relu", "idle", or the class's name."""
    if isinstance(module, nn.Conv2d):
        return "conv"
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) or known.FROZEN in (known.about(type(module), "norms") or ()):
        return "norm"
    if isinstance(module, nn.ReLU):
        return "relu"
    return "idle" if isinstance(module, nn.Identity) else type(module).__name__


_STEPS = {False: ("conv", "norm", "relu"), True: ("norm", "relu", "conv")}
_WORDS = {"conv": "nn.Conv2d", "norm": "nn.BatchNorm2d", "relu": "nn.ReLU"}


def read(name: str, module: nn.Module) -> tuple[Anatomy | None, str | None]:
    """The anatomy of a sequence of conv-BN-ReLU-…-conv-BN, with a ReLU at its end or without, or of BN-ReLU-conv-…; or why it is
    none. By the kinds of its layers: whether they may be replaced is asked at every call.

    name: of the module in the one whose anatomy it is to be; "" where that is itself.
    """
    return sequence(layers(name, module), name)


def sequence(called: Iterable[tuple[str, nn.Module]], name: str = "") -> tuple[Anatomy | None, str | None]:
    """The same of layers that are called one after the other, each with its path; name: what they are called together."""
    named = [(path, layer, _kind(layer)) for path, layer in called]
    idle = tuple(path for path, _, kind in named if kind == "idle")
    named = [layer for layer in named if layer[2] != "idle"]
    preactivated = bool(named) and named[0][2] == "norm"
    steps = _STEPS[preactivated]
    for i, (path, layer, kind) in enumerate(named):
        if kind != steps[i % 3]:
            return None, f"{path or 'it'} is a {type(layer).__name__}, not {_WORDS[steps[i % 3]]}"
    if not named or len(named) % 3 == 1 or (preactivated and len(named) % 3):
        ends = "a convolution" if preactivated else "a BN or a ReLU"
        return None, f"{name or 'it'} does not end in {ends}"
    paths = {kind: [path for path, _, k in named if k == kind] for kind in steps}
    form = PRE_ACTIVATION if preactivated else CHAIN if len(named) % 3 == 0 else LINEAR_CHAIN
    units = tuple(zip(paths["conv"], paths["norm"], strict=True))
    return Anatomy(units, None, tuple(paths["relu"]), idle, form=form), None


def output_shape(convolutions: list[nn.Conv2d], x: Tensor) -> tuple[int, ...] | None:
    """What convolutions one after the other make of x; None where that is left to them, since the first cannot take x."""
    if x.dim() != 4 or x.shape[1] != convolutions[0].in_channels:
        return None
    size = tuple(x.shape[2:])
    for conv in convolutions:
        size = convolution_of(conv).output_size(*size)
    return (x.shape[0], convolutions[-1].out_channels, *size)


class _Sequence(Fusible):
    """A fusible module whose anatomy is that of a sequence of layers, read anew when there are others than at the last call."""

    _last = None
    """What the anatomy was read from, and what `_read` said of it."""
    __jit_unused_properties__ = ("_anatomy", "_labels", "_containers")

    def _now(self) -> list[nn.Module | None]:
        """What the anatomy is read from."""
        raise NotImplementedError

    def _known(self) -> tuple[Anatomy | None, str | None]:
        if torch.compiler.is_compiling():
            return self._read()
        layers, last = self._now(), self._last
        if last is None or len(last[0]) != len(layers) or not all(map(operator.is_, last[0], layers)):
            last = layers, self._read()
            vars(self)["_last"] = last
        return last[1]

    def __getstate__(self) -> dict:
        return {name: value for name, value in super().__getstate__().items() if name != "_last"}

    def _read(self) -> tuple[Anatomy | None, str | None]:
        """The anatomy, or why there is none."""
        raise NotImplementedError

    @property
    def _anatomy(self) -> Anatomy | None:
        return self._known()[0]

    @property
    def _labels(self) -> tuple[str, ...]:
        return labels(self._anatomy)

    @property
    def _containers(self) -> tuple[tuple[str, int], ...]:
        return containers(self._anatomy)

    def _shortcut(self) -> Shortcut:
        return NO_SHORTCUT if self._anatomy is None else super()._shortcut()

    def _passing_reason(self, x: Tensor) -> str | None:
        return self._known()[1] or super()._passing_reason(x)


class Chain(_Sequence, nn.Sequential):
    """An `nn.Sequential` of conv-BN-ReLU-…-conv-BN, with a ReLU at its end or without, that runs as one operator: `relu(main(x))`
    or `main(x)`, without a shortcut. Plain networks are made of these.

    It is constructed, indexed and saved as an `nn.Sequential`; its layers may stand in Sequentials of their own. What the operator
    cannot stand for, another sequence of layers say, runs as it would there, after one warning; `fused_res.explain` tells the
    reason.

    Shapes: x [N, C, H, W] to [N, K, H', W'], in x's dtype (autocast's under autocast).
    """

    def _now(self) -> list[nn.Module | None]:
        return [layer for _, layer in layers("", self)]

    def _read(self) -> tuple[Anatomy | None, str | None]:
        anatomy, reason = read("", self)
        if anatomy is not None and anatomy.form == PRE_ACTIVATION:
            return None, f"{anatomy.units[0][1]} is a BN in front of a convolution, and there is no shortcut"
        return anatomy, reason

    def forward(self, input: Tensor) -> Tensor:
        return self._call(input)

    def _unfused(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)


# TorchScript compiles the source of what a function wraps.
Chain.forward.__wrapped__ = nn.Sequential.forward


class Residual(_Sequence, nn.Module):
    """The residual connection around any module that keeps the shape: `y = a * block(x) + x`.

    Around a sequence of conv-BN-ReLU-…-conv-BN (an `nn.Sequential` or a `Chain`), or BN-ReLU-conv-…-BN-ReLU-conv, it runs as one
    operator; around one that ends in a ReLU the sequence does, and the sum is one pass more. Around anything else the block runs
    as it is. `fused_res.explain` tells which, and why.

    Args:
        block: any module of one tensor.
        residual_scale: initial value of the learnable scalar a: 0.0 starts as the identity. None for no such parameter.
        shortcut: what stands in for x in the sum: None for x itself; a module; or "projection" for the 1x1 convolution and BN that
            fit, of a block whose convolutions and strides are known: a sequence as above. `Sequential([AvgPool2d,] Conv2d,
            BatchNorm2d)` becomes part of the operator.

    Shapes: x of any shape, to y of the same; with a shortcut, what the block and the shortcut make, which must be one shape. In the
    dtype of the sum: under autocast that of x, where that is wider.

    Raises:
        TypeError: a block or a shortcut that is no module; a residual scale that is no number.
        ValueError: "projection" for a block whose output is not known beforehand.
        RuntimeError, when it is called: shapes that differ, which it names; for sequences of convolutions and BNs before anything
            is computed, for others before the sum.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        residual_scale: float | None = None,
        shortcut: nn.Module | Literal["projection"] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(block, nn.Module):
            raise TypeError(f"block: expected an nn.Module, got {type(block).__name__}")
        if shortcut is not None and shortcut != _PROJECTION and not isinstance(shortcut, nn.Module):
            raise TypeError(f'shortcut: expected an nn.Module, "projection" or None, got {shortcut!r}')
        if residual_scale is not None and (isinstance(residual_scale, bool) or not isinstance(residual_scale, (int, float))):
            raise TypeError(f"residual_scale: expected a number or None, got {type(residual_scale).__name__}")
        self.block = block
        self.shortcut = _projection_for(block) if isinstance(shortcut, str) else shortcut
        self._first_scale = None if residual_scale is None else float(residual_scale)
        scale = None if residual_scale is None else nn.Parameter(torch.tensor(self._first_scale))
        self.register_parameter("residual_scale", scale)

    _promotes = True

    def _now(self) -> list[nn.Module | None]:
        return [self.shortcut, *(layer for _, layer in layers("", self.block))]

    def _read(self) -> tuple[Anatomy | None, str | None]:
        anatomy, reason = read("block", self.block)
        if anatomy is None:
            return None, reason
        if anatomy.form == PRE_ACTIVATION and self.shortcut is not None:
            return None, "the shortcut reads x, which block.0 normalises"
        if anatomy.form == LINEAR_CHAIN:
            anatomy = anatomy._replace(form=LINEAR, shortcut="shortcut")
        if FORMS[anatomy.form].skip:
            anatomy = anatomy._replace(residual_scale="residual_scale")
        return anatomy, None

    def _shortcut(self) -> Shortcut:
        found = super()._shortcut()
        return found if found.kind != "none" else found._replace(reason="a ReLU stands in front of the sum, a pass of its own")

    def forward(self, x: Tensor) -> Tensor:
        anatomy, _ = self._known()
        if anatomy is None:
            return self._sum(self.block(x), x)
        if self.shortcut is None and isinstance(x, Tensor):
            self._check_known(x, tuple(x.shape), "x")
        return self._call(x) if FORMS[anatomy.form].skip else self._sum(self._call(x), x)

    def _unfused(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return self._sum(out, x) if FORMS[self._anatomy.form].skip else out

    def _shortcuts_value(self, x: Tensor) -> Tensor:
        skip = super()._shortcuts_value(x)
        self._check_known(x, tuple(skip.shape), "shortcut(x)")
        return skip

    def _check_known(self, x: Tensor, skip: tuple[int, ...], name: str) -> None:
        """That what is added to what the convolutions make of x has its shape, where that is known beforehand."""
        expected = None if is_traced() else output_shape([child(self, conv) for conv, _ in self._anatomy.units], x)
        if expected is not None and skip != expected:
            raise _different(expected, skip, name)

    def _sum(self, out: Tensor, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        # torch.fx has no shapes, and torch.jit.trace would warn that it cannot keep a comparison of them.
        if isinstance(out, Tensor) and not is_traced() and out.shape != skip.shape:
            raise _different(tuple(out.shape), tuple(skip.shape), "x" if self.shortcut is None else "shortcut(x)")
        return out + skip if self.residual_scale is None else self.residual_scale * out + skip

    def reset_parameters(self) -> None:
        """Give `residual_scale` its first value again; for a model that was built on the meta device, after `to_empty`."""
        if self.residual_scale is not None:
            nn.init.constant_(self.residual_scale, self._first_scale)

    def extra_repr(self) -> str:
        return "" if self.residual_scale is None else "residual_scale=True"


def _different(out: tuple[int, ...], skip: tuple[int, ...], name: str) -> RuntimeError:
    return RuntimeError(
        f"Residual: block(x) has the shape {out}, and {name} the shape {skip}; a block that changes the shape needs a shortcut "
        'that changes it alike: shortcut="projection", or a module'
    )


def _projection_for(block: nn.Module) -> nn.Module:
    """A 1x1 convolution and a BN from what a sequence's first convolution reads to what its last one writes."""
    anatomy, reason = read("block", block)
    if anatomy is None or anatomy.form == PRE_ACTIVATION:
        raise ValueError(
            f'shortcut: "projection" is for sequences of convolution, BN and ReLU, got {type(block).__name__}'
            f"{'' if reason is None else f', where {reason}'}: give a module"
        )
    inside = nn.ModuleDict({"block": block})
    convolutions = [child(inside, conv) for conv, _ in anatomy.units]
    stride = tuple(math.prod(steps) for steps in zip(*(convolution_of(conv).stride for conv in convolutions), strict=True))
    first, last = convolutions[0], convolutions[-1]
    options = {"device": last.weight.device, "dtype": last.weight.dtype}
    conv = nn.Conv2d(first.in_channels, last.out_channels, 1, stride, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(last.out_channels, **options))


def _scripted(self, x: Tensor) -> Tensor:
    out = self.block(x)
    if self.residual_scale is not None:
        out = self.residual_scale * out
    if self.shortcut is not None:
        x = self.shortcut(x)
    return out + x


Residual.forward.__wrapped__ = _scripted
