"""Tuning, end to end, on a CPU: real trials of planted kernels with planted timings."""

import functools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from compare import every, same
from torch.utils.checkpoint import checkpoint

from blocks import assert_same, eager, image, make, step
from fused_res import AvgPool, backends, explain, plans, use_backend
from fused_res.block.dry_run import convolutions
from fused_res.block.levels import LEVELS
from fused_res.geometry import Convolution, Geometry, numbers_of
from fused_res.layout import nhwc
from fused_res.primitives import operands as operand_kinds
from fused_res.primitives.choice import Choice, own_kernel
from fused_res.primitives.conv_dgrad import conv_dgrad
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.primitives.conv_wgrad import conv_wgrad
from fused_res.primitives.operands import Activation
from fused_res.primitives.run import PLAIN
from fused_res.tuning import files, tuner
from fused_res.tuning.convolutions import LIBRARY, comparable, perform, truth, try_convolution, variants
from fused_res.tuning.levels import distinct, draw, try_levels
from fused_res.tuning.synthetic import operands
from fused_res.tuning.trials import errors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "_known", {})
    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setenv("FUSED_RES_CACHE", str(tmp_path / "cache"))
    with plans.afresh():
        yield


class Planted:
    """A backend of plain formulas with convolutions of its own in two tiles, each of which may be made wrong, or crash."""

    def __init__(self):
        self.calls, self.spoil = [], {}

    def supports(self, device, dtype):
        return None

    def preference(self, device):
        return 9

    def level(self, device, dtype, geometry):
        return "bn_act"

    def tiles(self, primitive, weight, pixels, operands):
        return [(16, 4), (32, 4)]

    def tile(self, pixels, warps):
        return pixels, warps

    def find(self, primitive, device):
        return getattr(self, primitive, None)

    def conv_fprop(self, x, unit, statistics, output, *, config=None):
        return self.spoilt(config, conv_fprop(x, unit, statistics=statistics, output=output, run=PLAIN))

    def conv_dgrad(self, dy, like, unit, inner, add, *, config=None):
        return self.spoilt(config, conv_dgrad(dy, like, unit, inner=inner, add=add, run=PLAIN))

    def conv_wgrad(self, dy, x, unit, *, config=None):
        return self.spoilt(config, conv_wgrad(dy, x, unit, run=PLAIN))

    def spoilt(self, config, found):
        self.calls.append(config)
        spoil = self.spoil.get(config)
        if spoil == "crash":
            raise RuntimeError("no such instruction")
        if spoil == "deaf":
            image = found if isinstance(found, torch.Tensor) else found.image
            image.nan_to_num_(0, 0, 0)
        if spoil == "wrong":
            image = found if isinstance(found, torch.Tensor) else found.image
            image[0, 0, 0, 0] += image.norm() / 100
        return found


@pytest.fixture
def planted(monkeypatch):
    backend, load = Planted(), backends.load
    monkeypatch.setattr(backends, "load", lambda name: backend if name == "planted" else load(name))
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "planted"))
    return backend


class Timings:
    """Planted timings: by the name of a candidate, of two that run together the sum, 1 for the rest; notes what was asked."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, runs, device, queued):
        self.asked.append(list(runs))
        for run in runs.values():
            run(0)
            run(1)
        return {name: sum(self.seconds.get(part, 1.0) for part in name.split(" + ")) for name in runs}


@pytest.fixture
def timings(monkeypatch):
    monkeypatch.setenv("FUSED_RES_TUNE", "1")

    def install(**seconds):
        found = Timings(**seconds)
        monkeypatch.setattr(tuner, "measure", found)
        return found

    return install


def geometry_of(block, x):
    return Geometry.from_numbers(numbers_of(x, block.parts()))


def level_of(block, x):
    return explain(block, x).rows[0].level


def own_tiles(planted):
    """The tiles that the planted backend's kernels ran with since the last time, "-" for none of them."""
    found, planted.calls = planted.calls, []
    return set(found) or "-"


