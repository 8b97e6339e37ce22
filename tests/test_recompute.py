"""A checkpoint's recompute runs as its forward did, whatever has changed around it."""

import contextlib
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blocks import assert_same, eager, image, make, weights
from fused_res import recompute, use_backend

pytestmark = pytest.mark.filterwarnings("ignore:fused_res")


@contextlib.contextmanager
def hooks(model):
    handles = [block.conv2.register_forward_hook(lambda *args: None) for block in model]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def shortcut_hooks(model):
    handles = [block.downsample[1].register_forward_hook(lambda *args: None) for block in model if block.downsample is not None]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def global_hook(model):
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    yield
    handle.remove()


AROUND = {
    "nothing": lambda model: contextlib.nullcontext(),
    "use_backend eager": lambda model: use_backend("eager"),
    "use_backend reference": lambda model: use_backend("reference", "bn_act"),
    "hooks": hooks,
    "hooks on shortcuts": shortcut_hooks,
    "a global hook": global_hook,
    "a FLOP counter": lambda model: FlopCounterMode(display=False),
}


def _model():
    return nn.Sequential(make("projection"), make("identity", seed=1))


def _gradients(model, x, forward, backward, use_reentrant=False):
    x = x.clone().requires_grad_()
    with AROUND[forward](model):
        out = checkpoint(model, x, use_reentrant=use_reentrant)
    with AROUND[backward](model):
        out.backward(weights(out))
    return {"dx": x.grad} | {f"d{name}": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("forward", "backward"), list(itertools.permutations(AROUND, 2)))
def test_what_is_around_forward_or_backward_alone_changes_no_gradient(forward, backward, use_reentrant):
    model = _model()
    peer, x = nn.Sequential(*map(eager, model)), image(model[0])
    expected = _gradients(peer, x, "nothing", "nothing", use_reentrant)
    assert_same(_gradients(model, x, forward, backward, use_reentrant), expected)


def test_a_backward_in_another_thread_recomputes_as_the_forward_ran():
    """As on a GPU, whose backward has a thread of its own, outside of `use_backend`."""
    model = _model()
    x = image(model[0]).requires_grad_()
    with use_backend("eager"):
        out = checkpoint(model, x, use_reentrant=False)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: out.backward(weights(out))).result()
    assert x.grad is not None


def test_two_backwards_recompute_twice_and_nothing_is_kept_behind():
    model = _model()
    x = image(model[0]).requires_grad_()
    with use_backend("eager"):
        out = checkpoint(model, x, use_reentrant=False)
    out.backward(weights(out), retain_graph=True)
    first = x.grad.clone()
    out.backward(weights(out))
    torch.testing.assert_close(x.grad, 2 * first)
    del out
    gc.collect()
    assert not recompute._records


def test_other_hooks_on_saved_tensors_are_none_of_ours():
    block = make("identity")
    x = image(block).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        block(x).sum().backward()
    assert x.grad is not None
    assert not recompute._records
