"""Calls that look like an earlier one: they go the same way at once, and those that differ in anything that matters do not."""

import copy
import gc
import weakref

import pytest
import torch
from compare import all_same
from torch import nn

from blocks import BLOCKS, eager, image, make, step
from fused_res import BasicBlock, again, plans, standing, use_backend
from fused_res.block import program
from fused_res.call import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def looked_up(monkeypatch):
    """Counts the calls that were prepared, and the programs that were looked up."""
    counts = {"calls": 0, "programs": 0}
    run = program.run

    def counting(key, function):
        def counted(*arguments, **options):
            counts[key] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr("fused_res.functional.prepare", counting("calls", prepare))
    monkeypatch.setattr(program, "run", counting("programs", run))
    return counts


def seen(block):
    return standing.last(block).seen


def warm(block, x, times=3):
    for _ in range(times):
        step(block, x)


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "as it is"])
def test_steps_alike_look_nothing_up_and_have_every_bit(kind, looked_up):
    block, x = make(kind, torch.float32), image(make(kind), dtype=torch.float32)
    state = copy.deepcopy(block.state_dict())
    first = step(block, x)
    warm(block, x, 2)
    before = dict(looked_up)
    block.load_state_dict(state)
    found = step(block, x)
    assert looked_up == before
    all_same([value for value in found.values() if value is not None], [value for value in first.values() if value is not None])


def test_evaluation_and_forward_alike_are_not_prepared_again(looked_up):
    block = make("bottleneck", torch.float32)
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        for training in (True, False):
            block.train(training)
            for _ in range(3):
                block(x)
    assert looked_up["calls"] == 2


def in_channels_last(parameter):
    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def doubled(convolution):
    convolution.weight = nn.Parameter(convolution.weight.detach() * 2)


def same_image(x):
    return x


def as_it_is(block):
    pass


CHANGES = {
    "sizes": (as_it_is, lambda x: x[:, :, 1:]),
    "batch": (as_it_is, lambda x: x[:1]),
    "layout": (as_it_is, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "strides": (as_it_is, lambda x: x.transpose(2, 3)),
    "dtypes": (lambda block: block.double(), torch.Tensor.double),
    "a weight's layout": (lambda block: in_channels_last(block.conv1.weight), same_image),
    "a weight's values": (lambda block: block.conv1.weight.data.mul_(2), same_image),
    "a parameter that is frozen": (lambda block: block.conv2.weight.requires_grad_(False), same_image),
    "a BN in evaluation": (lambda block: block.bn1.eval(), same_image),
    "a momentum": (lambda block: setattr(block.bn1, "momentum", 0.7), same_image),
    "an eps": (lambda block: setattr(block.bn2, "eps", 0.1), same_image),
    "another parameter": (lambda block: doubled(block.conv1), same_image),
    "other statistics": (lambda block: setattr(block.bn1, "running_mean", torch.ones(4)), same_image),
    "statistics with steps between them": (lambda block: setattr(block.bn1.running_mean, "data", torch.ones(8)[::2]), same_image),
    "a shared weight": (lambda block: setattr(block.conv2, "weight", block.conv1.weight), same_image),
    "shared statistics": (lambda block: setattr(block.bn2, "running_mean", block.bn1.running_mean), same_image),
}
"""What is done to a block, and to an image."""


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_calls_is_followed(name):
    torch.manual_seed(0)
    block, x = BasicBlock(4, 4), torch.randn(2, 4, 6, 5)
    peer, (of_block, of_image) = copy.deepcopy(block), CHANGES[name]

    def compare(x):
        got = step(block, x)
        with use_backend("eager"):
            expected = step(peer, x)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert (value is None) == (got[key] is None), key
            if value is not None:
                torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
        for key, value in peer.named_buffers():
            torch.testing.assert_close(block.get_buffer(key), value, rtol=1e-4, atol=1e-5)

    for _ in range(3):
        compare(x)
    of_block(block)
    of_block(peer)
    for _ in range(3):
        compare(of_image(x))


def double_autocast(block, x):
    with torch.autocast("cpu", torch.bfloat16):
        return block(x).dtype


def test_modes_and_switches_are_other_calls(monkeypatch):
    block, x = make("bottleneck", torch.float32), image(make("bottleneck"), dtype=torch.float32)
    warm(block, x)
    assert double_autocast(block, x) == torch.bfloat16
    with torch.no_grad():
        assert block(x).grad_fn is None
    assert block(x).grad_fn is not None
    with torch.inference_mode():
        assert block(x).is_inference()
    with use_backend("reference", "epilogue"):
        block(x)
    assert len(seen(block)) == again._MOST
    assert [a.call.backend for a in seen(block)][-1] == "reference"
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "nobody")
    with pytest.raises(ValueError, match="FUSED_RES_CONVOLUTIONS"):
        block(x)