def test_without_the_variable_nothing_is_measured(planted, timings, monkeypatch):
    found = timings()
    for value in (None, "0"):
        monkeypatch.delenv("FUSED_RES_TUNE") if value is None else monkeypatch.setenv("FUSED_RES_TUNE", value)
        block = make("bottleneck", torch.float32)
        assert level_of(block, image(block, dtype=torch.float32)) == "bn_act"
        assert not explain(block, image(block, dtype=torch.float32)).rows[0].measured
    assert not found.asked
    assert not list(files.root().iterdir())
    monkeypatch.setenv("FUSED_RES_TUNE", "yes")
    with plans.afresh(), pytest.raises(ValueError, match="FUSED_RES_TUNE: expected one of 0, 1, got 'yes'"):
        level_of(block, image(block, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["projection", "pooled", "as it is"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_fastest_level_with_the_fastest_convolutions_runs(kind, training, planted, timings):
    found = timings(library=1.0, **{"own": 0.9, "own (16, 4)": 0.8, "own (32, 4)": 0.5, "bn_act": 1.0, "prologue": 0.6})
    block = make(kind, torch.float32).train(training)
    peer, x = eager(block), image(block, dtype=torch.float32)
    got, expected = step(block, x), step(peer, x)
    assert_same(got, expected, rtol=1e-3, atol=1e-4)
    assert own_tiles(planted) >= {(32, 4), (16, 4), None}
    row = explain(block, x).rows[0]
    assert (row.backend, row.level, row.measured) == ("planted", "prologue", True)
    assert "prologue (measured)" in str(explain(block, x))
    assert row.who_convolves() == "own (measured)"
    assert {c.config for c in row.convolutions} == {(32, 4)}
    assert {c.why for c in row.convolutions} == {"measured"}
    assert found.asked[-1] == distinct(block.parts())
    alone = [names for names in found.asked[:-1] if "+" not in names[0]]
    assert all(names == [LIBRARY, "own", "own (16, 4)", "own (32, 4)"] for names in alone)
    assert (len(alone) < len(found.asked) - 1) == training
    asked, planted.calls = len(found.asked), []
    with torch.set_grad_enabled(training):
        out = block(x)
    if training:
        out.sum().backward()
    assert own_tiles(planted) == {(32, 4)}
    assert len(found.asked) == asked


@pytest.mark.parametrize("how", ["channels_last", "expanded", "misaligned", "strided"])
def test_a_tuned_block_takes_any_layout(how, timings):
    """Candidates were tried on channels_last images at the start of their memory."""
    timings(own=0.5, prologue=0.5)
    block = make("bottleneck", torch.float32)
    peer, x = eager(block), image(block, 4, 8, torch.float32)
    assert level_of(block, x) == "prologue"
    x = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "expanded": lambda: x[:1, :, :1].expand(x.shape),
        "misaligned": lambda: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
        "strided": lambda: x.repeat(1, 1, 1, 2)[..., ::2],
    }[how]()
    got, expected = (step(module, x, lambda out: x[:, :1].expand(out.shape)) for module in (block, peer))
    assert_same(got, expected, rtol=1e-3, atol=1e-4)
    row = explain(block, x).rows[0]
    assert row.measured
    assert "own" in row.who_convolves() or row.backend != "native"


def test_the_library_stays_where_nothing_is_faster(planted, timings):
    timings(**{"own": 1.2, "own (16, 4)": 0.99, "own (32, 4)": 1.0, "prologue": 0.5})
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    block(x)
    planted.calls = []
    assert level_of(block, x) == "prologue"
    assert own_tiles(planted) == "-"
    assert explain(block, x).rows[0].who_convolves() == "library (measured)"


@pytest.mark.parametrize("spoil", ["wrong", "deaf", "crash"])
def test_wrong_and_crashing_tiles_never_run_in_a_block(spoil, planted, timings):
    planted.spoil = {(32, 4): spoil, None: spoil}
    timings(**{"own": 0.1, "own (16, 4)": 0.8, "own (32, 4)": 0.1, "epilogue": 0.5})
    block = make("bottleneck", torch.float32)
    peer, x = eager(block), image(block, dtype=torch.float32)
    step(block, x)
    planted.calls = []
    peer.load_state_dict(eager(block).state_dict())
    assert_same(step(block, x), step(peer, x), rtol=1e-3, atol=1e-4)
    assert own_tiles(planted) == {(16, 4)}
    documents = [json.loads(path.read_text()) for path in files.root().rglob("*.json")]
    rejected = [d["rejected"] for d in documents if "own" in str(d["value"])]
    assert rejected
    assert {frozenset(r) for r in rejected} == {frozenset(("own", "own (32, 4)")), frozenset()}  # the latter of two together


def test_what_two_gradients_share_is_computed_and_charged_once(planted, timings, monkeypatch):
    """The library's wgrad and dgrad both need dy in memory: a step computes it for them once."""
    computed = []
    apply = operand_kinds.bn_act_backward_apply
    monkeypatch.setattr(operand_kinds, "bn_act_backward_apply", lambda *args, **kw: computed.append(1) or apply(*args, **kw))
    found = {}

    def measure(runs, device, queued):
        for name, run in runs.items():
            if "+" in name:
                computed.clear()
                run(0)
                found[name] = len(computed)
        # By itself each own kernel is slower than the library's convolution, but saves it the pass that made dy.
        times = {f"{LIBRARY} + {LIBRARY}": 2.0, "own + own": 1.5, "own": 1.1}
        return {name: times.get(name, 3.0 if name != LIBRARY else 1.0) for name in runs}

    timings()
    monkeypatch.setattr(tuner, "measure", measure)
    monkeypatch.setattr(planted, "tiles", lambda *_: [])
    block = make("bottleneck", torch.float32).train()
    with use_backend("planted", "prologue"):
        block(image(block, dtype=torch.float32))
        rows = explain(block, image(block, dtype=torch.float32)).rows[0]
    # Planted kernels are plain formulas, which compute dy for themselves.
    assert found == {f"{LIBRARY} + {LIBRARY}": 1, f"{LIBRARY} + own": 1, f"own + {LIBRARY}": 1, "own + own": 1}
    own = {primitive: {c.own for c in rows.convolutions if c.primitive == primitive} for primitive in ("conv_wgrad", "conv_dgrad")}
    assert True in own["conv_wgrad"]
    assert True in own["conv_dgrad"]


def test_a_wrong_level_never_runs(timings, monkeypatch):
    from fused_res.block import backward

    right = backward.pointwise_tail_backward_finalize

    def wrong(*args, **kwargs):
        gradients = right(*args, **kwargs)
        return gradients._replace(dweight=gradients.dweight * 1.01)

    block = make("bottleneck", torch.float32)
    x, found = image(block, dtype=torch.float32), timings(moment=0.1, prologue=0.5)
    with monkeypatch.context() as patch, plans.afresh():
        patch.setattr(backward, "pointwise_tail_backward_finalize", wrong)
        assert level_of(block, x) == "prologue"
        assert "moment" not in found.asked[-1]
    tuner._known.clear()
    for path in files.root().rglob("*.json"):
        path.unlink()
    assert level_of(block, x) == "moment"


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


def other_process():
    """As if started anew."""
    tuner._known.clear()
    return plans.afresh()


def test_another_process_finds_what_was_found(planted, timings):
    first = timings(**{"own (32, 4)": 0.5, "epilogue": 0.5})
    block = make("bottleneck", torch.float32)
    x = image(block, dtype=torch.float32)
    assert level_of(block, x) == "epilogue"
    assert first.asked
    with other_process():
        second = timings()
        planted.calls = []
        step(block, x)
        assert not second.asked
        assert own_tiles(planted) == {(32, 4)}
        assert level_of(block, x) == "epilogue"
    with other_process():
        third = timings()
        assert level_of(block, x[:2]) == "bn_act"
        assert third.asked


def test_other_versions_and_switches_are_measured_anew(timings, monkeypatch):
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    timings(prologue=0.5)
    assert level_of(block, x) == "prologue"
    changes = (
        lambda: monkeypatch.setattr(tuner, "_files_of", lambda *_: files.PlanFiles({"torch": "2.99"})),
        lambda: torch.use_deterministic_algorithms(True),
    )
    try:
        for change in changes:
            change()
            with other_process():
                found = timings(epilogue=0.5)
                assert level_of(block, x) == "epilogue"
                assert found.asked
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_identity_names_device_versions_and_sources():
    found = tuner.identity(CPU)
    assert {"fused_res", "torch", "triton", "cuda", "cudnn", "source", "library", "device"} <= set(found)
    assert tuner._files(CPU).identity["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("value", ['"nonsense"', '{"own": 1, "config": null}', '{"own": true, "config": [1, 2, 3]}', "3", "[]"])
def test_values_that_mean_nothing_are_measured_anew(value, planted, timings):
    timings(**{"own (32, 4)": 0.5, "epilogue": 0.5})
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    assert level_of(block, x) == "epilogue"
    for path in files.root().rglob("*.json"):
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"value": json.loads(value)}))
    with other_process():
        found = timings(**{"own (32, 4)": 0.5, "prologue": 0.5})
        with pytest.warns(UserWarning, match="ignored"):
            assert level_of(block, x) == "prologue"
        assert len(found.asked) > 1


