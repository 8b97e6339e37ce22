"""Who runs a convolution: levels, what is planted as a backend's own kernel, and what was decided."""

from dataclasses import replace

import pytest
import torch

from blocks import image, make
from fused_res import backends, explain, plans, use_backend
from fused_res.block.casting import with_dtype
from fused_res.block.dry_run import convolutions
from fused_res.block.levels import LEVELS
from fused_res.primitives.choice import Call, Choice, choose
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.operands import Activation, Gradient
from fused_res.primitives.run import PLAIN, Fixed, of
from fused_res.spec import ConvBN


@pytest.fixture(autouse=True)
def _nothing_decided():
    with plans.afresh():
        yield


@pytest.fixture
def planted(monkeypatch):
    """The backend "planted": the plain formulas, with convolutions of its own that note what they are called with."""
    calls = []

    def note(primitive, unit, operands, config):
        calls.append((Call(primitive, "planted", unit, operands), config))

    class Planted:
        @staticmethod
        def supports(device, dtype):
            return None

        @staticmethod
        def find(primitive, device):
            return getattr(Planted, primitive, None)

        @staticmethod
        def conv_fprop(x, unit, statistics, output, *, config=None):
            note("conv_fprop", unit, (x, statistics, output), config)
            return conv_fprop(x, unit, statistics=statistics, output=output, run=of("reference"))

        @staticmethod
        def conv_dgrad(dy, like, unit, inner, add, *, config=None):
            note("conv_dgrad", unit, (dy, like, inner, add), config)
            return conv_dgrad(dy, like, unit, inner=inner, add=add, run=of("reference"))

        @staticmethod
        def conv_wgrad(dy, x, unit, *, config=None):
            note("conv_wgrad", unit, (dy, x), config)
            # Of a copy: what the formula computes on the way would be ready for dgrad, which is then asked for less.
            return conv_wgrad(replace(dy), x, unit, run=of("reference"))

    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: Planted if name == "planted" else load(name))
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "planted"))
    return calls


def keys(calls):
    return [call.key() for call in calls]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["identity", "projection", "bottleneck", "pooled", "as it is"])
def test_the_dry_run_lists_what_a_run_asks_for(kind, level, training, planted):
    """In the same order, with the same shapes and the same work fused into each; at the first level, nothing."""
    block = make(kind).train(training)
    x = image(block).requires_grad_(training)
    with use_backend("planted", level), torch.set_grad_enabled(training):
        out = block(x)
        if training:
            out.backward(torch.ones_like(out))
    asked = convolutions(x, block.residual_scale, block.parts(), level, "planted", training)
    if level == "bn_act":
        assert not planted
        assert {call.backend for _, call in asked} == {backends.LIBRARY}
    else:
        assert keys(call for _, call in asked if any(call.fused)) == keys(call for call, _ in planted)
        units = block.parts().units()
        assert [units[i].weight is call.unit.weight for i, call in asked] == [True] * len(asked)
    assert len(asked) >= len(block.parts().main) - 1


def test_a_gradient_that_wgrad_has_computed_is_what_dgrad_takes(planted):
    weight, image_ = torch.randn(8, 4, 1, 1), torch.randn(2, 8, 3, 3)
    vectors, coefficients = torch.rand(5, 8), torch.rand(7, 8)
    dy = Gradient(image_, torch.randn(2, 8, 3, 3), vectors, coefficients, masked=True)
    unit, like = ConvBN(weight), torch.randn(2, 4, 3, 3)
    found = []
    for computed in (False, True):
        if computed:
            dy.values(PLAIN)
        found.append(conv_dgrad(dy, like, unit, run=of("planted")).image)
    assert [call.operands[0].coefficients is None for call, _ in planted] == [False, True]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["projection", "bottleneck"])
def test_levels_differ_in_what_is_fused_into_convolutions(kind):
    block = make(kind)
    found = {}
    for level in LEVELS:
        asked = convolutions(image(block), block.residual_scale, block.parts(), level, "native", True)
        found[level] = {word for _, call in asked for word in call.fused}
    assert found["bn_act"] == {"", False}
    assert found["epilogue"] >= {"", True, "bn relu"}
    assert found["prologue"] >= {"", True, "bn relu", "signs bn", "relu bn"}


def call(backend="planted", groups=1):
    unit = ConvBN(torch.randn(4, 4 // groups, 1, 1), groups=groups)
    return Call("conv_fprop", backend, unit, (Activation(torch.randn(2, 4, 3, 3)), True, None))


def test_reasons(planted, monkeypatch):
    assert choose(call()) == Choice(True)
    assert choose(call(groups=2)) == Choice(False, why="grouped")
    assert choose(call()._replace(operands=(*call().operands[:1], False, None))) == Choice(False, why="nothing fused")
    assert choose(call(backends.LIBRARY)) == Choice(False)
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "library")
    assert choose(call()) == Choice(False, why="FUSED_RES_CONVOLUTIONS=library")
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "auto")
    assert choose(call()) == Choice(True)


