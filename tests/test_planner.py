"""The level a block runs at: the backend's rule, asked once for each geometry, wherever the block is called from."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blocks import assert_same, eager, image, make, step
from fused_res import backends, explain, plans, residual_block, use_backend
from fused_res.block.levels import LEVELS, Level
from fused_res.geometry import Geometry, numbers_of
from fused_res.planner import Plan, forced, plan, resolve
from fused_res.spec import Block, ConvBN

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_decided():
    with plans.afresh():
        yield


@pytest.fixture
def rule(monkeypatch):
    """Replaces the rule of the backend that is the automatic choice; returns the geometries it is asked about."""
    asked = []

    def install(level):
        def answer(device, dtype, geometry):
            asked.append(geometry)
            return level(geometry) if callable(level) else level

        monkeypatch.setattr(backends.load(resolve("auto", CPU, torch.float64)), "level", answer)
        return asked

    return install


def levels_of(module, x):
    return [row.level for row in explain(module, x).rows]


def test_the_rule_of_the_automatic_backend_is_asked_once_for_each_geometry(rule):
    asked = rule("moment")
    block = make("bottleneck")
    x = image(block)
    for size in (x, x, x[:2], x):
        block(size)
    with torch.no_grad():
        block(x)
    assert [geometry.images for geometry in asked] == [(3, 7, 7), (2, 7, 7)]
    assert [unit.weight for unit in asked[0].main] == [(4, 16, 1, 1), (4, 4, 3, 3), (16, 4, 1, 1)]
    assert asked[0].training
    assert levels_of(block, x) == ["moment"]


def test_geometries_tell_shortcuts_modes_and_strides_apart(rule):
    asked = rule("bn_act")
    for kind in ("identity", "projection", "pooled", "as it is"):
        for training in (True, False):
            block = make(kind).train(training)
            block(image(block))
    assert len(set(asked)) == len(asked) == 8
    assert [geometry.given for geometry in asked] == [False] * 6 + [True] * 2
    assert [geometry.training for geometry in asked] == [True, False] * 4
    assert all((geometry.pool is not None) == (i in (4, 5)) for i, geometry in enumerate(asked))


@pytest.mark.parametrize("kind", ["identity", "projection"])
def test_a_level_that_means_nothing_becomes_the_highest_that_does(kind, rule):
    rule("moment")
    block = make(kind)
    x = image(block)
    assert plan(x, block.parts()) == Plan("auto", "prologue")
    assert levels_of(block, x) == ["prologue"]
    with use_backend("reference", level="moment"):
        assert levels_of(block, x) == ["prologue"]
        assert levels_of(make("bottleneck"), image(make("bottleneck"))) == ["moment"]


@pytest.mark.parametrize("changes", [{"stride": (2, 2)}, {"padding": (1, 1)}, {"groups": 2}])
def test_a_last_convolution_without_moment_form_is_at_prologue(changes):
    unit = ConvBN(torch.zeros(4, 4 // changes.get("groups", 1), 1, 1), **changes)
    for level in LEVELS:
        found = Level.of(level, Block([unit]))
        assert found.name == {"moment": "prologue"}.get(level, level)
        assert found._replace(name="") == Level.of(found.name, Block([unit]))._replace(name="")


def test_what_is_forced_asks_no_rule(rule):
    asked = rule("moment")
    block = make("bottleneck")
    for level in LEVELS:
        with use_backend("reference", level):
            assert levels_of(block, image(block)) == [level]
    assert not asked
    assert forced() is None


def test_a_forced_backend_uses_its_own_rule(rule, monkeypatch):
    rule("moment")
    monkeypatch.setattr(backends.load("reference"), "level", lambda *_: "epilogue")
    block = make("bottleneck")
    with use_backend("reference"):
        assert levels_of(block, image(block)) == ["epilogue"]
    assert levels_of(block, image(block)) == ["moment"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", backends.NAMES)
def test_every_rule_gives_a_level_for_every_block_with_and_without_sizes(name, device, dtype):
    for kind in ("identity", "projection", "bottleneck", "pooled", "as it is"):
        for training in (True, False):
            block = make(kind).train(training)
            geometry = Geometry.from_numbers(numbers_of(image(block), block.parts()))
            for known in (geometry, geometry._replace(images=None), geometry._replace(images=(256, 56, 56))):
                assert backends.load(name).level(torch.device(device), dtype, known) in LEVELS


def alternating():
    """A rule that changes its mind at every question."""
    count = iter(range(1000))
    return lambda geometry: ("moment", "bn_act")[next(count) % 2]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_runs_at_the_level_of_its_forward(use_reentrant, rule):
    asked = rule(alternating())
    block = make("pooled")
    peer, x = eager(block), image(block)
    got = step(block, x, call=functools.partial(checkpoint, block, use_reentrant=use_reentrant))
    expected = step(peer, x)
    gradients = {"out", "dx"} | {f"d{name}" for name, _ in block.named_parameters()}
    assert_same({k: got[k] for k in gradients}, {k: expected[k] for k in gradients})
    assert len(asked) == 1


def test_a_decision_stands_and_afresh_forgets_it(rule):
    rule(alternating())
    block = make("bottleneck")
    x = image(block)
    assert [levels_of(block, x) for _ in range(3)] == [["moment"]] * 3
    with plans.afresh():
        assert levels_of(block, x) == ["bn_act"]
        assert plans.decide("key", 1) == plans.decide("key", 2) == plans.decided("key") == 1
    assert plans.decided("key") is None
    assert levels_of(block, x) == ["moment"]


def test_blocks_in_one_graph_have_each_their_level(dynamo, rule):
    asked = rule(lambda geometry: "moment" if geometry.projection is None else "epilogue")
    model = torch.nn.Sequential(make("pooled"), make("bottleneck"))
    peer = torch.nn.Sequential(*[eager(block) for block in model])
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.args[7] for node in graph.graph.nodes if "block_forward" in str(node.target)])
        return graph

    x = image(model[0])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), peer(x))
    assert graphs == [["epilogue", "moment"]]
    assert [geometry.images for geometry in asked] == [(3, 7, 7), (3, 4, 4)]


def test_dynamic_sizes_need_one_graph_and_no_guard(dynamo, rule):
    rule("moment")
    block, levels = make("bottleneck"), []

    def backend(graph, inputs):
        levels.extend(node.args[7] for node in graph.graph.nodes if "block_forward" in str(node.target))
        return graph

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    compiled(image(block))
    with dynamo.config.patch(error_on_recompile=True):
        for n, size in ((5, 7), (4, 9), (2, 12)):
            x = image(block, n, size)
            torch.testing.assert_close(compiled(x), eager(block)(x))
    assert levels == ["moment"]


def test_weights_of_symbolic_shape_run_at_the_first_level(dynamo, rule):
    asked = rule("moment")

    def call(x, weight):
        return residual_block(x, [ConvBN(weight)])

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    with dynamo.config.patch(error_on_recompile=True):
        for channels in (6, 8):
            x, weight = torch.randn(3, channels, 5, 5), torch.randn(channels, channels, 1, 1)
            torch.testing.assert_close(compiled(x, weight), call(x, weight))
    assert all(geometry.images is not None for geometry in asked)


def by_images(geometry):
    """A rule that tells known sizes from open ones."""
    return "bn_act" if geometry.images is None else "moment"


def noting(levels, compiler="eager"):
    """A compiler that lists the levels in each graph that it gets, those of a checkpoint's graph inside among them."""
    compile_graph = torch._dynamo.lookup_backend(compiler)

    def backend(graph, inputs):
        nodes = [node for module in graph.modules() if isinstance(module, torch.fx.GraphModule) for node in module.graph.nodes]
        levels.append("/".join(node.args[7] for node in nodes if "block_forward" in str(node.target)))
        return compile_graph(graph, inputs)

    return backend


