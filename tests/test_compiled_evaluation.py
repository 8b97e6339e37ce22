"""Compiled and exported blocks in evaluation run on prepared weights, which follow every change as those of blocks called alone."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from changes import CHANGES, tensors
from compare import same
from torch import nn

import fused_res
from blocks import image, make
from fused_res import backends, folds, internals, use_backend
from fused_res.block import evaluation
from fused_res.block.packing import pack

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
pytestmark = [
    pytest.mark.skipif(WHY is not None, reason=str(WHY)),
    pytest.mark.usefixtures("one_thread", "dynamo", "nothing_kept"),
    pytest.mark.filterwarnings("ignore:fused_res"),
]


@pytest.fixture
def nothing_kept():
    """Nothing is kept before or after, so that what is found there is the test's own."""
    gc.collect()
    folds.refresh()
    yield
    folds.refresh()


@pytest.fixture
def prepared(monkeypatch):
    """Counts how often something is prepared."""
    made, prepare = [], evaluation.prepare
    monkeypatch.setattr(evaluation, "prepare", lambda *a: made.append(1) or prepare(*a))
    return made


def served(kind="bottleneck", dtype=torch.float32, **options):
    return make(kind, dtype, **options).eval()


def fresh(block, x):
    """What the block gives by itself where nothing is kept of it."""
    with torch.no_grad():
        return copy.deepcopy(block)(x)


def whole(block, backend="eager", **options):
    return torch.compile(block, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize(
    ("kind", "context"),
    [*((kind, torch.no_grad) for kind in ("identity", "projection", "pooled", "as it is")), ("projection", torch.inference_mode)],
)
def test_a_compiled_block_prepares_once_and_gives_the_blocks_own_output(kind, context, prepared):
    block = served(kind)
    call, x = whole(block, "aot_eager"), image(block, dtype=torch.float32)
    expected = fresh(block, x)
    prepared.clear()
    with context():
        for _ in range(3):
            same(call(x), expected)
    assert len(prepared) == 1
    assert [fold.used for fold in folds._folds.values()] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [pytest.param(False, marks=pytest.mark.long), True])
def test_so_does_inductor(freezing, prepared):
    block = served("projection")
    x = image(block, dtype=torch.float32)
    call, expected = torch.compile(block, fullgraph=True), fresh(block, x)
    prepared.clear()
    # Where it freezes, who asks for nothing has so small a block in torch's own operators.
    with torch.no_grad(), internals.freezing() if freezing else nullcontext(), use_backend("native"):
        for _ in range(3):
            torch.testing.assert_close(call(x), expected)  # where it freezes, in another layout
    assert len(prepared) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_tensor_is_followed(change):
    """Of every third tensor, which are others for the next change; of all, where nothing is compiled, in test_folds.py."""
    block = served("projection")
    call, x = whole(block), image(block, dtype=torch.float32)
    with torch.no_grad():
        for name in list(tensors(block))[CHANGES.index(change) % 3 :: 3]:
            before = call(x)
            assert folds._folds
            try:
                change(block, name, tensors(block)[name])
            except RuntimeError as error:
                if "weakref associated" not in str(error):
                    raise
                pytest.skip("this torch swaps no tensors of a compiled module")
            after = call(x)
            same(after, fresh(block, x), name)
            assert not torch.equal(after, before), f"{name} makes no difference"


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_a_compiled_block_is_trained_and_evaluated_in_turns_without_recompiling(how, dynamo):
    block = served()
    call, x = whole(block), image(block, dtype=torch.float32)
    steps = torch.optim.SGD(block.parameters(), lr=0.1, **{how: True})

    def turn():
        block.train()
        call(x).square().mean().backward()
        steps.step()
        steps.zero_grad()
        block.eval()
        with torch.no_grad():
            same(call(x), fresh(block, x))

    turn()
    with dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            turn()


