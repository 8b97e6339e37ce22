"""The layers in front of a network's blocks, convolution, BN, ReLU and max pooling, as one operator and a pass.

They are children of the network itself, whose `forward` calls them one after the other. A network that `fuse` has fused calls its
original `forward` on a view of itself: all that it has, but for these children. The first of them stands for all there, and the
others do nothing. Under torch.compile and whatever else looks on they are called as they are.
"""

import copyreg
import functools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from fused_res import backends, planner
from fused_res.anatomy import Anatomy, containers
from fused_res.chains import layers, sequence
from fused_res.derived import as_class, derive
from fused_res.eligibility import is_observed, observed
from fused_res.fusible import Fusible, labels
from fused_res.primitives.max_pool import Pool, max_pool
from fused_res.primitives.run import of
from fused_res.spec import CHAIN, pair

_KNOWN = {
    "torchvision.models.resnet.ResNet": ("conv1", "bn1", "relu", "maxpool"),
    "torchvision.models._utils.IntermediateLayerGetter": ("conv1", "bn1", "relu", "maxpool"),
    "timm.models.resnet.ResNet": ("conv1", "bn1", "act1", "maxpool"),
}
"""By class the children that are called one after the other: a convolution, or several with BNs and ReLUs in between, a BN, a
ReLU, and the pooling."""


STEM = "stem"
"""What it is called in reports, behind the name of its network."""


