"""A network in evaluation: the layers in front of its blocks, convolution, BN, ReLU and max pooling, and the blocks, as one call.

They are children of the network itself, whose `forward` calls them one after the other. A network that `fuse` has fused calls its
original `forward` on a view of itself: all that it has, but for these children. The first of them stands for all there, and the
others do nothing. In training, on a GPU, under torch.compile and whatever else looks on they are called as they are.
"""

import copyreg
import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from fused_res import backends, planner
from fused_res.anatomy import Anatomy, containers
from fused_res.block import program
from fused_res.chains import layers, sequence
from fused_res.derived import as_class, derive
from fused_res.eligibility import is_observed, observed
from fused_res.fusible import Fusible, labels
from fused_res.internals import below_autograd
from fused_res.primitives.max_pool import Pool, max_pool
from fused_res.primitives.run import Run, of
from fused_res.serial import Programmed, Serial
from fused_res.spec import CHAIN, pair

_CALLED, _MADE = "_fused_res_called", "_fused_res_made"
"""Where a network has what its `forward` was seen to do, and what was made of that."""


class _Known(NamedTuple):
    """layers: the children that are called one after the other: a convolution, or several with BNs and ReLUs in between, a BN, a
    ReLU, and the pooling. methods: those that call them. flags: the attributes by which these may go.
    """

    layers: tuple[str, ...]
    methods: tuple[str, ...]
    flags: tuple[str, ...] = ()


_RESNET = ("conv1", "bn1", "relu", "maxpool")
_KNOWN = {
    "torchvision.models.resnet.ResNet": _Known(_RESNET, ("forward", "_forward_impl")),
    "torchvision.models._utils.IntermediateLayerGetter": _Known(_RESNET, ("forward",), ("return_layers",)),
    "timm.models.resnet.ResNet": _Known(
        ("conv1", "bn1", "act1", "maxpool"), ("forward", "forward_features", "forward_head"), ("grad_checkpointing",)
    ),
}
PROTOCOL = "fused_res_stem"
"""The attribute by which a class of networks names such layers."""
_LAYERS = 3
"""How many of these the stem is."""

STEM = "stem"
"""What it is called in reports, behind the name of its network."""


