"""Blocks as modules: copied, pickled, checkpointed, called functionally, converted and under autocast."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from blocks import assert_same, eager, every_block, image, make, step, weights


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_runs_alone_and_alike(copied):
    block = make("pooled")
    x = image(block)
    step(block, x)
    twin = copied(block)
    before = copy.deepcopy(twin.state_dict())
    expected = step(block, x)
    assert_same(twin.state_dict(), before, rtol=0, atol=0)
    assert_same(step(twin, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_block
def test_activation_checkpointing_gives_eagers_gradients_and_counts_the_batch_no_more_often(kind, use_reentrant):
    block = make(kind)
    peer, x = eager(block), image(block)
    expected = step(peer, x, call=lambda t: checkpoint(peer, t, use_reentrant=use_reentrant))
    got = step(block, x, call=lambda t: checkpoint(block, t, use_reentrant=use_reentrant))
    # Without reentry the recomputation stops once everything is saved again, which for the last block in a checkpoint is before
    # its buffers are updated a second time; eager's have been by then.
    assert peer.bn1.num_batches_tracked == 2
    assert block.bn1.num_batches_tracked == (2 if use_reentrant else 1)
    if not use_reentrant:
        once = eager(make(kind))
        once(x)
        expected |= dict(once.named_buffers())
    assert_same(got, expected)


def test_functional_call_uses_the_tensors_given():
    block = make("pooled")
    peer, x = eager(block), image(block)
    torch.manual_seed(2)
    values = {n: torch.rand_like(t) + 0.1 if t.is_floating_point() else t.clone() for n, t in block.state_dict().items()}
    before, results = copy.deepcopy(block.state_dict()), []
    for module in (block, peer):
        given = {n: v.clone().requires_grad_(v.is_floating_point() and "running" not in n) for n, v in values.items()}
        out = torch.func.functional_call(module, given, (x,))
        out.backward(weights(out))
        results.append(
            {"out": out.detach()} | {n: v.detach() for n, v in given.items()} | {f"d{n}": v.grad for n, v in given.items()}
        )
    assert_same(*results)
    assert_same(block.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@every_block
def test_without_gradients_output_and_buffers_are_eagers_and_nothing_is_recorded(kind, training, context):
    block = make(kind).train(training)
    peer, x = eager(block), image(block)
    with context():
        out = block(x)
        torch.testing.assert_close(out, peer(x), rtol=1e-10, atol=1e-12)
    assert not out.requires_grad
    assert out.is_inference() == (context is torch.inference_mode)
    assert_same(block.state_dict(), peer.state_dict())


@pytest.mark.parametrize("training", [True, False])
@every_block
def test_autocast_computes_in_bfloat16_and_returns_float32_gradients(kind, training):
    block = make(kind, torch.float32).train(training)
    peer, x = eager(block), image(block).float()

    def under_autocast(module):
        def call(t):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return module(t)

        return step(module, x, call=call)

    got, expected = under_autocast(block), under_autocast(peer)
    assert got["out"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
    # Gradients are held against float64 in test_accuracy.py, where a ReLU sign that rounding flips can be told from an error.
    torch.testing.assert_close(got["out"], expected["out"], rtol=0.02, atol=0.06)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 8e-3), (torch.bfloat16, 6e-2), (torch.float64, 1e-12)], ids=str)
@every_block
def test_a_converted_module_keeps_to_its_dtype(kind, dtype, atol):
    block = make(kind, torch.float32).to(dtype)
    peer, x = eager(block), image(block).to(dtype)
    got, expected = step(block, x), step(peer, x)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
    torch.testing.assert_close(got["out"], expected["out"], rtol=atol / 3, atol=atol)
