"""Whether a block's `forward` computes what its anatomy says: it is traced by torch.fx, and the graph is read from its end."""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_res.anatomy import Anatomy
from fused_res.eligibility import shortcut_of
from fused_res.reading import child
from fused_res.spec import FORMS

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_SUMS = (operator.add, torch.add, "add")
_SUMS_IN_PLACE = (operator.iadd, "add_")
_PRODUCTS = (operator.mul, torch.mul, "mul")


class Trace(NamedTuple):
    """reason: why `forward` is not what the anatomy says, or None. promotes: whether the sum may be of another dtype than the main
    branch, as `main + shortcut` is, and `main += shortcut` is not."""

    reason: str | None
    promotes: bool


class _Proxy(fx.Proxy):
    """torch.fx takes `a += b` for `a = a + b`; here it matters."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Goes into modules that the anatomy does not name, unless they are torch's own."""

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        self._leaves = set(anatomy.names())

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name in self._leaves or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _OtherwiseError(Exception):
    pass


class _Reader:
    """Reads a graph against an anatomy. Each method takes a node and returns the one before what it has recognised."""

    def __init__(self, block: nn.Module, anatomy: Anatomy, graph: fx.Graph) -> None:
        self.anatomy = anatomy
        self.has_shortcut = anatomy.shortcut is not None and shortcut_of(child(block, anatomy.shortcut)).kind != "identity"
        self.is_scaled = anatomy.residual_scale is not None and getattr(block, anatomy.residual_scale) is not None
        nodes = list(graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise _OtherwiseError(f"takes {len(inputs)} tensors")
        self.x, self.end = inputs[0], nodes[-1].args[0]
        self.seen = {self.x, nodes[-1]}
        self.nodes = nodes
        self.form = FORMS[anatomy.form]

    def _next(self, node: object, what: str) -> fx.Node:
        if not isinstance(node, fx.Node):
            raise _OtherwiseError(f"returns no tensor where {what} was expected")
        self.seen.add(node)
        return node

    def _fail(self, node: fx.Node, what: str):
        raise _OtherwiseError(f"has {node.target if node.op != 'placeholder' else 'its input'} where {what} was expected")

    def module(self, node: object, name: str) -> fx.Node:
        node = self._next(node, name)
        if node.op != "call_module" or node.target != name or len(node.args) != 1 or node.kwargs:
            self._fail(node, name)
        return node.args[0]

    def idle(self, node: object) -> object:
        while isinstance(node, fx.Node) and node.op == "call_module" and node.target in self.anatomy.idle:
            node = self.module(node, node.target)
        return node

    def relu(self, node: object) -> object:
        node = self._next(self.idle(node), "a ReLU")
        if node.op == "call_module" and node.target in self.anatomy.activations:
            return self.idle(self.module(node, node.target))
        if node.op not in ("call_function", "call_method") or node.target not in _RELUS or len(node.args) > 2:
            self._fail(node, "a ReLU")
        return self.idle(node.args[0])

    def scaled(self, node: object) -> object:
        """Past the product with the residual scale."""
        name = self.anatomy.residual_scale
        if not self.is_scaled:
            return self.idle(node)
        node = self._next(self.idle(node), f"a product with {name}")
        factors = list(node.args)
        at = [i for i, f in enumerate(factors) if isinstance(f, fx.Node) and f.op == "get_attr" and f.target == name]
        if node.target not in _PRODUCTS or len(factors) != 2 or len(at) != 1 or node.kwargs:
            self._fail(node, f"a product with {name}")
        self.seen.add(factors[at[0]])
        return self.idle(factors[1 - at[0]])

    def activated(self, node: object) -> object:
        """Past a ReLU, unless the norm in front of it has one of its own."""
        return node if self.anatomy.activated_norms else self.relu(node)

    def main(self, node: object) -> object:
        """The main branch, from its last module to x. Returns what the first convolution reads."""
        first = node
        for i, (conv, bn) in enumerate(reversed(self.anatomy.units)):
            if self.form.preactivated:
                first = self.idle(self.module(self.idle(node), conv))
                node = self.module(self.idle(self.activated(first)), bn)
            else:
                node = self.module(self.idle(self.activated(node) if i > 0 else node), bn)
                first = node = self.idle(self.module(self.idle(node), conv))
        if self.idle(node) is not self.x:
            self._fail(self._next(node, "x"), "the input")
        return first

    def is_shortcut(self, node: object) -> bool:
        if isinstance(node, fx.Node) and node.op == "call_module" and node.target == self.anatomy.shortcut:
            self.seen.add(node)
            return len(node.args) == 1 and not node.kwargs
        return node is self.x and not self.has_shortcut

    def check_shortcut(self, node: object, first: object) -> None:
        """That a shortcut is given what it is to be given: what the first convolution is, `first`."""
        if node is not self.x and self.idle(node.args[0]) is not first:
            self._fail(self._next(node.args[0], "the shortcut's input"), "the shortcut's input")

    def block(self) -> bool:
        """The whole; whether the sum promotes."""
        end = self.relu(self.end) if self.form.relu else self.idle(self.end)
        if self.form.skip:
            return self.sum(end)
        self.main(end)
        self.check_rest()
        return False

    def check_rest(self) -> None:
        rest = [node for node in self.nodes if node not in self.seen]
        if rest:
            raise _OtherwiseError(f"also calls {rest[0].target}")

    def sum(self, end: object) -> bool:
        total = self._next(end, "a sum")
        in_place = total.target in _SUMS_IN_PLACE
        if total.op not in ("call_function", "call_method") or not (in_place or total.target in _SUMS):
            self._fail(total, "a sum")
        if len(total.args) != 2 or total.kwargs:
            self._fail(total, "a sum of two")
        left, right = total.args
        if self.is_shortcut(left):
            if in_place:
                raise _OtherwiseError("adds to its shortcut in place")
            left, right = right, left
        elif not self.is_shortcut(right):
            self._fail(self._next(right, "the shortcut"), "the shortcut")
        self.check_shortcut(right, self.main(self.scaled(left)))
        self.check_rest()
        return not in_place


def trace(block: nn.Module, anatomy: Anatomy) -> Trace:
    """Traces the `forward` of the block's class and compares it with the anatomy. Nothing is computed."""
    try:
        graph = _Tracer(anatomy).trace(block)
    except Exception as error:  # whatever a forward may do when it is given no tensor
        return Trace(f"its forward cannot be traced, to see what it computes: {type(error).__name__}: {error}", True)
    try:
        return Trace(None, _Reader(block, anatomy, graph).block())
    except _OtherwiseError as otherwise:
        return Trace(f"its forward {otherwise}", True)
