"""Steps of the moment form that backends lend each other: tried beside the own ones, and run where they are faster."""

import itertools
import json

import pytest
import torch
from tuning_plants import Planted

from blocks import assert_same, eager, image, make, projection, step
from fused_res import Bottleneck, accuracy, backends, explain, plans, use_backend
from fused_res.block import dry_run
from fused_res.primitives.choice import STEPS, Choice, StepCall, lent_steps, settled_step
from fused_res.primitives.conv_dgrad import Inflow
from fused_res.primitives.moments import plain as plain_moments
from fused_res.primitives.operands import Activation
from fused_res.primitives.pointwise_tail import plain as plain_tail
from fused_res.primitives.pointwise_tail_backward import plain_apply, plain_reduce
from fused_res.primitives.run import PLAIN, Fixed, of
from fused_res.tuning import files, steps, tuner
from fused_res.tuning.trials import errors

pytest_plugins = ("tuning_plants",)
pytestmark = pytest.mark.usefixtures("nothing_known")

CPU = torch.device("cpu")
MOMENTS, TAIL, REDUCE, APPLY = STEPS
KINDS = ("bottleneck", "strided", "pooled")


class Stepping(Planted):
    """The plain formulas as kernels of its own, each of which may be made wrong, or deaf to NaN and infinities, or crash."""

    # The first step back leaves g A to the last one, as some kernels do, which then reads it.
    leaves = True

    def __init__(self):
        super().__init__()
        self.ran = []

    def moments(self, z):
        return self.spoilt_step(MOMENTS, plain_moments(z, PLAIN))

    def pointwise_tail(self, main, shortcut, keep_signs):
        return self.spoilt_step(TAIL, plain_tail(main, shortcut, keep_signs, PLAIN))

    def pointwise_tail_backward_reduce(self, dout, signs, z, mean, scaled):
        total, product, _ = plain_reduce(dout, signs, z, mean, PLAIN)
        through = torch.ones(z.pixels, scaled.shape[1]) if self.leaves and scaled is not None else None
        return self.spoilt_step(REDUCE, (total, product, through))

    def pointwise_tail_backward_apply(self, dout, signs, z, scaled, through, gradients, inner, into):
        found = plain_apply(dout, signs, z, scaled, gradients, inner, into, PLAIN)
        return self.spoilt_step(APPLY, found, through is not None)

    def spoilt_step(self, name, found, *noted):
        self.ran.append((name, *noted))
        spoil = self.spoil.get(name)
        first = found[0]
        if spoil == "crash":
            raise RuntimeError("no such instruction")
        if spoil == "deaf":
            first.nan_to_num_(0, 0, 0)
        if spoil == "wrong":
            first[(0,) * first.dim()] += first.norm() / 10
        return found


class Lender(Stepping):
    leaves = False
    conv_fprop = conv_dgrad = conv_wgrad = None

    def tiles(self, primitive, weight, pixels, operands):
        return []

    def preference(self, device):
        return 1

    def lends(self, device):
        return True


@pytest.fixture
def both(monkeypatch):
    """The backends "planted" and "lender"."""
    found, load = {"planted": Stepping(), "lender": Lender()}, backends.load
    monkeypatch.setattr(backends, "load", lambda name: found.get(name) or load(name))
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, *found))
    return found["planted"], found["lender"]


def drawn(kind, dtype=torch.float32):
    """A block: x joins as it is, through a strided projection, or through one behind a pool."""
    if kind != "strided":
        return make(kind, dtype)
    return accuracy.random_block(Bottleneck(6, 4, 2, projection(6, 16, 2)), 0).to(dtype)


def asked(kind, backend="planted", training=True, dtype=torch.float32):
    block = drawn(kind, dtype).train(training)
    found = {}
    for call in dry_run.steps(image(block, 3, 8, dtype), None, block.parts(), "moment", backend, training):
        found.setdefault(call.key(), call)
    return list(found.values())


def names(calls):
    return [call.primitive for call in calls]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dry_run_lists_what_a_run_asks_for(kind, training, both, monkeypatch):
    keys, choose = [], settled_step

    def note(call):
        keys.append(call.key())
        return choose(call)

    monkeypatch.setattr("fused_res.primitives.run.settled_step", note)
    block = drawn(kind).train(training)
    x = image(block, 3, 8, torch.float32).requires_grad_(training)
    with use_backend("planted", "moment"), torch.set_grad_enabled(training):
        out = block(x)
        if training:
            out.sum().backward()
    calls = dry_run.steps(x, None, block.parts(), "moment", "planted", training)
    assert keys == [call.key() for call in calls]
    assert set(names(calls)) == (set(STEPS) if training else {TAIL})