def test_a_second_batch_size_compiles_once_more_and_others_never(prepared, dynamo):
    block, graphs = served(), []
    call = whole(block, lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for n in (2, 3, 5, 4, 2):
            x = image(block, n, dtype=torch.float32)
            same(call(x), fresh(block, x))
    assert len(graphs) == 2


def test_numbers_of_the_children_are_followed():
    block = served("identity")
    call, x = whole(block), image(block, dtype=torch.float32)
    with torch.no_grad():
        call(x)
        block.bn1.eps = 0.5
        same(call(x), fresh(block, x))


def test_under_autocast_the_modules_own_weights_are_looked_at(prepared):
    block = served()
    call, x = whole(block), image(block, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(block)(x)
        prepared.clear()
        for _ in range(3):
            got = call(x)
            assert got.dtype == torch.bfloat16
            same(got, expected)
    assert len(prepared) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_an_exported_program_prepares_once_and_follows_its_parameters(autocast, prepared):
    block = served("projection")
    x = image(block, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        program = torch.export.export(block, (x,)).module()
        expected = copy.deepcopy(block)(x)
        prepared.clear()
        for _ in range(3):
            same(program(x), expected)
        assert len(prepared) == 1
        for tensor in (*program.parameters(), *program.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(0.5)
        block.load_state_dict(program.state_dict())
        same(program(x), copy.deepcopy(block)(x))


def test_an_exported_program_is_trained_as_before():
    block = served()
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(block, (x,)).module()
    program(x).sum().backward()
    block(x).sum().backward()
    gradients = dict(program.named_parameters())
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)


def test_what_was_prepared_is_let_go_with_the_tensors():
    block = served()
    call, x = whole(block), image(block, dtype=torch.float32)
    with torch.no_grad():
        call(x)
    assert len(folds._folds) == 1
    del call, block
    torch._dynamo.reset()
    gc.collect()
    assert not folds._folds


def test_refresh_lets_go_of_what_compiled_graphs_have_prepared():
    block, other = served("identity"), served("identity")
    call, x = whole(nn.Sequential(block, other)), image(block, dtype=torch.float32)
    with torch.no_grad():
        call(x)
        block.conv1.weight.data.mul_(0.5)
        fused_res.refresh(block)
        assert len(folds._folds) == 1
        same(call(x), other(fresh(block, x)))


def test_tensors_that_are_others_at_every_call_are_not_prepared_for_long(prepared):
    block = served()
    x = image(block, dtype=torch.float32)
    call = whole(lambda state: torch.func.functional_call(block, state, (x,)))
    with torch.no_grad():
        states = [{n: t.clone() for n, t in block.state_dict().items()} for _ in range(6)]
        results = []
        while states:
            results.append(call(states.pop()))
            gc.collect()
    assert len(prepared) == folds._ENOUGH
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_weights_that_stay_are_prepared_in_the_end_where_others_did_not(prepared, monkeypatch):
    monkeypatch.setattr(folds, "_PATIENCE", 4)
    block, (given, spec, eps) = served(), pack(served().parts())
    x = image(block, dtype=torch.float32)

    def call(tensors):
        return torch.ops.fused_res.block_evaluation(x, None, None, tensors, spec, eps, torch.float32, "epilogue", "auto")

    with torch.no_grad():
        expected = call([t.detach().clone() for t in given])
        for _ in range(3):
            torch.testing.assert_close(call([t.detach().clone() for t in given]), expected)
        assert len(prepared) == folds._ENOUGH
        for _ in range(8):
            torch.testing.assert_close(call(given), expected)
    assert len(prepared) == folds._ENOUGH + 1
    assert not folds._wasted


def test_vectors_may_be_others_at_every_call_and_their_values_are_followed(prepared):
    """Compilers make constants anew whose elements are all alike."""
    block = served("projection")
    x, (given, spec, eps) = image(block, dtype=torch.float32), pack(block.parts())
    prepared.clear()
    with torch.no_grad():
        for _ in range(4):
            vectors = [t.detach().clone() if t.dim() < 2 else t for t in given]
            same(
                torch.ops.fused_res.block_evaluation(x, None, None, vectors, spec, eps, torch.float32, "epilogue", "auto"), block(x)
            )
        assert len(prepared) == 2  # for the operator, and for the block
        for i, vector in enumerate(given):
            if vector.dim() < 2:
                others = [t.detach().clone() if t.dim() < 2 else t for t in given]
                others[i].mul_(0.5)
                got = torch.ops.fused_res.block_evaluation(x, None, None, others, spec, eps, torch.float32, "epilogue", "auto")
                assert not torch.equal(got, block(x))


def test_a_level_that_has_no_prepared_weights_is_kept_under_compile(prepared):
    block = fused_res.fuse(served(), level="bn_act")
    x, names = image(block, dtype=torch.float32), []
    call = whole(block, lambda graph, _: names.extend(str(node.target) for node in graph.graph.nodes) or graph.forward)
    with torch.no_grad():
        call(x)
    assert not prepared
    assert any("block_forward" in name for name in names)
    assert not any("block_evaluation" in name for name in names)


def test_the_operator_is_what_torch_expects_of_one():
    block = served("projection")
    x = image(block, dtype=torch.float32)
    given, spec, eps = pack(block.parts())
    arguments = (x, None, None, [t.detach() for t in given], spec, eps, torch.float32, "epilogue", "auto")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fused_res.block_evaluation.default, arguments, test_utils=checks)


def test_a_graph_without_gradients_says_so_when_it_is_trained():
    block = served("projection")
    given, spec, eps = pack(block.parts())
    x = image(block, dtype=torch.float32)
    out = torch.ops.fused_res.block_evaluation(x, None, None, given, spec, eps, torch.float32, "epilogue", "auto")
    with pytest.raises(RuntimeError, match="block_evaluation kept nothing for backward"):
        out.sum().backward()