def test_what_is_fixed_or_decided_is_what_runs(planted):
    asked = call()
    x, unit = asked.operands[0], asked.unit

    def ran(run=None):
        planted.clear()
        conv_fprop(x, unit, statistics=True, run=run or of("planted"))
        return [config for _, config in planted]

    assert ran() == [None]
    assert ran(Fixed("planted", Choice(False))) == []
    assert ran(Fixed("planted", Choice(True, (1, 2)))) == [(1, 2)]
    assert Fixed("planted", Choice(True)).convolution("conv_fprop", *call(groups=2)[2:3], *asked.operands) is None
    plans.remember_by(lambda key: Choice(True, (3, 4)) if key == asked.key() else None)
    assert ran() == [(3, 4)]
    plans.remember_by(lambda key: Choice(False))
    assert ran() == [(3, 4)]


def test_while_blocks_are_tuned_what_was_not_measured_is_the_librarys(planted, monkeypatch):
    monkeypatch.setenv("FUSED_RES_TUNE", "1")
    assert choose(call()) == Choice(True)
    plans.remember_by(lambda key: None)
    assert choose(call()) == Choice(False, why="not measured")
    with plans.afresh():
        plans.remember_by(lambda key: None)
        monkeypatch.setenv("FUSED_RES_TUNE", "0")
        assert choose(call()) == Choice(True)


def test_a_plain_convolution_is_our_own_only_if_that_was_measured(planted):
    asked = call()._replace(operands=(*call().operands[:1], False, None))
    plans.remember_by(lambda key: Choice(True, (5,)) if key == asked.key() else None)
    conv_fprop(asked.operands[0], asked.unit, run=of("planted"))
    assert [config for _, config in planted] == [(5,)]


def test_keys_tell_apart_what_may_differ_in_speed():
    first = call()
    other = [
        first._replace(primitive="conv_wgrad"),
        first._replace(backend="native"),
        first._replace(unit=first.unit._replace(stride=(2, 2))),
        first._replace(unit=first.unit._replace(weight=first.unit.weight.double())),
        first._replace(operands=(Activation(torch.randn(3, 4, 3, 3)), True, None)),
        first._replace(operands=(Activation(torch.randn(2, 4, 3, 3), torch.zeros(5, 4)), True, None)),
        first._replace(operands=(*first.operands[:1], False, None)),
    ]
    assert len({first.key(), *(c.key() for c in other)}) == 1 + len(other)
    assert call().key() == first.key()


def test_explain_says_who_runs_each_convolution(planted, monkeypatch):
    block = make("bottleneck")
    x = image(block)
    with use_backend("planted", "prologue"):
        row = explain(block, x).rows[0]
        assert row.who_convolves() == "own"
        assert [c.unit for c in row.convolutions[:3]] == ["conv1", "conv2", "conv3"]
        assert {c.primitive for c in row.convolutions} == {"conv_fprop", "conv_dgrad", "conv_wgrad"}
        with use_backend("planted", "moment"):
            assert explain(block, x).rows[0].who_convolves() == "own/own/moment"
        plans.remember_by(lambda key: Choice(key[0] != "conv_wgrad", why="measured"))
        assert explain(block, x).rows[0].who_convolves() == "own 2 of 3 (measured)"
        monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "library")
        assert explain(block, x).rows[0].who_convolves() == "library (FUSED_RES_CONVOLUTIONS=library)"
    with use_backend("planted", "bn_act"):
        assert explain(block.eval(), x).rows[0].who_convolves() == "library"
        assert {c.primitive for c in explain(block, x).rows[0].convolutions} == {"conv_fprop"}


def test_explain_tells_grouped_convolutions_apart(planted):
    from fused_res import Bottleneck

    block = Bottleneck(16, 4, groups=4).double()
    with use_backend("planted", "prologue"):
        explanation = explain(block, image(block))
    assert explanation.rows[0].who_convolves() == "own/library (grouped)/own"
    assert "own/library (grouped)/own" in str(explanation)
    found = explanation.to_dicts()[0]["convolutions"]
    assert {c["why"] for c in found if c["unit"] == "conv2"} == {"grouped"}
    assert {c["why"] for c in found if c["unit"] != "conv2"} == {""}


def test_autocast_asks_for_convolutions_in_its_dtype(planted):
    block = make("identity", torch.float32)
    parts = with_dtype(block.parts(), torch.bfloat16)
    asked = convolutions(image(block, dtype=torch.bfloat16), None, parts, "moment", "planted", True)
    assert {call.key()[3] for _, call in asked} == {torch.bfloat16}
