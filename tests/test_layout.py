"""Strides and layouts of inputs, gradients and outputs, and that nothing is written to."""

import pytest
import torch
from compare import same
from torch import nn

from blocks import assert_same, eager, every_block, image, make, step, weights

INPUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded over the batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded over channels": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    "expanded scalar": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "cropped": lambda x: nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "permuted batch": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
}


@pytest.mark.parametrize("layout", INPUTS)
@every_block
def test_input_of_any_strides_gives_eagers_step_and_is_not_written(kind, layout):
    block = make(kind)
    peer, x = eager(block), INPUTS[layout](image(block))
    before, version = x.clone(), x._version
    got = step(block, x)
    same(x, before)
    assert x._version == version
    assert_same(got, step(peer, before))


@pytest.mark.parametrize("layout", INPUTS)
@every_block
def test_incoming_gradient_of_any_strides_gives_eagers_gradients_and_is_not_written(kind, layout):
    block = make(kind)
    peer, x = eager(block), image(block)
    with torch.no_grad():
        dout = INPUTS[layout](weights(eager(block)(x)))
    before, version = dout.clone(), dout._version
    got = step(block, x, lambda out: dout)
    same(dout, before)
    assert dout._version == version
    assert_same(got, step(peer, x, lambda out: before))


@pytest.mark.parametrize(
    "use", [torch.Tensor.sum, lambda out: torch.cat((out, out * 2, out.flip(1)), 1)[:, 3:19].square().sum()], ids=["sum", "cat"]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_block
def test_gradients_through_a_sum_or_slices_of_a_concatenation_are_eagers(kind, memory_format, use):
    block = make(kind)
    peer, x = eager(block), image(block).contiguous(memory_format=memory_format)
    one = lambda out: torch.ones((), dtype=out.dtype)  # noqa: E731
    assert_same(step(block, x, one, lambda t: use(block(t))), step(peer, x, one, lambda t: use(peer(t))))


def test_output_shares_no_memory_with_x_and_may_be_written_in_place():
    block = make("identity")
    nn.init.zeros_(block.bn2.weight)
    peer, x = eager(block), image(block).abs()
    for training in (True, False):
        for module in (block, peer):
            module.train(training)
        assert_same(step(block, x, call=lambda t: block(t).mul_(2)), step(peer, x, call=lambda t: peer(t) * 2))


def layout(tensor):
    """Strides, but for dimensions of size 1, where they mean nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "of_weights", [torch.contiguous_format, torch.channels_last], ids=["NCHW weights", "channels_last weights"]
)
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last], ids=["NCHW x", "channels_last x"])
@pytest.mark.parametrize("shape", [{}, {"n": 1}, {"n": 4, "size": 1}], ids=["plain", "one image", "one pixel"])
@pytest.mark.parametrize("kind", ["identity", "projection", "bottleneck"])
def test_output_has_eagers_layout_and_gradients_that_of_their_tensors(kind, shape, of_x, of_weights, training):
    block = make(kind, torch.float32).to(memory_format=of_weights).train(training)
    peer, x = eager(block), image(block, dtype=torch.float32, **shape).contiguous(memory_format=of_x)
    between = x.clone().requires_grad_() * 1
    out = block(between)
    assert layout(out) == layout(peer(between))
    (dx,) = torch.autograd.grad(out, between, weights(out), retain_graph=True)
    assert layout(dx) == layout(x)
    out.backward(weights(out))
    # Exactly, since DistributedDataParallel compares them so.
    assert {n: p.grad.stride() for n, p in block.named_parameters()} == {n: p.stride() for n, p in block.named_parameters()}


@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last], ids=["NCHW x", "channels_last x"])
def test_output_of_one_pixel_has_eagers_strides(of_x):
    block = make("identity")
    peer, x = eager(block), image(block, n=4, size=1).contiguous(memory_format=of_x)
    assert block(x).stride() == peer(x).stride()