def test_what_is_lent_is_what_both_have_and_the_lender_has_a_kernel_for(both, monkeypatch):
    call = StepCall(MOMENTS, "planted", CPU, torch.float32, (Activation(torch.randn(2, 4, 5, 5)),))
    assert lent_steps(call) == ["lender"]
    assert lent_steps(call._replace(backend="lender")) == []
    assert lent_steps(call._replace(backend=backends.LIBRARY)) == []
    monkeypatch.setattr(Lender, "formula", lambda self, primitive, device, dtype: "no kernel for it", raising=False)
    assert lent_steps(call) == []
    with pytest.raises(RuntimeError, match="moments: was to be run by backend 'lender', which has no kernel"):
        Fixed("planted", Choice(True, lender="lender")).step(MOMENTS, call.operands[0].image, *call.operands)
    monkeypatch.delattr(Lender, "formula")
    assert lent_steps(call) == ["lender"]
    monkeypatch.setattr(both[0], "moments", None, raising=False)
    assert lent_steps(call) == []
    assert of("planted").step(MOMENTS, torch.randn(1)) is None


def test_keys_tell_apart_what_may_differ_in_speed(both):
    calls = asked("strided")
    first = next(call for call in calls if call.primitive == APPLY)
    dout, signs, z, scaled, _, gradients, inner, into = first.operands

    def other(*operands):
        return first._replace(operands=operands)

    changed = [
        first._replace(backend="lender"),
        first._replace(dtype=torch.bfloat16),
        other(dout, signs, Activation(z.image, z.vectors, (2, 1)), scaled, None, gradients, inner, into),
        other(dout, signs, Activation(z.image), scaled, None, gradients, inner, into),
        other(dout, signs, z, scaled, None, gradients._replace(mean=None, quadratic=None, constant=None), inner, into),
        other(dout, signs, z, scaled, None, gradients, not inner, into),
        other(dout, signs, z, scaled, None, gradients, inner, z.image),
    ]
    assert len({first.key(), *(call.key() for call in changed)}) == 1 + len(changed)
    assert other(dout, signs, z, scaled, dout, gradients, inner, into).key() == first.key()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_what_the_formulas_give_but_for_rounding(kind, dtype):
    seen = []
    for call in [*asked(kind, backends.LIBRARY, dtype=dtype), *asked(kind, backends.LIBRARY, training=False, dtype=dtype)]:
        drawn = steps.operands(call, CPU, 0)
        found, expected = steps.comparable(drawn, steps.perform(steps._fresh(drawn), Choice(True))), steps.truth(drawn)
        assert [t.dtype for t in expected] == [torch.float64] * len(found)
        assert max(errors(*pair).largest for pair in zip(found, expected, strict=True)) < (1e-5 if dtype == torch.float32 else 2e-2)
        seen.append(call.primitive)
    assert set(seen) == set(STEPS)


def fastest(name):
    """Timings in which this candidate is the fastest."""
    return lambda runs, *_: {run: 0.5 if run == name else 1.0 for run in runs}


@pytest.mark.parametrize("kind", KINDS)
def test_right_kernels_pass_and_the_fastest_is_chosen(kind, both):
    tried = []
    calls = asked(kind)
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        tried.append(call.primitive)
        choice, verdict = steps.try_step(call, CPU, fastest("lender"))
        assert (choice, verdict.rejected) == (Choice(True, None, "measured", "lender"), {})
        if steps.shares(call, following):
            pairs = steps.try_both(call, following, CPU, fastest("lender + own"))
            assert [choice.lender for choice, _ in pairs] == ["lender", ""]
            assert pairs[0][1].rejected == {}
            assert list(pairs[0][1].seconds) == ["own + own", "own + lender", "lender + own", "lender + lender"]
    assert set(tried) == set(STEPS)


def test_the_last_step_gets_what_the_first_ones_kernel_leaves(both):
    planted, lender = both
    calls = asked("bottleneck")
    pair = next(pair for pair in itertools.pairwise(calls) if steps.shares(*pair))
    steps.try_both(*pair, CPU, lambda runs, *_: {name: run(0) and 1.0 for name, run in runs.items()})
    assert {ran for ran in (*planted.ran, *lender.ran) if ran[0] == APPLY} == {(APPLY, True), (APPLY, False)}


