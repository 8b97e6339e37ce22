"""Blocks whose convolutions are shared between the library and Triton's kernels, as sizes say."""

import pytest
import torch
from formulas import assert_as_accurate_as_the_formulas

from blocks import image, make
from fused_res import check, explain, plans, use_backend
from fused_res.backends import triton
from fused_res.primitives.choice import Call, Choice, choose
from fused_res.primitives.operands import Activation
from fused_res.spec import ConvBN

pytest.importorskip("triton")
PAYS = triton.pays  # conftest.py replaces it in every test by one that says yes


@pytest.fixture(autouse=True)
def _as_sizes_say(monkeypatch):
    monkeypatch.setattr(triton, "pays", PAYS)
    with plans.afresh():
        yield


def fused_call(taps):
    unit = ConvBN(torch.randn(16, 16, taps, taps), padding=(taps // 2, taps // 2))
    return Call("conv_fprop", "triton", unit, (Activation(torch.randn(2, 16, 3, 3)), True, None))


@pytest.mark.parametrize(
    ("asked", "own"), [("auto", {1: True, 3: False}), ("own", {1: True, 3: True}), ("library", {1: False, 3: False})]
)
def test_pointwise_convolutions_are_own_and_others_the_librarys_unless_asked_otherwise(asked, own, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", asked)
    assert {taps: choose(fused_call(taps)).own for taps in (1, 3)} == own


def test_the_reason_is_given_and_nothing_fused_stays_the_librarys(monkeypatch):
    assert choose(fused_call(3)) == Choice(False, why="faster at this size")
    plain = fused_call(1)
    plain = plain._replace(operands=(*plain.operands[:1], False, None))
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "own")
    assert choose(plain) == Choice(False, why="nothing fused")


@pytest.mark.parametrize(
    ("level", "asked", "who"),
    [
        ("prologue", "auto", "own/library (faster at this size)/own"),
        ("moment", "auto", "own/library (faster at this size)/moment"),
        ("moment", "own", "own/own/moment"),
        ("prologue", "library", "library (FUSED_RES_CONVOLUTIONS=library)"),
    ],
)
def test_explain_says_who_runs_which(level, asked, who, monkeypatch, device):
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", asked)
    block = make("bottleneck", torch.float32).to(device)
    with use_backend("triton", level):
        assert explain(block, image(block, dtype=torch.float32).to(device)).rows[0].who_convolves() == who


@pytest.mark.usefixtures("proven_interpreter")
@pytest.mark.parametrize("level", ["prologue", "moment"])
def test_a_shared_block_is_as_accurate_as_the_formulas(level, device):
    """The 3x3 is the library's: what is fused into the others runs around it as kernels of its own."""
    (shape,) = [shape for shape in check.SHAPES if str(shape) == "Bottleneck projection"]
    block, x, _ = check.problem(shape, "train", torch.device(device), 0)
    with use_backend("triton", level):
        assert "library (faster at this size)" in explain(block.float(), x.float()).rows[0].who_convolves()
    assert_as_accurate_as_the_formulas(
        lambda seed: check.problem(shape, "train", torch.device(device), seed), torch.bfloat16, "triton", level
    )
