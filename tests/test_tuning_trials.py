"""What candidates of tuning are judged by: no false alarm, and no fault that passes."""

import pytest
import torch
from compare import same
from tuning_plants import geometry_of

from blocks import image, make
from fused_res import AvgPool
from fused_res.block.dry_run import convolutions
from fused_res.block.levels import LEVELS
from fused_res.geometry import Convolution, Geometry
from fused_res.layout import nhwc
from fused_res.primitives.choice import Choice, own_kernel
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.operands import Activation
from fused_res.primitives.run import PLAIN
from fused_res.tuning.convolutions import LIBRARY, comparable, perform, truth, try_convolution, variants
from fused_res.tuning.levels import draw, try_levels
from fused_res.tuning.synthetic import operands
from fused_res.tuning.trials import errors

CPU = torch.device("cpu")


pytest_plugins = ("tuning_plants",)
pytestmark = pytest.mark.usefixtures("nothing_known")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_relu_hides_in_one_draw_it_shows_in_the_other(dtype):
    block = make("bottleneck", dtype)
    seen = 0
    for call in asked_by(block, image(block, 3, 8, dtype), "reference", dtype):
        draws = [operands(call, CPU, seed).operands for seed in (0, 1)]
        for first, second in zip(*draws, strict=True):
            if isinstance(first, Activation) and first.vectors is not None:
                opened = [a.values(PLAIN) > 0 for a in (first, second)]
                same(opened[0], ~opened[1])
                seen += 1
    assert seen >= 4


@pytest.mark.parametrize("masks", [True, False])
def test_a_gradient_said_to_be_masked_that_is_not_is_found_wrong(masks, planted, monkeypatch):
    """It would be taken at its word."""
    block = make("bottleneck", torch.float32)
    calls = asked_by(block, image(block, 3, 8, torch.float32), "planted", torch.float32)
    call = next(call for call in calls if call.primitive == "conv_dgrad" and call.operands[2] is not None)

    def dgrad(dy, like, unit, inner, add, *, config=None):
        found = conv_dgrad(dy, like, unit, inner=inner, run=PLAIN)
        open_ = inner.values(PLAIN) > 0 if masks else 1
        return found._replace(image=nhwc(found.image * open_), masked=True)

    monkeypatch.setattr(planted, "conv_dgrad", dgrad)
    choice, verdict = try_convolution(call, CPU, lambda runs, *_: {n: 1.0 - (n != LIBRARY) / 2 for n in runs})
    assert choice.own == masks
    assert set(verdict.rejected) == (set() if masks else {"own", "own (16, 4)", "own (32, 4)"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pool", [None, AvgPool((2, 2), (2, 2))], ids=["identity", "pooled"])
def test_every_level_of_the_plain_formulas_is_found_right(pool, frozen, dtype):
    """The judge has no false alarms: errors of fewer channels than these have no meaningful ratio."""

    def convolution(out, into, size, stride=1, training=True):
        return Convolution((out, into, size, size), (stride, stride), (size // 2, size // 2), (1, 1), 1, training)

    stride, into = (1, 128) if pool is None else (2, 64)
    main = (convolution(32, into, 1), convolution(32, 32, 3, stride, not frozen), convolution(128, 32, 1))
    geometry = Geometry(main, None if pool is None else convolution(128, 64, 1), pool, False, (2, 8, 8))
    _, verdict = try_levels(geometry, "reference", dtype, CPU, lambda runs, *_: dict.fromkeys(runs, 1.0))
    assert verdict.rejected == {}
    assert list(verdict.seconds) == list(LEVELS)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_level_off_by_a_little_is_found_wrong(seed):
    geometry = geometry_of(make("bottleneck", torch.float32), image(make("bottleneck"), 4, 9, torch.float32))
    problem = draw(geometry, torch.float32, CPU, seed)
    state, wide = problem.state("reference"), problem.wide()
    expected = wide.results("bn_act", "reference", wide.state("reference", state))
    for level in LEVELS:
        found = problem.results(level, "reference", state)
        assert len(found) == len(expected) == 1 + 2 * 3 + 1 + 3 * 3
        assert max(errors(*pair).largest for pair in zip(found, expected, strict=True)) < 1e-5
    for i, result in enumerate(found):
        assert errors(result * (1 + 1e-4), expected[i]).l2 > 5e-5


def asked_by(block, x, backend, dtype):
    calls = {}
    for level in LEVELS[1:]:
        for _, call in convolutions(x, None, block.parts(), level, backend, block.training):
            for variant in variants(call):
                calls.setdefault(variant.key(), variant)
    return list(calls.values())


@pytest.mark.parametrize(
    ("training", "dtype", "kind"),
    [
        pytest.param(True, torch.float32, "pooled", id="train-float32"),
        pytest.param(False, torch.bfloat16, "pooled", id="eval-bfloat16"),
        pytest.param(False, torch.bfloat16, "projection", id="eval-bfloat16-3x3", marks=pytest.mark.long),
        pytest.param(True, torch.bfloat16, "pooled", id="train-bfloat16", marks=pytest.mark.long),
        pytest.param(True, torch.bfloat16, "projection", id="train-bfloat16-3x3", marks=pytest.mark.long),
        pytest.param(False, torch.float32, "pooled", id="eval-float32", marks=pytest.mark.long),
    ],
)
def test_triton_convolutions_pass_the_trial_in_the_interpreter(training, dtype, kind, proven_interpreter):
    """Every convolution that some level of the block asks for, with every tile: the judge has no false alarms."""
    pytest.importorskip("triton")
    seen = 0
    block = make(kind, dtype).train(training)
    for call in asked_by(block, image(block, 2, 6, dtype), "triton", dtype):
        if own_kernel(call)[0] is not None:
            choice, verdict = try_convolution(call, CPU, lambda runs, *_: {n: 1.0 - (n != LIBRARY) / 2 for n in runs})
            assert choice.own
            assert verdict.rejected == {}
            assert len(verdict.seconds) >= 3
            seen += 1
    assert seen >= 4


@pytest.mark.parametrize("kind", ["pooled", "identity"])
def test_the_truth_is_what_the_library_gives_but_for_rounding(kind):
    block = make(kind, torch.float32)
    for call in asked_by(block, image(block, 3, 8, torch.float32), "reference", torch.float32):
        problem = operands(call, CPU, 0)
        found, expected = comparable(problem, perform(problem, Choice(False))), truth(problem)
        assert [t.dtype for t in expected] == [torch.float64] * len(found)
        assert max(errors(*pair).largest for pair in zip(found, expected, strict=True)) < 1e-5, call.key()


def test_a_masked_gradient_is_tried_too():
    block = make("bottleneck", torch.float32)
    kinds = {call.fused[0] for call in asked_by(block, image(block, 3, 8, torch.float32), "reference", torch.float32)}
    assert {"relu bn", "masked bn", "signs bn"} <= kinds


# What is kept, and where nothing is tried.
