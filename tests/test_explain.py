"""`explain`: what it says about the blocks of a model, and that nothing remains of the call."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import same
from torch import nn

from fused_res import BasicBlock, Bottleneck, Explanation, explain, planner, use_backend
from fused_res.planner import LEVELS, resolve


def _shortcut(inputs, outputs, stride, pool=False):
    layers = [nn.AvgPool2d(stride, stride)] if pool else []
    return nn.Sequential(*layers, nn.Conv2d(inputs, outputs, 1, 1 if pool else stride, bias=False), nn.BatchNorm2d(outputs))


class Net(nn.Module):
    """A small ResNet with every kind of shortcut, dropout, and one block that cannot be fused."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2, _shortcut(8, 16, 2)))
        self.layer2 = nn.Sequential(Bottleneck(16, 8, 2, _shortcut(16, 32, 2, pool=True)), nn.Dropout(0.5), Bottleneck(32, 8))
        self.odd = nn.ModuleList(
            (BasicBlock(32, 8, 1, nn.Conv2d(32, 8, 1)), BasicBlock(8, 8, norm_layer=lambda c: nn.GroupNorm(2, c)))
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        for block in self.odd:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr("fused_res.notices._said", set())


pytestmark = pytest.mark.filterwarnings("ignore:fused_res")

X = torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)


def test_rows_follow_the_calls_and_name_shape_dtype_shortcut_and_reason(net):
    rows = explain(net, X).rows
    assert [(r.name, r.block, r.shape, r.shortcut) for r in rows] == [
        ("layer1.0", "BasicBlock", (2, 8, 12, 12), "identity"),
        ("layer1.1", "BasicBlock", (2, 8, 12, 12), "projection"),
        ("layer2.0", "Bottleneck", (2, 16, 6, 6), "pooled projection"),
        ("layer2.2", "Bottleneck", (2, 32, 3, 3), "identity"),
        ("odd.0", "BasicBlock", (2, 32, 3, 3), "as it is"),
        ("odd.1", "BasicBlock", (2, 8, 3, 3), "identity"),
    ]
    assert {r.dtype for r in rows} == {"float32"}
    automatic = resolve("auto", X.device, X.dtype)
    assert all(r.backend == automatic and r.level in LEVELS for r in rows[:5])
    assert [r.reason for r in rows[:4]] == [None] * 4
    assert rows[4].reason == "downsample is a Conv2d, not nn.Sequential"
    assert (rows[5].backend, rows[5].level) == ("eager", None)
    assert rows[5].reason == "bn1 is a GroupNorm, not nn.BatchNorm2d"


@pytest.mark.parametrize("training", [True, False])
def test_modes_buffers_gradients_hooks_and_random_state_are_untouched(net, training):
    net.train(training)
    net.layer1[0].bn1.eval()
    versions = {n: p._version for n, p in net.named_parameters()}
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    state = torch.get_rng_state()
    explain(net, X)
    same(torch.get_rng_state(), state)
    for name, tensor in net.state_dict().items():
        same(tensor, before[name], name)
    assert [m.training for m in net.modules()] == modes
    assert {n: p._version for n, p in net.named_parameters()} == versions
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_a_model_that_raises_is_restored_too(net):
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("inside")

    net.head = Fails()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyError, match="inside"):
        explain(net, X)
    same(torch.get_rng_state(), state)
    for name, tensor in net.state_dict().items():
        same(tensor, before[name])
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_str_is_a_table_with_a_line_for_each_row_and_aligned_columns(net):
    explanation = explain(net, X)
    lines = str(explanation).splitlines()
    assert isinstance(explanation, Explanation)
    assert len(lines) == 1 + len(explanation.rows)
    for word in ("block", "class", "input", "dtype", "backend", "level", "convolutions", "shortcut", "why"):
        column = lines[0].index(word)
        assert all(line[column - 2 : column].strip() == "" for line in lines if column)
    assert all(row.name in line and row.backend in line for row, line in zip(explanation.rows, lines[1:], strict=True))
    assert "2x8x12x12" in lines[1]
    assert lines[-1].endswith("bn1 is a GroupNorm, not nn.BatchNorm2d")


def test_dicts_hold_what_the_rows_hold(net):
    explanation = explain(net, X)
    for found, row in zip(explanation.to_dicts(), explanation.rows, strict=True):
        assert found == vars(row) | {"convolutions": tuple(vars(c) for c in row.convolutions)}
    assert all(row.units and row.convolutions for row in explanation.rows if row.level is not None)


def test_a_block_by_itself_is_one_row_and_called_self_in_the_table():
    explanation = explain(BasicBlock(4, 4), torch.randn(2, 4, 5, 5))
    assert [row.name for row in explanation.rows] == [""]
    assert str(explanation).splitlines()[1].startswith("(self)")


def test_a_model_without_blocks_gives_a_table_without_rows():
    assert len(str(explain(nn.Conv2d(3, 4, 1), X)).splitlines()) == 1


