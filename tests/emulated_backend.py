"""A backend of the compiled CUDA kernels as they run on the CPU: `native` on a GPU, with operators of tests/cuda_operators.py."""

import importlib.util
from types import SimpleNamespace

import torch

from fused_res import backends
from fused_res.backends import native

NAME = "emulated"


class _Torch:
    """torch, but for its operators of fused_res."""

    def __init__(self, operators):
        self.ops = SimpleNamespace(fused_res=operators)

    def __getattr__(self, name):
        return getattr(torch, name)


def _calls(operators):
    """The calls of `native`, made of these operators."""
    spec = importlib.util.find_spec("fused_res.backends._native_calls")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch, module._on_gpu = _Torch(operators), lambda tensor: True
    return module


def install(monkeypatch, operators, primitives=native.CUDA_CALLS):
    """Make it a backend for as long as the fixture lasts, of these of native's primitives on a GPU. Returns its name."""
    calls = _calls(operators)

    def find(primitive, device):
        if primitive not in primitives:
            return None
        return getattr(operators if primitive in native.PRIMITIVES else calls, primitive)

    module = SimpleNamespace(
        supports=lambda device, dtype: None,
        preference=lambda device: 0,
        level=lambda device, dtype, geometry: "moment",
        declined=lambda primitive, unit, pixels: native.declined_on_gpu(primitive, unit),
        formula=lambda primitive, device, dtype: native.formula_on_gpu(primitive, dtype),
        lends=lambda device: True,
        find=find,
    )
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: module if name == NAME else load(name))
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, NAME))
    return NAME
