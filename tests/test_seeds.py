"""The rule of accuracy with few seeds: right blocks pass, gross errors fail; with all of them small errors do."""

import pytest
import torch

from fused_res import accuracy, check, cli
from fused_res.tolerance import MARGIN, scatter

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPES = {str(shape): shape for shape in check.SHAPES}
SHAPE = SHAPES["Bottleneck identity"]


def judge(seeds, shape=SHAPE, level="bn_act", dtype=torch.bfloat16):
    make = lambda seed: check.problem(shape, "train", CPU, seed)  # noqa: E731
    return {v.quantity: v for v in accuracy.judge(make, dtype, "reference", level, seeds)}


def failing(verdicts):
    return {name for name, verdict in verdicts.items() if not verdict.passed}


@pytest.fixture
def plant(monkeypatch):
    """Adds noise of a relative size to one tensor of every fused step."""
    plain = accuracy.step

    def plant(name, size):
        def step(block, x, dout, dtype, backend, *rest, **options):
            found = plain(block, x, dout, dtype, backend, *rest, **options)
            if backend != "eager":
                tensor = found.tensors[name]
                noise = torch.randn(
                    tensor.shape, generator=torch.Generator().manual_seed(int(1e6 * x.abs().sum())), dtype=torch.float64
                )
                noise *= size * tensor.double().norm() / noise.norm()
                found.tensors[name] = (tensor.double() + noise).to(tensor)
            return found

        monkeypatch.setattr(accuracy, "step", step)

    return plant


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_right_blocks_pass_with_any_one_seed(shape, seed):
    for dtype in (torch.bfloat16, torch.float32):
        assert not failing(judge([seed], shape, dtype=dtype))


@pytest.mark.parametrize("quantity", ["dbn2.weight", "dconv1.weight", "dx"])
def test_an_error_of_three_times_eagers_fails_with_all_seeds(quantity, plant):
    eager = judge(range(accuracy.SEEDS))[quantity].eager
    plant(quantity, 3 * eager)
    assert failing(judge(range(accuracy.SEEDS))) == {quantity}


@pytest.mark.parametrize("quantity", ["out", "dbn2.weight", "dconv1.weight", "running"])
def test_a_gross_error_fails_with_one_seed(quantity, plant):
    quantity = {"running": "bn1.running_var"}.get(quantity, quantity)
    verdict = judge([0])[quantity]
    plant(quantity, 4 * verdict.limit)
    assert failing(judge([0])) == {quantity}


def test_the_room_for_chance_shrinks_with_what_is_compared():
    assert scatter(9) == 2.0
    assert scatter(10**6) == pytest.approx(1.003)
    one, all_ = judge([0]), judge(range(accuracy.SEEDS))
    name = "dbn2.weight"
    assert one[name].limit == pytest.approx(MARGIN * scatter(10) * one[name].eager)
    assert all_[name].limit == pytest.approx(MARGIN * all_[name].eager)


def test_check_on_the_command_line_takes_a_selection(capsys):
    chosen = ["--backend", "reference", "--dtype", "bf16", "--device", "cpu", "--seeds", "1"]
    assert cli.main(["check", *chosen, "--level", "moment", "--block", "Bottleneck projection", "--mode", "train"]) == 0
    shown = capsys.readouterr().out
    assert "reference, moment, bf16" in shown
    assert shown.count("Bottleneck projection") == 1
    assert not any(other in shown for other in ("BasicBlock", "identity", " eval ", "prologue"))
    with pytest.raises(SystemExit):
        cli.main(["check", *chosen, "--block", "no such block"])


def test_of_several_ways_the_wrong_one_is_named(monkeypatch):
    plain = accuracy.step

    def step(block, x, dout, dtype, backend, level, *rest, **options):
        found = plain(block, x, dout, dtype, backend, level, *rest, **options)
        if level == "prologue":
            found.tensors["dx"] = 2 * found.tensors["dx"]
        return found

    monkeypatch.setattr(accuracy, "step", step)
    make = lambda seed: check.problem(SHAPE, "train", CPU, seed)  # noqa: E731
    ways = [("reference", "bn_act"), ("reference", "prologue")]
    found = accuracy.judge_each(make, torch.float32, ways, range(2))
    assert {level: failing({v.quantity: v for v in verdicts}) for (_, level), verdicts in found.items()} == {
        "bn_act": set(),
        "prologue": {"dx"},
    }
