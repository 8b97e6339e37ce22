"""Blocks and whole networks under torch.compile, and blocks under torch.export."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

import fused_res
from blocks import Eager, assert_same, eager, image, make, step
from fused_res import explain, fuse, internals, use_backend
from fused_res.primitives import library


def recorder(graphs):
    """The aot_eager backend, noting for each graph that it gets how many of our operators are in it."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, inputs):
        graphs.append(sum("block_forward" in str(node.target) for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    return backend


@pytest.mark.parametrize("kind", ["projection", "bottleneck", "as it is"])
def test_compiled_in_one_graph_gives_eagers_step_without_recompiling(dynamo, kind):
    block, graphs = make(kind), []
    peer, x = eager(block), image(block)
    compiled = torch.compile(block, backend=recorder(graphs), fullgraph=True)
    assert_same(step(block, x, call=compiled), step(peer, x))
    with dynamo.config.patch(error_on_recompile=True):
        assert_same(step(block, x + 1, call=compiled), step(peer, x + 1))
    assert graphs == [1]


@pytest.mark.parametrize("option", ["track_running_stats", "affine", "momentum"])
def test_compiled_in_one_graph_with_what_a_bn_may_lack(dynamo, option):
    block = make("bottleneck", norm_layer=partial(nn.BatchNorm2d, **{option: None if option == "momentum" else False}))
    peer, x = eager(block), image(block)
    assert_same(step(block, x, call=torch.compile(block, backend="aot_eager", fullgraph=True)), step(peer, x))


def test_compiled_evaluation_gives_eagers_output(dynamo):
    block = make("pooled").eval()
    x = image(block)
    with torch.no_grad():
        got = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(got, eager(block)(x), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_inductor_gives_eagers_step(dynamo):
    block = make("projection", torch.float32)
    peer, x = eager(block), image(block, dtype=torch.float32)
    assert_same(step(block, x, call=torch.compile(block, fullgraph=True)), step(peer, x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def network(torchvision_resnet):
    """torchvision's ResNet with one block in each stage, in float64, and its fused twin."""
    torch.manual_seed(0)
    original = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1], num_classes=7).double()
    return original, fuse(copy.deepcopy(original), strict=True)


def images(n):
    torch.manual_seed(n)
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


COMPILERS = ["eager", pytest.param("aot_eager", marks=pytest.mark.long), pytest.param("inductor", marks=pytest.mark.long)]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_fused_network_trains_in_one_graph_with_a_second_for_other_batches(dynamo, network, compiler):
    original, fused = network
    graphs, compile_graph = [], torch._dynamo.lookup_backend(compiler)
    compiled = torch.compile(fused, backend=lambda *graph: graphs.append(graph) or compile_graph(*graph), fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (original, fused)]
    expected = [1, 1, 2, 2, 2, 2]
    for n, known in zip((4, 4, 6, 5, 4, 7), expected, strict=True):
        losses = []
        for call, optimizer in zip((original, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(call(images(n)), torch.arange(n))
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=0)
        assert len(graphs) == known
    assert_same(dict(fused.state_dict()), dict(original.state_dict()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("freezing", [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.slow)])
def test_a_fused_network_is_evaluated_in_one_graph_with_a_second_for_other_batches(dynamo, network, freezing):
    dtype = torch.float32 if freezing else torch.float64  # in which oneDNN has no convolutions
    original, fused = (model.eval().to(dtype) for model in network)
    compiled = torch.compile(fused, fullgraph=True)

    def compare(n):
        x = images(n).to(dtype)
        rtol, atol = (1e-4, 1e-5) if freezing else (1e-9, 1e-10)
        torch.testing.assert_close(compiled(x), original(x), rtol=rtol, atol=atol)

    with torch.no_grad(), internals.freezing() if freezing else nullcontext():
        for n in (2, 3):
            compare(n)
        with dynamo.config.patch(error_on_recompile=True):
            for n in (3, 2, 5):
                compare(n)


FROZEN = {
    # kind, dtype, width, height and width of images, what has been asked for: whether Inductor has it
    "16 bits": ("identity", torch.bfloat16, 32, 20, None, True),
    "16 bits, asked for": ("identity", torch.bfloat16, 32, 20, "native", False),
    "3x3, many pixels": ("identity", torch.float32, 32, 20, None, False),
    "3x3, few pixels": ("identity", torch.float32, 32, 8, None, True),
    "3x3, few pixels, asked for": ("identity", torch.float32, 32, 8, "native", False),
    "3x3, few channels": ("identity", torch.float32, 16, 20, None, True),
    "strided": ("projection", torch.float32, 32, 40, None, True),
}


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("case", FROZEN)
def test_frozen_graphs_have_torchs_convolutions_where_ours_do_not_pay(dynamo, case, freezing):
    kind, dtype, width, size, asked, inductors = FROZEN[case]
    stride = 2 if kind == "projection" else 1
    shortcut = nn.Sequential(nn.Conv2d(4 * width, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
    block = fused_res.Bottleneck(4 * width, width, stride, None if stride == 1 else shortcut).eval().to(dtype)
    x, graphs = torch.randn(1, 4 * width, size, size).to(dtype), []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    with torch.no_grad(), internals.freezing() if freezing else nullcontext(), use_backend(asked) if asked else nullcontext():
        found = torch.compile(block, backend=keep, fullgraph=True)(x)
        row = explain(torch.compile(block), x).rows[0]
    by_inductor = freezing and inductors and library.fuses(dtype)
    assert any("block_evaluation" in name for name in graphs[0]) == (not by_inductor)
    assert (row.backend, row.level) == (("eager", None) if by_inductor else ("native", "epilogue"))
    rtol, atol = (0.05, 0.1) if dtype == torch.bfloat16 else (1e-4, 1e-4)
    with torch.no_grad():
        torch.testing.assert_close(found.double(), eager(block).double()(x.double()), rtol=rtol, atol=atol)


def test_use_backend_around_a_compiled_block_takes_effect_and_ends(dynamo):
    block, graphs = make("identity"), []
    peer, x = eager(block), image(block)
    compiled = torch.compile(block, backend=recorder(graphs), fullgraph=True)

    def run():
        assert_same(step(block, x, call=compiled), step(peer, x))
        with use_backend("eager"):
            assert_same(step(block, x, call=compiled), step(peer, x))
        assert graphs == [1, 0]
        with dynamo.config.patch(error_on_recompile=True):
            assert_same(step(block, x, call=compiled), step(peer, x))

    # In a thread that has never entered use_backend.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def test_freezing_a_bn_after_compilation_takes_effect(dynamo):
    block = make("identity")
    x = image(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    step(block, x, call=compiled)
    block.bn1.eval()
    peer = eager(block)
    assert_same(step(block, x, call=compiled), step(peer, x))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["pooled", "as it is"])
def test_exported_program_gives_the_blocks_output_and_buffers(kind, training, decomposed):
    block = make(kind).train(training)
    peer, x = eager(block), image(block)
    program = torch.export.export(block, (x,))
    if decomposed:
        program = program.run_decompositions()
        statistics = {n for n, _ in block.named_buffers()} if training else set()
        assert set(program.graph_signature.buffers_to_mutate.values()) == statistics
    module = program.module()
    for k in range(2):
        torch.testing.assert_close(module(x + k), peer(x + k), rtol=1e-10, atol=1e-12)
    assert_same(dict(module.named_buffers()), dict(peer.named_buffers()))


def test_a_method_replaced_before_the_trace_takes_part(dynamo, monkeypatch):
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: forward(self, x) * 0.5)
    block, graphs = make("projection"), []
    peer, x = eager(block), image(block)
    compiled = torch.compile(block, backend=recorder(graphs))
    assert_same(step(block, x, call=compiled), step(peer, x))
    assert sum(graphs) == 0


def test_a_method_set_on_a_child_takes_part(dynamo):
    def halve(block):
        forward = block.conv1._conv_forward
        block.conv1._conv_forward = lambda *args: forward(*args) * 0.5
        return block

    block, graphs = halve(make("projection")), []
    x = image(block)
    expected = step(Eager(halve(make("projection"))), x)
    assert_same(step(block, x, call=torch.compile(block, backend=recorder(graphs))), expected)
    assert sum(graphs) == 0