def test_without_a_cache_tuning_works_within_the_process(timings, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CACHE", "")
    found = timings(prologue=0.5)
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    assert level_of(block, x) == "prologue"
    asked = len(found.asked)
    with plans.afresh():
        assert level_of(block, x) == "prologue"
    assert len(found.asked) == asked


def test_a_forced_level_has_its_convolutions_tried_and_no_other(planted, timings):
    found = timings(**{"own (32, 4)": 0.5})
    block = make("bottleneck", torch.float32)
    x = image(block, dtype=torch.float32)
    for _ in range(2):
        with use_backend("planted", "epilogue"):
            block(x)
    assert found.asked
    assert all(names[0].startswith(LIBRARY) for names in found.asked)
    planted.calls, asked = [], len(found.asked)
    with use_backend("planted", "epilogue"):
        step(block, x)
    assert own_tiles(planted) == {(32, 4)}
    with use_backend("planted", "bn_act"):
        block(x)
    assert len(found.asked) == asked


def test_where_the_library_has_all_convolutions_levels_alone_are_tried(planted, timings, monkeypatch):
    """And what is found holds for that alone."""
    block = make("projection", torch.float32)
    x = image(block, dtype=torch.float32)
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "library")
    found = timings(epilogue=0.5, **{"own (32, 4)": 0.1})
    assert level_of(block, x) == "epilogue"
    assert found.asked == [["bn_act", "epilogue", "prologue"]]
    assert own_tiles(planted) == "-"
    monkeypatch.delenv("FUSED_RES_CONVOLUTIONS")
    with plans.afresh():
        timings(prologue=0.5)
        assert level_of(block, x) == "prologue"


