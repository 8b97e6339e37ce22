"""Torch's classes and functions replaced for the whole process: the replacement takes part, and `explain` names it."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_res
from blocks import Eager, assert_same, image, make, step
from fused_res import originals, use_backend


def _halved(function):
    def replacement(*args, **kwargs):
        return function(*args, **kwargs) * 0.5

    return replacement


def _as_it_was(function):
    def replacement(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return replacement


class _Halved:
    """A functional interface whose convolution is another."""

    conv2d = staticmethod(_halved(F.conv2d))

    def __getattr__(self, name):
        return getattr(F, name)


def _another_interface():
    """A module that is no part of torch."""
    interface = types.ModuleType("another")
    interface.__dict__.update(vars(F), avg_pool2d=_halved(F.avg_pool2d))
    return interface


PATCHES = {
    "torch.nn.Conv2d.forward": (nn.Conv2d, "forward", _halved),
    "torch.nn.Conv2d._conv_forward": (nn.Conv2d, "_conv_forward", _halved),
    "torch.nn.BatchNorm2d.forward": (nn.BatchNorm2d, "forward", _halved),
    "torch.nn._BatchNorm.forward": (nn.modules.batchnorm._BatchNorm, "forward", _halved),
    "torch.nn.BatchNorm2d._check_input_dim": (nn.BatchNorm2d, "_check_input_dim", _as_it_was),
    "torch.nn.ReLU.forward": (nn.ReLU, "forward", _halved),
    "torch.nn.Sequential.forward": (nn.Sequential, "forward", _halved),
    "torch.nn.AvgPool2d.forward": (nn.AvgPool2d, "forward", _halved),
    "torch.nn.Identity.forward": (nn.Identity, "forward", _halved),
    "torch.nn.Module.__call__": (nn.Module, "__call__", _as_it_was),
    "torch.nn.Module._call_impl": (nn.Module, "_call_impl", _as_it_was),
    "torch.nn.Conv2d.__call__": (nn.Conv2d, "__call__", _halved),
    "torch.nn.functional.conv2d": (F, "conv2d", _halved),
    "torch.nn.functional.batch_norm": (F, "batch_norm", _halved),
    "torch.nn.functional.relu": (F, "relu", _halved),
    "torch.nn.functional.avg_pool2d": (F, "avg_pool2d", _halved),
    "torch.batch_norm": (torch, "batch_norm", _halved),
    "torch.relu_": (torch, "relu_", _halved),
    "torch.relu_, by a built-in": (torch, "relu_", lambda _: torch.sigmoid_),
    "torch.nn.modules.pooling.F": (nn.modules.pooling, "F", lambda _: _another_interface()),
    "torch.nn.modules.conv.F": (nn.modules.conv, "F", lambda _: _Halved()),
    "torch.nn.Conv2d.weight": (nn.Conv2d, "weight", lambda _: property(lambda m: m._parameters["weight"] * 0.5)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_replaced_method_or_function_takes_part_and_is_named(name, monkeypatch):
    owner, attribute, replacement = PATCHES[name]
    block, twin = make("pooled"), make("pooled")
    x = image(block)
    plain = block(x).detach()
    block, untouched = make("pooled"), make("pooled")
    monkeypatch.setattr(owner, attribute, replacement(getattr(owner, attribute, None)), raising=False)
    if attribute == "weight":  # a property leaves the parameters where they are
        torch.testing.assert_close(block(x), Eager(twin)(x), rtol=1e-10, atol=1e-12)
    else:
        assert_same(step(block, x), step(Eager(twin), x))
    row = fused_res.explain(block, x).rows[0]
    assert (row.backend, row.reason) == ("eager", f"{name.split(',')[0]} has been replaced")
    with use_backend("reference"), pytest.raises(RuntimeError, match="has been replaced"):
        block(x)
    monkeypatch.undo()
    assert block.unfused_reason(x) is None
    torch.testing.assert_close(untouched(x), plain)


def test_attributes_that_a_plug_in_adds_are_no_matter(monkeypatch):
    monkeypatch.setattr(nn.Module, "of_a_plug_in", 1, raising=False)
    block = make("identity")
    assert block.unfused_reason(image(block)) is None


def test_a_replaced_class_makes_modules_of_another_type(monkeypatch):
    class Halving(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 0.5

    monkeypatch.setattr(nn, "Conv2d", Halving)
    block, twin = make("identity"), make("identity")
    x = image(block)
    assert block.unfused_reason(x) == "conv1 is a Halving, not nn.Conv2d"
    assert_same(step(block, x), step(Eager(twin), x))


def test_what_was_replaced_before_the_import_is_seen(fresh):
    code = """
import functools, torch, torch.nn.functional as F
conv2d = F.conv2d
F.conv2d = functools.wraps(conv2d)(lambda *a, **k: conv2d(*a, **k))
import fused_res
print(fused_res.BasicBlock(2, 2).unfused_reason(torch.ones(1, 2, 3, 3)))
"""
    found = fresh.run(code)
    assert found.stdout.strip() == "torch.nn.functional.conv2d has been replaced", found.stderr


def test_nothing_is_replaced_here():
    assert originals.replaced() is None
