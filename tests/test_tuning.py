"""Tuning, end to end, on a CPU: real trials of planted kernels with planted timings."""

import json

import pytest
import torch
from compare import every, same
from torch.utils.checkpoint import checkpoint
from tuning_plants import geometry_of, level_of, own_tiles

from blocks import assert_same, eager, image, make, step
from fused_res import backends, explain, plans, use_backend
from fused_res.primitives import operands as operand_kinds
from fused_res.tuning import files, tuner
from fused_res.tuning.convolutions import LIBRARY
from fused_res.tuning.levels import distinct

CPU = torch.device("cpu")


pytest_plugins = ("tuning_plants",)
pytestmark = pytest.mark.usefixtures("nothing_known")


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