@pytest.mark.parametrize("kind", ["bottleneck", pytest.param("pooled", marks=pytest.mark.slow)])
def test_a_graph_for_fixed_sizes_has_their_level_and_one_for_open_ones_the_blocks_own(dynamo, rule, kind):
    rule(by_images)
    block, levels = make(kind), []
    peer = eager(block)
    compiled = torch.compile(block, backend=noting(levels), fullgraph=True)
    for n in (2, 2, 3, 2, 5, 2, 4):
        x = image(block, n)
        assert_same(step(block, x, call=compiled), step(peer, x))
    assert levels == ["moment", "bn_act"]
    assert [levels_of(compiled, image(block, n)) for n in (2, 3, 9)] == [["moment"], ["bn_act"], ["bn_act"]]


@pytest.mark.slow
def test_every_size_has_its_level_where_no_size_is_left_open(dynamo, rule):
    rule(lambda geometry: ("bn_act", "epilogue", "prologue", "moment")[geometry.images[0] % 4])
    block, levels = make("bottleneck"), []
    compiled = torch.compile(block, backend=noting(levels), fullgraph=True, dynamic=False)
    for n in (2, 5, 3, 2):
        compiled(image(block, n))
    assert levels == ["prologue", "epilogue", "moment"]
    assert [levels_of(compiled, image(block, n)) for n in (2, 3, 4)] == [["prologue"], ["moment"], ["bn_act"]]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("where", "compiler", "sizes"),
    [
        ("around", "eager", ((2, 7), (3, 9))),
        *(
            pytest.param(where, "aot_eager", sizes, marks=pytest.mark.slow if sizes == ((2, 7), (3, 9)) else pytest.mark.long)
            for where in ("around", "inside")
            for sizes in (((2, 7), (3, 7)), ((2, 7), (2, 9)), ((2, 7), (3, 9)))
        ),
    ],
)
def test_a_compiled_recompute_runs_at_the_level_of_its_forward(dynamo, rule, where, compiler, sizes, use_reentrant):
    """Two sizes in flight: when the first is recomputed there is a graph that would hold for both.

    The checkpoint is around what is compiled, or inside.
    """
    rule(by_images)
    block, levels = make("bottleneck"), []
    peer = eager(block)

    def compiled(function):
        return torch.compile(function, backend=noting(levels, compiler), fullgraph=True)

    def checkpointed(function):
        return functools.partial(checkpoint, function, use_reentrant=use_reentrant)

    call = compiled(checkpointed(block)) if where == "inside" else checkpointed(compiled(block))
    images = [image(block, *size).requires_grad_() for size in (*sizes, sizes[0])]
    sum(call(x).square().sum() for x in images).backward()
    gradients = [x.grad for x in images] + [p.grad for p in block.parameters()]
    images = [x.detach().requires_grad_() for x in images]
    sum(peer(x).square().sum() for x in images).backward()
    expected = [x.grad for x in images] + [p.grad for p in peer.parameters()]
    assert_same(dict(enumerate(gradients)), dict(enumerate(expected)))
    # Without gradients, as reentrant checkpoints run their forward, blocks have graphs of their own.
    assert sorted(levels) == sorted(["moment", "bn_act"] * (1 if where == "inside" or not use_reentrant else 2))