@pytest.mark.parametrize("spoil", ["wrong", "deaf", "crash"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", ["bottleneck", "strided"])
def test_a_lent_kernel_that_is_wrong_is_not_chosen(kind, name, spoil, both):
    """However fast it is, by itself and together with another; the other one may still be."""
    _, lender = both
    lender.spoil = {name: spoil}
    calls = asked(kind)
    seen = 0
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        if call.primitive == name:
            choice, verdict = steps.try_step(call, CPU, fastest("lender"))
            assert not choice.lender
            assert set(verdict.rejected) == {"lender"}
            seen += 1
        if steps.shares(call, following) and name in names((call, following)):
            (first, verdict), (last, _) = steps.try_both(call, following, CPU, fastest("lender + lender"))
            assert not first.lender
            assert not last.lender
            assert set(verdict.rejected) >= {"lender + lender"}
            assert "own + lender" in verdict.rejected or name == REDUCE
            assert "lender + own" in verdict.rejected or name == APPLY
            assert len(verdict.rejected) == 2
    assert seen


def test_signs_that_are_not_the_outputs_are_found_wrong(both, monkeypatch):
    def tail(self, main, shortcut, keep_signs):
        out, signs = plain_tail(main, shortcut, keep_signs, PLAIN)
        signs[-1, 0] ^= 1
        return out, signs

    monkeypatch.setattr(Lender, "pointwise_tail", tail)
    call = next(call for call in asked("bottleneck") if call.primitive == TAIL)
    choice, verdict = steps.try_step(call, CPU, fastest("lender"))
    assert not choice.lender
    assert set(verdict.rejected) == {"lender"}


def tuned(both):
    """A block after a step under FUSED_RES_TUNE=1."""
    block = drawn("strided")
    peer, x = eager(block), image(block, 3, 8, torch.float32)
    assert_same(step(block, x), step(peer, x), rtol=1e-3, atol=1e-4)
    for backend in both:
        backend.ran.clear()
    return block, x


def test_the_fastest_of_both_runs_is_kept_and_is_explained(both, timings):
    """In a whole block whose level is tuned, too."""
    planted, lender = both
    found = timings(lender=0.3, own=0.5, moment=0.5)
    block, x = tuned(both)
    assert ["own", "lender"] in found.asked
    assert ["own + own", "own + lender", "lender + own", "lender + lender"] in found.asked
    (row,) = explain(block, x).rows
    assert row.level == "moment"
    assert row.lent == tuple(f"{name}: lender (measured)" for name in STEPS)
    assert "; ".join(row.lent) in str(explain(block, x))
    planted.ran.clear()  # without gradients, as explain calls it, no signs are kept: that was not measured
    step(block, x)
    assert {ran[0] for ran in lender.ran} == set(STEPS)
    assert not planted.ran
    tuner._known.clear()
    with plans.afresh():
        again = timings()
        lender.ran.clear()
        step(block, x)
        assert not again.asked
        assert {ran[0] for ran in lender.ran} == set(STEPS)
        assert not planted.ran


@pytest.mark.parametrize("spoil", ["wrong", "deaf", "crash"])
def test_a_lent_kernel_that_is_wrong_never_runs(spoil, both, timings):
    """In a whole block."""
    planted, lender = both
    lender.spoil = dict.fromkeys(STEPS, spoil)
    timings(lender=0.1, own=0.5, moment=0.5)
    block, x = tuned(both)
    step(block, x)
    assert not lender.ran
    assert {ran[0] for ran in planted.ran} == set(STEPS)
    (row,) = explain(block, x).rows
    assert (row.level, row.lent) == ("moment", ())
    documents = [json.loads(path.read_text()) for path in files.root().rglob("*.json")]
    assert sum("lender" in document["rejected"] for document in documents) >= 4


def test_how_many_of_a_steps_calls_are_lent_is_explained(both):
    block = drawn("strided")
    x = image(block, 3, 8, torch.float32)
    calls = dry_run.steps(x, None, block.parts(), "moment", "planted", True)
    one = next(call for call in calls if call.primitive == MOMENTS)
    assert names(calls).count(MOMENTS) == 2
    plans.remember_by(lambda key: Choice(True, None, "measured", "lender") if key == one.key() else None)
    with use_backend("planted", "moment"):
        (row,) = explain(block, x).rows
        assert row.lent == (f"{MOMENTS}: lender 1 of 2 (measured)",)
        assert explain(block, x).to_dicts()[0]["lent"] == row.lent


@pytest.mark.parametrize("value", [{"own": False, "config": None}, {"own": True, "config": None, "lender": "nobody"}])
def test_kept_choices_that_mean_nothing_for_a_step_are_ignored(value, both):
    call = asked("bottleneck")[0]
    tuner._files(CPU).save(tuner._text(call.key()), value)
    with pytest.warns(UserWarning, match="ignored"):
        assert tuner.recall(call.key()) is None


def test_an_inflow_that_joins_is_judged_by_fresh_images(both):
    """What a candidate has added to before would otherwise be added to again."""
    call = next(call for call in asked("strided") if call.primitive == APPLY and call.operands[7] is not None)
    drawn = steps.operands(call, CPU, 0)
    before = drawn.operands[7].clone()
    found = steps.perform(steps._fresh(drawn), Choice(True))
    assert isinstance(found, Inflow)
    assert torch.equal(drawn.operands[7], before)
    assert not torch.equal(found.image, before)