def test_tuning_leaves_no_trace(timings):
    timings(prologue=0.5)
    block = make("pooled", torch.float32)
    x = image(block, dtype=torch.float32).requires_grad_()
    before, state = {k: v.clone() for k, v in block.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        level_of(block, x)
    same(torch.get_rng_state(), state)
    for k, v in block.state_dict().items():
        same(v, before[k])
    assert x.grad is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_runs_as_its_forward(use_reentrant, timings):
    """The second time everything would be decided otherwise."""
    found = timings(moment=0.5)
    block = make("bottleneck", torch.float32)
    peer, x = eager(block), image(block, dtype=torch.float32)

    def call(x):
        out = checkpoint(block, x, use_reentrant=use_reentrant)
        tuner._known.clear()
        found.seconds = {"epilogue": 0.1}
        return out

    got, expected = step(block, x, call=call), step(peer, x)
    gradients = {"out", "dx"} | {f"d{name}" for name, _ in block.named_parameters()}
    assert_same({k: got[k] for k in gradients}, {k: expected[k] for k in gradients}, rtol=1e-3, atol=1e-4)
    assert sum(names[0] == "bn_act" for names in found.asked) == 1


def test_nothing_is_tried_while_compiling_and_the_last_sizes_level_is_used(dynamo, timings):
    found, levels = timings(moment=0.5), []

    def backend(graph, inputs):
        levels.extend(node.args[7] for node in graph.graph.nodes if "block_forward" in str(node.target))
        return graph

    block = make("bottleneck", torch.float32)
    x = image(block, dtype=torch.float32)
    torch.compile(block, backend=backend, fullgraph=True)(x)
    assert not found.asked
    with plans.afresh():
        block(x)
        asked = len(found.asked)
        torch._dynamo.reset()
        torch.compile(block, backend=backend, fullgraph=True)(x[:2])
        assert len(found.asked) == asked
    rule = backends.load(explain(block, x).rows[0].backend).level(CPU, torch.float32, geometry_of(block, x))
    assert levels == [rule, "moment"]


def test_nothing_is_tried_without_data_or_while_exporting_or_in_a_capture(timings, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    found = timings()
    block = make("bottleneck", torch.float32).eval()
    x = image(block, dtype=torch.float32)
    torch.export.export(block, (x,))
    make_fx(block)(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        block(mode.from_tensor(x))
    block(mode.from_tensor(x))
    assert not found.asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda = torch.device("cuda")
    assert not tuner.can_try(cuda, torch.float32, geometry_of(block, x))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuner.can_try(cuda, torch.float32, geometry_of(block, x))
    assert not tuner.can_try(CPU, torch.float64, geometry_of(block, x))


def test_memory_that_does_not_suffice_is_a_warning(timings, monkeypatch):
    timings(moment=0.5)

    def full(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(tuner, "try_levels", full)
    block = make("bottleneck", torch.float32)
    x = image(block, dtype=torch.float32)
    with pytest.warns(UserWarning, match="not tuned: out of memory"):
        every(block(x).isfinite())


def test_threads_tune_a_block_once(timings):
    found = timings(prologue=0.5)
    block = make("identity", torch.float32)
    x, levels = image(block, dtype=torch.float32), []
    threads = [threading.Thread(target=lambda: levels.append(level_of(block, x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert levels == ["prologue"] * 4
    assert sum(names[0] == "bn_act" for names in found.asked) == 1


PROCESS = """
import sys, torch
from fused_res import BasicBlock, explain
from fused_res.tuning import tuner
torch.set_num_threads(1)
fast = sys.argv[1]
tuner.measure = lambda runs, device, queued: {name: 0.5 if name == fast else 1.0 for name in runs}
print(explain(BasicBlock(8, 8), torch.randn(2, 8, 6, 6)).rows[0].level)
"""


def test_processes_that_tune_at_once_each_finish_and_later_ones_agree():
    environment = os.environ | {"FUSED_RES_TUNE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    start = functools.partial(subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = [start([sys.executable, "-c", PROCESS, level]) for level in ("prologue", "epilogue", "prologue")]
    outputs = [process.communicate(timeout=300) for process in first]
    assert [process.returncode for process in first] == [0] * 3, outputs
    levels = [stdout.strip() for stdout, _ in outputs]
    assert set(levels) <= {"prologue", "epilogue"}
    later = start([sys.executable, "-W", "error::UserWarning", "-c", PROCESS, "none"])
    stdout, stderr = later.communicate(timeout=300)
    assert stdout.strip() in levels, stderr