class Stem(Fusible, nn.Module):
    """`relu(bn(conv(x)))`, or more of these one after the other, over children of a network in evaluation mode."""

    def __init__(self, anatomy: Anatomy, children: dict[str, nn.Module], level: str | None) -> None:
        super().__init__()
        self._modules.update(children)
        self._anatomy, self._labels, self._containers = anatomy, labels(anatomy), containers(anatomy)
        self._fused_res_level, self.training = level, False

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _unfused(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            x = layer(x)
        return x

    def _run_modules(self, x: Tensor, reason: str) -> Tensor:
        """Without a word: whoever fuses a network, or asks for a backend, means its blocks."""
        return self._unfused(x)


class _Pooling(Programmed):
    """A network's max pooling; where nobody takes gradients, by a kernel that does not note where the maxima are."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool, self._programs = pool, {}

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x, self._numbers(), run=self._backend(x)) if self._takes(x) else self.pool(x)

    def program(self, x: Tensor) -> tuple[Callable, tuple[Tensor, ...]] | None:
        if not self._takes(x):
            return None
        numbers, run = self._numbers(), self._backend(x)
        key = numbers, x.shape, x.dtype, run.backend, program.switches(x.device.type)
        with below_autograd():
            program.run(self._programs, key, lambda image: max_pool(image, numbers, run=run), (x,), run.backend)
        recorded = program.recorded(self._programs, key)
        return None if recorded is None else (recorded, ())

    def _numbers(self) -> Pool:
        pairs = [pair(getattr(self.pool, name), name) for name in ("kernel_size", "stride", "padding", "dilation")]
        return Pool(*pairs, self.pool.ceil_mode)

    def _backend(self, x: Tensor) -> Run:
        return of(backends.resolve(backends.AUTO, x.device, x.dtype))

    def _takes(self, x: Tensor) -> bool:
        """Whether there is a kernel for this image: on a CPU."""
        wanted = torch.is_grad_enabled() and x.requires_grad
        if wanted or planner.forced() is not None or self.pool.return_indices or observed("", self.pool) is not None:
            return False
        plain = type(x) is Tensor and x.is_cpu and x.dim() == 4 and x.numel() > 0 and x.is_floating_point()
        return plain and x.is_contiguous(memory_format=torch.channels_last)


class Called(NamedTuple):
    """What a network's `forward` was seen to do: which of its children it calls one after the other.

    names: those of the stem, and the pooling, if it is among them. after: those that follow. flags: the values of the attributes by
    which it may go.
    """

    names: tuple[str, ...]
    after: tuple[str, ...]
    flags: tuple[object, ...]


def _flags(network: nn.Module) -> tuple[object, ...]:
    found = [getattr(network, name, None) for name in _known(network).flags]
    return tuple([tuple(value.items()) if isinstance(value, dict) else value for value in found])


class _Made:
    """A network's stem, what it was made of, and what stands in for which of the network's children."""

    def __init__(self, network: nn.Module) -> None:
        called = vars(network)[_CALLED]
        layers, modules = called.names[:_LAYERS], network._modules
        self.called, self.level = called, network._fused_res_level
        self.found = {name: modules.get(name) for name in (*called.names, *called.after)}
        anatomy = _anatomy(self.found, layers)
        self.stem = None if anatomy is None else Stem(anatomy, {name: self.found[name] for name in layers}, self.level)
        self.stands_in: dict[str, nn.Module] = {}
        if self.stem is None:
            return
        pooling = next((name for name in called.names[_LAYERS:] if type(self.found[name]) is nn.MaxPool2d), None)
        parts, names = [self.stem], list(layers)
        if pooling is not None:
            blocks = list(itertools.takewhile(lambda name: _are_blocks(self.found[name]), called.after))
            parts += [_Pooling(self.found[pooling]), *(self.found[name] for name in blocks)]
            names += [pooling, *blocks]
        children = [self.found[name] for name in names]
        self.serial = Serial(parts, functools.partial(_modules, weakref.ref(network), self.stem, children))
        self.stands_in = {names[0]: self.serial, **{name: nn.Sequential() for name in names[1:]}}

    def holds(self, network: nn.Module) -> bool:
        modules = network._modules
        if self.level != network._fused_res_level or vars(network).get(_CALLED) is not self.called:
            return False
        return all(modules.get(name) is found for name, found in self.found.items())


def _modules(network: "weakref.ref[nn.Module]", stem: Stem, children: Sequence[nn.Module]) -> list[nn.Module]:
    """All that a call of these children of a network goes by."""
    return [network(), stem, *(module for child in children for module in child.modules())]


def _are_blocks(module: nn.Module | None) -> bool:
    """Whether it is a plain sequence of fused blocks."""
    return type(module) is nn.Sequential and len(module) > 0 and all(isinstance(block, Fusible) for block in module)


class Network:
    """What the class of a network that is fused puts before its original one."""

    _fused_res_original: type[nn.Module]
    _fused_res_forward: Callable
    """The original's, as it was when it was looked at."""
    _fused_res_compared: bool
    """Whether it was, in this process."""
    _fused_res_level: str | None = None

    def _fused_res_dispatch(self, *args: object, **kwargs: object) -> object:
        original = self._fused_res_original
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or is_observed():
            return original.forward(self, *args, **kwargs)
        return original.forward(_view(self), *args)

    def __reduce_ex__(self, protocol: int) -> tuple:
        found = super().__reduce_ex__(max(protocol, 2))
        if found[0] is not copyreg.__newobj__:  # the original has a way of its own
            return found
        state = {name: value for name, value in found[2].items() if name != _MADE} if isinstance(found[2], dict) else found[2]
        return (_rebuild, (self._fused_res_original,), state, *found[3:])

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        kind = type(self)
        if not kind._fused_res_compared:
            kind._fused_res_compared = _called(plain(self)) == vars(self).get(_CALLED)
            if not kind._fused_res_compared:
                forget(self)


def _view(network: Network) -> nn.Module:
    """The network with what stands in for its children, where anything does."""
    made = vars(network).get(_MADE)
    if torch.is_grad_enabled() or network.training or not _is_on_cpu(network):
        if made is not None and made.stands_in:
            made.serial.forget()
        return network
    made = _of(network)
    if made is None or not made.stands_in:
        return network
    view = object.__new__(network._fused_res_original)
    vars(view).update(vars(network))
    vars(view)["_modules"] = {**network._modules, **made.stands_in}
    return view


def _is_on_cpu(network: Network) -> bool:
    """Whether its weights can be prepared for evaluation."""
    called = vars(network).get(_CALLED)
    first = None if called is None else network._modules.get(called.names[0])
    weight = None if first is None else next(first.parameters(), None)
    return weight is not None and weight.is_cpu


def _of(network: Network) -> _Made | None:
    """None where `forward` may not be what it was any more."""
    called, kind = vars(network).get(_CALLED), network._fused_res_original
    if called is None or called.flags != _flags(network) or not _is_librarys(kind):
        return None
    made = vars(network).get(_MADE)
    if made is None or not made.holds(network):
        made = vars(network)[_MADE] = _Made(network)
    return made


def stem_of(network: Network) -> Stem | None:
    """The stem that the network's children stand for in evaluation; None where they are none that is known."""
    made = _of(network)
    return None if made is None else made.stem


@functools.cache
def _network_class(original: type[nn.Module], called: Callable) -> type[nn.Module]:
    return derive(Network, original, called, {})


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """An empty network of a fused class, for pickle and copy to fill."""
    kind = _network_class(original, original.forward)
    return kind.__new__(kind)


def find(module: nn.Module) -> tuple[type[nn.Module], Called] | None:
    """The class that a network gets when it is fused, and what it is to `remember`; None where it is none that is known."""
    if isinstance(module, torch.jit.ScriptModule) or _known(module) is None or not _is_librarys(type(module)):
        return None
    if any(name in vars(module) for name in _known(module).methods):
        return None
    called = _called(module)
    if called is None or _anatomy(module._modules, called.names[:_LAYERS]) is None:
        return None
    kind = _network_class(type(module), type(module).forward)
    kind._fused_res_compared = True
    return kind, called


def plain(module: nn.Module) -> nn.Module:
    """A module as it was before it was fused, for `find`."""
    return as_class(module, type(module)._fused_res_original) if isinstance(module, Network) else module


def remember(network: nn.Module, kind: type[nn.Module], called: Called) -> None:
    """Give a network the class that was found for it."""
    network.__class__ = kind
    vars(network)[_CALLED] = called


def forget(network: Network) -> None:
    """Give a network its original class again."""
    for name in (_CALLED, _MADE):
        vars(network).pop(name, None)
    network.__class__ = type(network)._fused_res_original


@functools.cache
def _class_of(kind: type) -> tuple[type, _Known] | None:
    """The class of `_KNOWN`, or that says so itself, that this one is or comes from, and what is known of it."""
    for base in kind.__mro__:
        said = vars(base).get(PROTOCOL)
        known = _KNOWN.get(f"{base.__module__}.{base.__qualname__}") if said is None else _Known(tuple(said), ("forward",))
        if known is not None:
            return base, known
    return None


def _known(network: nn.Module) -> _Known | None:
    found = _class_of(type(network))
    return None if found is None else found[1]


@functools.cache
def _own_methods(base: type) -> tuple[object, ...]:
    """Those of a class that is known, as they were when they were first asked for; None where one is not its library's own."""
    methods = [vars(base).get(name) for name in _class_of(base)[1].methods]
    return tuple([method if _is_written_in(method, base.__module__) else None for method in methods])


def _is_librarys(kind: type) -> bool:
    """Whether the methods that call a network's children are those that its library has."""
    base, known = _class_of(kind)
    pairs = zip(known.methods, _own_methods(base), strict=True)
    return all(method is not None and getattr(kind, name, None) is method for name, method in pairs)


def _is_written_in(method: object, module: str) -> bool:
    return getattr(method, "__globals__", {}).get("__name__") == module


def _anatomy(found: dict[str, nn.Module | None], names: tuple[str, ...]) -> Anatomy | None:
    """That of these children one after the other, the last of them a ReLU."""
    if any(found.get(name) is None for name in names):
        return None
    anatomy, _ = sequence([layer for name in names for layer in layers(name, found[name])])
    return anatomy if anatomy is not None and anatomy.form == CHAIN else None


class _Tracer(fx.Tracer):
    """Goes into no child."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _called(network: nn.Module) -> Called | None:
    """What is common to `forward` in training and in evaluation; None where it does not call the stem's layers one after the other.

    Nothing is computed.
    """
    found = []
    for training in (True, False):
        view = object.__new__(type(network))
        vars(view).update(vars(network), training=training)
        try:
            graph = _Tracer().trace(view)
        except Exception:  # whatever a forward may do when it is given no tensor
            return None
        found.append(_in_order(graph, _known(network).layers))
    chain = [a for a, b in itertools.takewhile(lambda two: two[0] == two[1], zip(*found, strict=False))]
    count = len([name for name in chain if name in _known(network).layers])
    return None if count < _LAYERS else Called(tuple(chain[:count]), tuple(chain[count:]), _flags(network))


def _in_order(graph: fx.Graph, known: tuple[str, ...]) -> list[str]:
    """The children that are called one after the other, these first. Each gets nothing but what the one before it returned, and
    that goes nowhere else; none is called twice, and nothing else of it is read.
    """
    calls = [node for node in graph.nodes if node.op == "call_module"]
    often = Counter(str(node.target) for node in calls)
    read = {str(node.target).partition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    taken: list[str] = []
    node = next((node for node in calls if node.target == known[0]), None)
    while node is not None and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        name = str(node.target)
        expected = known[len(taken)] if len(taken) < len(known) else name
        if name != expected or often[name] > 1 or name in read or "." in name:
            break
        taken.append(name)
        node = next(iter(node.users)) if len(node.users) == 1 else None
    return taken
