"""Classes of fused modules: each derived from the original one, with a mixin of ours in front."""

import types
from collections.abc import Callable

from torch import nn


def _forward(self, *args, **kwargs):
    return self._fused_res_dispatch(*args, **kwargs)


def derive(mixin: type, original: type[nn.Module], called: Callable, attributes: dict[str, object]) -> type[nn.Module]:
    """A class of modules that call the mixin's `_fused_res_dispatch` where the original's have their `forward`, `called` now."""
    # TorchScript compiles the source of what is wrapped, and looks up its names among the function's globals.
    forward = types.FunctionType(_forward.__code__, called.__globals__, "forward")
    forward.__wrapped__ = called

    def fill(space: dict) -> None:
        space |= {
            "__module__": mixin.__module__,
            "__qualname__": f"Fused{original.__name__}",
            "__doc__": f"{original.__name__}, running as one operator: see fused_res.fuse.",
            "__annotations__": dict(vars(original).get("__annotations__", {})),
            "forward": forward,
            "_fused_res_original": original,
            "_fused_res_forward": staticmethod(called),
            "_fused_res_compared": False,
            **attributes,
        }

    return types.new_class(f"Fused{original.__name__}", (mixin, original), exec_body=fill)


def as_class(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The module under another class, for asking it something; itself it stays what it is, other threads may be calling it."""
    found = object.__new__(kind)
    found.__dict__ = module.__dict__
    return found