class Stem(Fusible, nn.Module):
    """`relu(bn(conv(x)))`, or more of these one after the other, over children of a network."""

    def __init__(self, anatomy: Anatomy, children: dict[str, nn.Module]) -> None:
        super().__init__()
        self._modules.update(children)
        self._anatomy, self._labels, self._containers = anatomy, labels(anatomy), containers(anatomy)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _unfused(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer(x)
        return x

    def _run_modules(self, x: Tensor, reason: str) -> Tensor:
        """Without a word: whoever fuses a network, or asks for a backend, means its blocks."""
        return self._unfused(x)


class _Pooling(nn.Module):
    """A network's max pooling; where nobody takes gradients, by a kernel that does not note where the maxima are."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        pool = self.pool
        if pool.return_indices or observed("", pool) or not _takes(x):
            return pool(x)
        numbers = [pair(getattr(pool, name), name) for name in ("kernel_size", "stride", "padding", "dilation")]
        name = backends.resolve(backends.AUTO, x.device, x.dtype)
        return max_pool(x, Pool(*numbers, pool.ceil_mode), run=of(name))


def _takes(x: Tensor) -> bool:
    """Whether there is a kernel for this image: on a CPU."""
    if torch.compiler.is_compiling() or planner.forced() is not None or (torch.is_grad_enabled() and x.requires_grad):
        return False
    plain = type(x) is Tensor and x.is_cpu and x.dim() == 4 and x.numel() > 0 and x.is_floating_point()
    return plain and x.is_contiguous(memory_format=torch.channels_last)


class _Made:
    """A network's stem, what it was made of, and what stands in for which of the network's children."""

    def __init__(self, network: nn.Module) -> None:
        kind = type(network)
        self.found = {name: network._modules.get(name) for name in kind._names}
        self.level = network._fused_res_level
        anatomy, _ = _anatomy(self.found, kind._names[:3])
        self.stem = None if anatomy is None else Stem(anatomy, {name: self.found[name] for name in kind._names[:3]})
        if self.stem is None:
            return
        vars(self.stem)["_fused_res_level"] = self.level
        first, *others = kind._names[:3]
        self.stands_in = {first: self.stem, **{name: nn.Identity() for name in others}}
        for name in kind._names[3:]:
            if type(self.found[name]) is nn.MaxPool2d:
                self.stands_in[name] = _Pooling(self.found[name])

    def holds(self, network: nn.Module) -> bool:
        modules = network._modules
        same = all(modules.get(name) is found for name, found in self.found.items())
        return same and self.level == network._fused_res_level


_made: "WeakKeyDictionary[nn.Module, _Made]" = WeakKeyDictionary()


class Stemmed:
    """What the class of a network with a stem puts before its original one."""

    _original: type[nn.Module]
    _forward: Callable
    """The original's, as it was when it was looked at."""
    _compared: bool
    """Whether it was, in this process."""
    _names: tuple[str, ...]
    """Those of the children that the stem stands for, the pooling last, if there is one."""
    _fused_res_level: str | None = None

    def _dispatch(self, *args: object, **kwargs: object) -> object:
        original = self._original
        if torch.compiler.is_compiling() or original.forward is not type(self)._forward or is_observed():
            return original.forward(self, *args, **kwargs)
        return original.forward(self._view(), *args, **kwargs)

    def _view(self) -> nn.Module:
        made = _of(self)
        if made.stem is None:
            return self
        view = object.__new__(self._original)
        vars(view).update(vars(self))
        vars(view)["_modules"] = {**self._modules, **made.stands_in}
        return view

    def __reduce_ex__(self, protocol: int) -> tuple:
        found = super().__reduce_ex__(max(protocol, 2))
        if found[0] is not copyreg.__newobj__:  # the original has a way of its own
            return found
        return (_rebuild, (self._original, self._names), *found[2:])

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        kind = type(self)
        if not kind._compared:
            kind._compared = _names(as_class(self, kind._original), kind._names) == kind._names
            if not kind._compared:
                self.__class__ = kind._original


def _of(network: Stemmed) -> _Made:
    made = _made.get(network)
    if made is None or not made.holds(network):
        made = _made[network] = _Made(network)
    return made


def stem_of(network: Stemmed) -> Stem | None:
    """The stem that the network's children stand for now; None where they are none that is known."""
    stem = _of(network).stem
    if stem is not None:
        stem.training = network.training  # for who asks; a call goes by its BNs' own
    return stem


@functools.cache
def _stemmed_class(original: type[nn.Module], called: Callable, names: tuple[str, ...]) -> type[nn.Module]:
    return derive(Stemmed, original, called, {"_names": names})


def _rebuild(original: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty network of a fused class, for pickle and copy to fill."""
    kind = _stemmed_class(original, original.forward, names)
    return kind.__new__(kind)


def find(module: nn.Module) -> type[nn.Module] | None:
    """The class that a network gets whose stem is fused; None where it has none that is known."""
    known = next((_KNOWN[name] for name in map(_full_name, type(module).__mro__) if name in _KNOWN), None)
    if known is None or "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return None
    found = {name: module._modules.get(name) for name in known}
    if any(found[name] is None for name in known[:3]) or _anatomy(found, known[:3])[0] is None:
        return None
    names = _names(module, known)
    if names is None:
        return None
    kind = _stemmed_class(type(module), type(module).forward, names)
    kind._compared = True
    return kind


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _anatomy(found: dict[str, nn.Module | None], names: tuple[str, ...]) -> tuple[Anatomy | None, str | None]:
    """That of these children one after the other, where the last one is a ReLU; or why there is none."""
    if any(found[name] is None for name in names):
        return None, "a layer is missing"
    anatomy, reason = sequence([layer for name in names for layer in layers(name, found[name])])
    return (anatomy, reason) if anatomy is None or anatomy.form == CHAIN else (None, "it does not end in a ReLU")


class _Tracer(fx.Tracer):
    """Goes into no child."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _names(network: nn.Module, known: tuple[str, ...]) -> tuple[str, ...] | None:
    """Of these children those that `forward` calls one after the other, each with nothing but what the one before it returned, which
    goes nowhere else; None where the first three are not all among them. Nothing is computed.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception:  # whatever a forward may do when it is given no tensor
        return None
    calls = {name: [node for node in graph.nodes if node.op == "call_module" and node.target == name] for name in known}
    read = {str(node.target).partition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    taken: list[str] = []
    for name in known:
        if len(calls[name]) != 1 or name in read or len(calls[name][0].args) != 1 or calls[name][0].kwargs:
            break
        node = calls[name][0]
        before = calls[taken[-1]][0] if taken else None
        if before is not None and (node.args[0] is not before or len(before.users) != 1):
            break
        taken.append(name)
    return tuple(taken) if len(taken) >= 3 else None