def test_a_block_called_twice_has_two_rows():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BasicBlock(3, 3)

        def forward(self, x):
            return self.block(self.block(x)[:, :, ::2])

    assert [(r.name, r.shape) for r in explain(Twice(), X).rows] == [("block", (2, 3, 12, 12)), ("block", (2, 3, 6, 12))]


def test_under_autocast_the_dtype_is_autocasts(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {row.dtype for row in explain(net, X).rows} == {"bfloat16"}
    assert {row.dtype for row in explain(net.double(), X.double()).rows} == {"float64"}


def test_use_backend_is_obeyed(net):
    with use_backend("eager"):
        rows = explain(net, X).rows
    assert {(r.backend, r.level, r.reason) for r in rows} == {("eager", None, 'use_backend("eager")')}
    with use_backend("reference", level="bn_act"):
        rows = explain(net.layer1, torch.randn(2, 8, 6, 6)).rows
    assert {(r.backend, r.level) for r in rows} == {("reference", "bn_act")}
    with use_backend("reference"), pytest.raises(RuntimeError, match="'reference' cannot run this block: bn1 is a GroupNorm"):
        explain(net, X)


def test_an_empty_batch_is_a_reason():
    row = explain(BasicBlock(3, 3), X[:0]).rows[0]
    assert (row.backend, row.reason) == ("eager", "the batch is empty")


def test_explaining_does_not_change_a_later_run(net):
    x = X.clone().requires_grad_()
    twin = copy.deepcopy(net)
    explain(net, X)
    results = []
    for module in (net, twin):
        torch.manual_seed(5)
        out = module(x)
        results.append((out, *torch.autograd.grad(out.sum(), [x, *module.parameters()]), *module.buffers()))
    for a, b in zip(*results, strict=True):
        same(a, b)


def test_inference_mode_is_fine(net):
    with torch.inference_mode():
        assert len(explain(net, X).rows) == 6


@pytest.mark.parametrize(("how", "training"), [("wrapped", True), ("in place", True), ("a child", True), ("wrapped", False)])
def test_a_compiled_model_has_the_rows_of_its_blocks_and_is_not_compiled_again(dynamo, how, training):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 8)).train(training)
    expected = [(row.name, row.shape, row.backend) for row in explain(net, X).rows]
    if how == "wrapped":
        net = torch.compile(net, backend="aot_eager")
    elif how == "in place":
        net.compile(backend="aot_eager")
    else:
        net[1] = torch.compile(net[1], backend="aot_eager")
    with torch.set_grad_enabled(training):
        net(X)
        assert [(row.name, row.shape, row.backend) for row in explain(net, X).rows] == expected
        with dynamo.config.patch(error_on_recompile=True):
            net(X)


def test_a_compiled_block_is_explained_as_its_graph_runs_it(dynamo, monkeypatch):
    seen = []
    original = planner.plan
    monkeypatch.setattr(planner, "plan", lambda *args, **options: seen.append(options) or original(*args, **options))
    block = BasicBlock(3, 3)
    explain(nn.Sequential(torch.compile(block, backend="aot_eager"), BasicBlock(3, 3)), X)
    assert {options.get("compiled") for options in seen} >= {False, True}


class Detector(nn.Module):
    """Takes lists of images, and calls its block by keyword."""

    def __init__(self):
        super().__init__()
        self.block = BasicBlock(3, 3)

    def forward(self, images, scale=1.0):
        return [self.block(x=image[None] * scale) for image in images]


def test_lists_keywords_and_several_inputs_reach_the_model():
    images = [torch.randn(3, 5, 5), torch.randn(3, 6, 7)]
    shapes = [(1, 3, 5, 5), (1, 3, 6, 7)]
    for explanation in (
        explain(Detector(), images),
        explain(Detector(), images=images),
        explain(Detector(), images, 2.0),
        explain(Detector(), images, scale=2.0),
    ):
        assert [(row.name, row.shape) for row in explanation.rows] == [("block", shape) for shape in shapes]


class Waiting(nn.Module):
    """A block that says when it runs, and then waits."""

    def __init__(self, runs, goes_on):
        super().__init__()
        self.block, self.runs, self.goes_on = BasicBlock(8, 8), runs, goes_on

    def forward(self, x):
        self.runs.set()
        assert self.goes_on.wait(60)
        return self.block(x)


def test_asked_by_threads_that_leave_in_the_order_they_came_compiled_code_is_compiled_afterwards(dynamo):
    first, second, left = threading.Event(), threading.Event(), threading.Event()
    x = torch.randn(2, 8, 5, 5)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(explain, Waiting(first, second), x)
        assert first.wait(60)
        other = pool.submit(explain, Waiting(second, left), x)
        assert len(one.result().rows) == 1
        left.set()
        assert len(other.result().rows) == 1
    graphs = []
    torch.compile(BasicBlock(8, 8).eval(), backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(x)
    assert len(graphs) == 1