def test_settling_anew_settles_calls_anew(looked_up):
    block, x = make("identity", torch.float32), image(make("identity"), dtype=torch.float32)
    warm(block, x)
    before = dict(looked_up)
    plans.forget()
    step(block, x)
    assert looked_up == {"calls": before["calls"] + 1, "programs": before["programs"] + 2}
    with plans.afresh():
        step(block, x)
        assert looked_up["calls"] == before["calls"] + 2
    warm(block, x, 2)
    assert looked_up["calls"] == before["calls"] + 2


def test_modes_of_torch_see_the_operator():
    block, x = make("identity", torch.float32), image(make("identity"), dtype=torch.float32)
    warm(block, x)
    calls = []

    class Listening(torch.utils._python_dispatch.TorchDispatchMode):
        __module__ = "torch.listening"  # of torch's own modes the operator is called under

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.name())
            return function(*args, **kwargs or {})

    with Listening():
        block(x).sum().backward()
    assert {"fused_res::block_forward", "fused_res::block_backward"} <= set(calls)


@pytest.mark.parametrize("wanted", ["x", "conv1.weight", "bn2.bias", "all but x"])
def test_each_set_of_wanted_gradients_has_a_way_back(wanted):
    block = make("projection")
    x = image(block).requires_grad_(wanted != "all but x")
    peer = eager(copy.deepcopy(block))
    for model in (block, peer):
        model.found = []
        for i in range(4):
            out = model(x)
            inputs = [x] if wanted == "x" else [p for name, p in model.named_parameters() if wanted in (name, "all but x")]
            dout = torch.ones_like(out) if i % 2 else torch.ones_like(out).transpose(2, 3).contiguous().transpose(2, 3)
            model.found.append(torch.autograd.grad(out, inputs, dout))
    for got, expected in zip(block.found, peer.found, strict=True):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_a_retained_graph_a_second_derivative_and_autocast_around_the_backward():
    block = make("identity")
    x, peer = image(block).requires_grad_(), eager(make("identity"))
    peer.load_state_dict(block.state_dict())
    warm(block, x.detach())
    warm(peer, x.detach())
    found = []
    for model in (block, peer):
        out = model(x)
        first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
        with torch.autocast("cpu", torch.bfloat16):
            second = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
        third = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
        found.append((first, second, third, torch.autograd.grad(third.square().sum(), x)[0]))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_a_weight_written_between_forward_and_backward_is_an_error():
    block, x = make("identity", torch.float32), image(make("identity"), dtype=torch.float32)
    warm(block, x)
    out = block(x)
    with torch.no_grad():
        block.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_buffers_have_moved_for_everyone_to_see():
    block, x = make("identity", torch.float32), image(make("identity"), dtype=torch.float32)
    warm(block, x)
    versions = [b._version for b in block.buffers()]
    block(x)
    assert all(b._version > version for b, version in zip(block.buffers(), versions, strict=True))


def test_nothing_of_a_call_is_held_and_few_calls_are_kept():
    block = make("identity", torch.float32)
    for size in range(3, 12):
        warm(block, image(block, size=size, dtype=torch.float32))
        assert len(seen(block)) <= again._MOST
    x = image(block, size=11, dtype=torch.float32)
    out = block(x)
    held = [weakref.ref(tensor) for tensor in (x, out)]
    del x, out
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_a_shortcut_that_runs_by_itself_is_asked_at_every_call():
    torch.manual_seed(0)
    block = BasicBlock(4, 4, downsample=nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)))
    peer, x = copy.deepcopy(block), torch.randn(2, 4, 6, 5)
    for _ in range(3):
        got = step(block, x)
        with use_backend("eager"):
            expected = step(peer, x)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)