def levels_in(program):
    return [node.args[8] for node in program.graph.nodes if "fused_res.block" in str(node.target)]


@pytest.mark.parametrize("strict", [True, False])
def test_programs_exported_for_fixed_sizes_carry_their_level(strict, rule):
    rule(by_images)
    block = make("bottleneck").eval()
    program = torch.export.export(block, (image(block),), strict=strict)
    assert levels_in(program) == ["moment"]


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_carry_the_rules_level(strict, rule):
    asked = rule("moment")
    block = make("bottleneck").eval()
    x = image(block)
    sizes = {0: torch.export.Dim("n", min=2), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    program = torch.export.export(block, (x,), dynamic_shapes=(sizes,), strict=strict)
    assert levels_in(program) == ["moment"]
    assert [geometry.images for geometry in asked] == [None]
    other = image(block, 5, 9)
    torch.testing.assert_close(program.module()(other), eager(block)(other))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_are_planned_for_without_their_device(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight, gamma = torch.empty(4, 4, 1, 1, device=device), torch.empty(4, device=device)
        out = residual_block(torch.empty(2, 4, 5, 5, device=device), [ConvBN(weight, gamma=gamma, beta=gamma)])
    assert out.shape == (2, 4, 5, 5)
    assert out.device.type == device


def test_symbolic_sizes_outside_of_a_compiler_are_not_fixed(rule):
    from torch.fx.experimental.proxy_tensor import make_fx

    asked = rule("moment")
    block = make("bottleneck").eval()
    graph = make_fx(block, tracing_mode="symbolic", _allow_non_fake_inputs=True)(image(block))
    levels = [node.args[7] for node in graph.graph.nodes if "block_forward" in str(node.target)]
    assert levels == ["moment"]
    assert [geometry.images for geometry in asked] == [None]
    other = image(block, 5, 9)
    torch.testing.assert_close(graph(other), eager(block)(other))
