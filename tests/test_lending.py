"""Convolutions that one backend lends another: tried beside its own, and run where they were measured to be the fastest."""

import json

import pytest
import torch
from tuning_plants import Planted, own_tiles

from blocks import assert_same, eager, image, make, step
from fused_res import backends, explain, plans
from fused_res.backends import native
from fused_res.primitives.choice import Call, Choice, lent_kernels
from fused_res.primitives.operands import Activation
from fused_res.primitives.run import Fixed, of
from fused_res.spec import ConvBN
from fused_res.tuning import files, tuner
from fused_res.tuning.convolutions import LIBRARY

pytest_plugins = ("tuning_plants",)
pytestmark = pytest.mark.usefixtures("nothing_known")


class Lender(Planted):
    """Lends its forward convolutions, of one tile, and declines weights of more than 64 elements."""

    conv_dgrad = conv_wgrad = None

    def tiles(self, primitive, weight, pixels, operands):
        return []

    def preference(self, device):
        return 1

    def lends(self, device):
        return True

    def declined(self, primitive, unit, pixels):
        return "too large" if unit.weight.numel() > 64 else None


@pytest.fixture
def lender(planted, monkeypatch):
    backend, load = Lender(), backends.load
    monkeypatch.setattr(backends, "load", lambda name: backend if name == "lender" else load(name))
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "lender"))
    return backend


def call(backend="planted", channels=4):
    unit = ConvBN(torch.randn(channels, channels, 1, 1))
    return Call("conv_fprop", backend, unit, (Activation(torch.randn(2, channels, 3, 3)), True, None))


def test_a_backend_lends_where_it_says_so(lender, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backends.lenders("planted", cpu, torch.float32) == ["lender"]
    assert backends.lenders("lender", cpu, torch.float32) == []
    monkeypatch.setattr(lender, "supports", lambda device, dtype: "not here")
    assert backends.lenders("planted", cpu, torch.float32) == []
    assert native.lends(cuda)
    assert not native.lends(cpu)
    assert not hasattr(backends.load("triton"), "lends")


def test_what_is_lent_is_what_both_have(lender):
    assert list(lent_kernels(call())) == ["lender"]
    assert lent_kernels(call(channels=16)) == {}
    assert lent_kernels(call(backends.LIBRARY)) == {}
    assert lent_kernels(call()._replace(primitive="conv_dgrad", operands=call().operands[:1])) == {}


def test_a_choice_that_cannot_be_carried_out_is_an_error(lender):
    asked, choice = call(channels=16), Choice(True, lender="lender")
    with pytest.raises(RuntimeError, match="conv_fprop: was to be run by backend 'lender', which has too large"):
        Fixed("planted", choice).convolution("conv_fprop", asked.unit, *asked.operands)


def tuned(planted, lender):
    """A block whose 1x1 convolutions at the ends are small enough to be lent, after a step."""
    block = make("bottleneck", torch.float32)
    peer, x = eager(block), image(block, dtype=torch.float32)
    assert_same(step(block, x), step(peer, x), rtol=1e-3, atol=1e-4)
    planted.calls, lender.calls = [], []
    return block, x


def test_the_fastest_of_both_runs_is_kept_and_is_explained(planted, lender, timings):
    found = timings(**{"lender": 0.3, "own (32, 4)": 0.5, "epilogue": 0.5})
    block, x = tuned(planted, lender)
    weights = [conv.weight for conv in (block.conv1, block.conv2, block.conv3)]
    small = [weight.numel() <= 64 for weight in weights]
    assert True in small, [w.shape for w in weights]
    assert False in small
    names = [LIBRARY, "own", "own (16, 4)", "own (32, 4)"]
    assert [*names, "lender"] in found.asked
    assert names in found.asked
    row = explain(block, x).rows[0]
    forward = [c for c in row.convolutions if c.primitive == "conv_fprop"]
    assert [c.lender for c in forward] == ["lender" if lent else "" for lent in small]
    assert all((c.own, c.why, c.config) == (True, "measured", None if c.lender else (32, 4)) for c in forward)
    words = ["lender 1 and own 2 of 3 (measured)" if lent else "own (measured)" for lent in small]
    assert row.who_convolves() == "/".join(words)
    assert {c["lender"] for c in explain(block, x).to_dicts()[0]["convolutions"]} == {"", "lender"}
    tuner._known.clear()
    with plans.afresh():
        again = timings()
        step(block, x)
        assert not again.asked
        assert own_tiles(lender) == {None}
        assert own_tiles(planted) == {(32, 4)}


@pytest.mark.parametrize("spoil", ["wrong", "deaf", "crash"])
def test_a_lent_kernel_that_is_wrong_never_runs(spoil, planted, lender, timings):
    lender.spoil = {None: spoil}
    timings(**{"lender": 0.1, "own (32, 4)": 0.5, "epilogue": 0.5})
    block, x = tuned(planted, lender)
    step(block, x)
    assert own_tiles(lender) == "-"
    assert "lender" not in {c.lender for c in explain(block, x).rows[0].convolutions}
    rejected = [json.loads(path.read_text())["rejected"] for path in files.root().rglob("*.json")]
    assert any("lender" in names for names in rejected)


def test_files_without_a_lender_are_read_and_those_with_an_unknown_one_are_not(planted, lender, timings):
    timings(lender=0.5)
    asked = call()
    kept, text = tuner._files(torch.device("cpu")), tuner._text(asked.key())
    for value, expected in (
        ({"own": True, "config": [16, 4]}, Choice(True, (16, 4), "measured")),
        ({"own": True, "config": None, "lender": "lender"}, Choice(True, None, "measured", "lender")),
        ({"own": True, "config": None, "lender": "nobody"}, None),
        ({"own": True, "config": None, "lender": "planted"}, None),
    ):
        kept.save(text, value)
        tuner._known.clear()
        files._warned.clear()
        if expected is None:
            with pytest.warns(UserWarning, match="lends no kernels here"):
                assert tuner.recall(asked.key()) is None
        else:
            assert tuner.recall(asked.key()) == expected
    kept.save(text, {"own": True, "config": None, "lender": "lender"})
    tuner._known.clear()
    with plans.afresh():
        plans.remember_by(tuner.recall)
        assert of("planted").convolution("conv_fprop", asked.unit, *asked.operands) == lender.conv_fprop
