"""Hooks, parametrizations and foreign layers: the child modules run, with one warning and a reason."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_res
from blocks import Eager, assert_same, eager, image, make, step
from fused_res import use_backend


class Twice(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class FrozenNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1))

    def forward(self, x):
        return x * self.scale


def _hook(register):
    def change(block, seen):
        getattr(block.conv2, register)(lambda *args: seen.append(register))

    return change


def _override(block, seen):
    original = block.conv2.forward

    def forward(x):
        seen.append("forward")
        return original(x) * 2

    block.conv2.forward = forward


def _instead(child, name, function):
    """Replaces an attribute of a child with what `function` makes of what is there."""

    def change(block, seen):
        module = getattr(block, child)
        module.__dict__[name] = function(getattr(module, name))

    return change


def _halved(function):
    return lambda *args: function(*args) * 0.5


class Rounded(nn.Parameter):
    """Acts in convolutions, as quantisation-aware training does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func in (F.conv2d, torch.conv2d):
                args = (args[0], args[1].round(decimals=1), *args[2:])
            return func(*args, **(kwargs or {}))


class Dispatched(torch.Tensor):
    """Acts below autograd."""

    @staticmethod
    def __new__(cls, elem):
        return torch.Tensor._make_wrapper_subclass(cls, elem.shape, dtype=elem.dtype, strides=elem.stride())

    def __init__(self, elem):
        self.elem = elem

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        values = torch.utils._pytree.tree_map(lambda t: t.elem * 0.5 if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*values[0], **values[1])


def _weight(kind):
    def change(block, seen):
        block.conv2.weight = kind(block.conv2.weight.detach().clone())

    return change


def _scaling_hook(block, seen):
    block.conv2.register_forward_hook(lambda module, args, out: seen.append("out") or out * 3)


def _parametrize(name, tensor_name, function):
    return lambda block, seen: function(getattr(block, name), tensor_name)


def _prune(module, name):
    from torch.nn.utils import prune

    prune.l1_unstructured(module, name, amount=0.5)


def _old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)


def _replace(name, new):
    return lambda block, seen: setattr(block, name, new(block).double())


CHANGES = {
    "forward pre-hook": (_hook("register_forward_pre_hook"), "conv2 has a forward pre-hook"),
    "forward hook": (_hook("register_forward_hook"), "conv2 has a forward hook"),
    "hook that changes the output": (_scaling_hook, "conv2 has a forward hook"),
    "full backward hook": (_hook("register_full_backward_hook"), "conv2 has a backward hook"),
    "full backward pre-hook": (_hook("register_full_backward_pre_hook"), "conv2 has a backward pre-hook"),
    "overridden forward": (_override, "conv2.forward is overridden"),
    "instance _conv_forward": (_instead("conv1", "_conv_forward", _halved), "conv1._conv_forward is overridden"),
    "instance _check_input_dim": (_instead("bn1", "_check_input_dim", lambda f: f), "bn1._check_input_dim is overridden"),
    "instance _call_impl": (_instead("conv1", "_call_impl", _halved), "conv1._call_impl is overridden"),
    "instance weight": (_instead("conv1", "weight", lambda w: w.detach() * 0.5), "conv1.weight is overridden"),
    "instance running_mean": (_instead("bn1", "running_mean", lambda m: m + 1), "bn1.running_mean is overridden"),
    "instance relu": (_instead("relu", "forward", _halved), "relu.forward is overridden"),
    "child compiled by itself": (lambda block, seen: block.conv2.compile(backend="eager"), "conv2 is compiled by itself"),
    "parameter that acts": (_weight(Rounded), "conv2.weight is a Rounded, a tensor that acts for itself"),
    "weight_norm": (_parametrize("conv1", "weight", nn.utils.parametrizations.weight_norm), "conv1 is a ParametrizedConv2d"),
    "spectral_norm": (_parametrize("conv1", "weight", nn.utils.parametrizations.spectral_norm), "conv1 is a ParametrizedConv2d"),
    "old weight_norm": (_parametrize("conv1", "weight", _old_weight_norm), "conv1 has a forward pre-hook"),
    "prune": (_parametrize("conv2", "weight", _prune), "conv2 has a forward pre-hook"),
    "pruned gamma": (_parametrize("bn1", "weight", _prune), "bn1 has a forward pre-hook"),
    "SyncBatchNorm": (_replace("bn2", lambda b: nn.SyncBatchNorm(8)), "bn2 is a SyncBatchNorm"),
    "frozen norm": (_replace("bn1", lambda b: FrozenNorm(8)), "bn1 is a FrozenNorm"),
    "subclassed norm": (_replace("bn1", lambda b: Twice(8)), "bn1 is a Twice"),
    "group norm": (_replace("bn2", lambda b: nn.GroupNorm(2, 8)), "bn2 is a GroupNorm"),
    "instance norm": (_replace("bn2", lambda b: nn.InstanceNorm2d(8)), "bn2 is a InstanceNorm2d"),
    "identity for a norm": (_replace("bn1", lambda b: nn.Identity()), "bn1 is a Identity"),
    "GELU": (_replace("relu", lambda b: nn.GELU()), "relu is a GELU"),
    "ReLU6": (_replace("relu", lambda b: nn.ReLU6()), "relu is a ReLU6"),
    "reflecting convolution": (
        _replace("conv2", lambda b: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        "conv2 has padding_mode='reflect'",
    ),
    "circular convolution": (
        _replace("conv2", lambda b: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))),
        "conv2 is a Sequential",
    ),
    "uneven padding": (_replace("conv2", lambda b: nn.Conv2d(8, 8, 2, padding="same")), "conv2 pads unevenly"),
}


def changed(name):
    """The block with a change applied, and the list that its hooks write to."""
    block, seen = make("projection"), []
    torch.manual_seed(4)
    CHANGES[name][0](block, seen)
    return block, seen


@pytest.mark.parametrize("name", CHANGES)
def test_a_foreign_or_observed_child_runs_itself_with_one_warning_and_a_reason(name):
    reason = CHANGES[name][1]
    block, seen = changed(name)
    twin, seen_by_hand = changed(name)
    x = image(block)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_same(step(block, x), step(Eager(twin), x))
    assert seen == seen_by_hand
    assert bool(seen) == ("hook" in name or "overridden" in name)
    ours = [str(w.message) for w in caught if "fused_res" in str(w.message)]
    assert len(ours) == 1
    assert reason in ours[0]
    row = fused_res.explain(block, x).rows[0]
    assert row.backend == "eager"
    assert reason in row.reason
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(RuntimeError) as error:
            block(x)
        assert reason in str(error.value)
        assert backend in str(error.value)
    with use_backend("eager"):
        torch.testing.assert_close(block(x), twin_output(twin, x), rtol=1e-10, atol=1e-12)


def twin_output(twin, x):
    return Eager(twin)(x)


def test_removing_the_hook_returns_to_the_operator():
    block = make("identity")
    x = image(block)
    handle = block.bn1.register_forward_hook(lambda *args: None)
    assert block.unfused_reason(x) == "bn1 has a forward hook"
    handle.remove()
    assert block.unfused_reason(x) is None


def test_even_same_padding_runs_in_the_operator():
    block = make("projection")
    block.conv2 = nn.Conv2d(8, 8, 3, padding="same", dilation=2).double()
    peer, x = eager(block), image(block)
    assert block.unfused_reason(x) is None
    got, expected = step(block, x), step(peer, x)
    expected["dconv2.bias"] = torch.zeros_like(expected["dconv2.bias"])
    assert_same(got, expected)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("child", ["downsample", "downsample.0", "downsample.1"])
def test_a_hook_on_the_shortcut_is_called_and_the_main_branch_stays_fused(child, register):
    block, seen = make("projection"), []
    peer, x = eager(block), image(block)
    getattr(block.get_submodule(child), register)(lambda *args: seen.append(1))
    assert block.unfused_reason(x) is None
    assert_same(step(block, x), step(peer, x))
    assert seen == [1]
    row = fused_res.explain(block, x).rows[0]
    assert row.shortcut == "as it is"
    assert row.backend != "eager"
    assert row.reason.startswith(f"{child} has a ")


def test_a_shortcut_hook_that_changes_the_output_has_its_effect():
    block = make("projection")
    block.downsample[1].register_forward_hook(lambda module, args, out: out * 3)
    peer, x = eager(block), image(block)
    assert_same(step(block, x), step(peer, x))


@pytest.mark.parametrize(
    "register", ["register_module_forward_hook", "register_module_forward_pre_hook", "register_module_full_backward_hook"]
)
def test_a_global_module_hook_sees_every_child(register):
    block = make("projection")
    block.relu.inplace = False  # under backward hooks an in-place ReLU is an error, in eager too
    peer, x, seen = eager(block), image(block), []
    handle = getattr(torch.nn.modules.module, register)(lambda module, *args: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="a global module hook is registered"):
            got = step(block, x)
        called = {id(m) for m in seen}
        seen.clear()
    finally:
        handle.remove()
    assert_same(got, step(peer, x))
    assert called == {id(m) for m in block.modules()}
    assert block.unfused_reason(x) is None
    assert not seen


def test_hooks_on_the_block_itself_are_called_and_leave_it_fused():
    block, seen = make("identity"), []
    peer, x = eager(block), image(block)
    block.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    block.register_forward_hook(lambda module, args, out: seen.append("post") or out * 2)
    block.register_full_backward_hook(lambda module, dx, dout: seen.append("backward"))
    assert block.unfused_reason(x) is None
    assert_same(step(block, x), step(peer, x, call=lambda t: peer(t) * 2))
    assert seen == ["pre", "post", "backward"]


def test_hooks_on_parameters_are_called():
    block, seen = make("identity"), []
    x = image(block)
    block.conv1.weight.register_hook(lambda g: seen.append("grad") or g * 2)
    block.conv1.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    expected = step(eager(make("identity")), x)["dconv1.weight"] * 2
    torch.testing.assert_close(step(block, x)["dconv1.weight"], expected)
    assert seen == ["grad", "accumulated"]


def test_a_plain_weight_that_is_not_registered_stays_fused_and_one_that_acts_does_not():
    block = make("identity")
    peer, x = eager(block), image(block)
    weight = block.conv1.weight.detach().clone()
    for module in (block, peer):
        del module.conv1.weight
        module.conv1.weight = weight
    assert block.unfused_reason(x) is None
    torch.testing.assert_close(block(x), peer(x), rtol=1e-10, atol=1e-12)
    block.conv1.weight = Rounded(weight)
    del block.conv1._parameters["weight"]
    block.conv1.__dict__["weight"] = Rounded(weight)
    assert block.unfused_reason(x) == "conv1.weight is a Rounded, a tensor that acts for itself"


def test_a_buffer_that_acts_below_autograd_is_not_passed_by():
    block = make("identity").eval()
    block.bn1._buffers["running_mean"] = Dispatched(block.bn1.running_mean)
    x = image(block)
    assert block.unfused_reason(x) == "bn1.running_mean is a Dispatched, a tensor that acts for itself"


def test_a_residual_scale_that_acts_is_not_passed_by():
    block = make("bottleneck")
    block.residual_scale = Rounded(block.residual_scale.detach())
    assert block.unfused_reason(image(block)) == "residual_scale is a Rounded, a tensor that acts for itself"


class Halves(torch.Tensor):
    """An input that halves what convolutions make of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 0.5 if func is F.conv2d else out


class Named(torch.Tensor):
    """A subclass that does nothing."""


def test_an_input_that_acts_has_its_effect_and_one_that_does_not_stays_fused():
    block = make("projection").eval()
    peer, x = eager(block), image(block)
    with pytest.warns(UserWarning, match="x is a Halves, a tensor that acts for itself"):
        got = block(x.as_subclass(Halves))
    expected = peer(x.as_subclass(Halves))
    assert type(got) is type(expected) is Halves
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=1e-10, atol=1e-12)
    named = x.as_subclass(Named)
    assert block.unfused_reason(named) is None
    assert type(block(named)) is Named
    torch.testing.assert_close(block(named).as_subclass(torch.Tensor), peer(x), rtol=1e-10, atol=1e-12)


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if func is F.conv2d else out


class DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if func is torch.ops.aten.convolution.default else out


@pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
def test_a_mode_of_the_users_sees_the_child_modules(mode):
    block = make("projection")
    peer, x = eager(block), image(block)
    with mode(), pytest.warns(UserWarning, match=f"the mode {mode.__name__} is active"):
        got = step(block, x)
    with mode():
        expected = step(peer, x)
    assert_same(got, expected)


def test_torchs_own_modes_leave_the_block_fused():
    block = make("projection")
    x = image(block)
    with torch.device("cpu"):
        assert block.unfused_reason(x) is None


def test_a_flop_counter_counts_the_convolutions():
    from torch.utils.flop_counter import FlopCounterMode

    block = make("pooled")
    peer, x, counts = eager(block), image(block), []
    for module in (block, peer):
        with FlopCounterMode(display=False) as counter:
            module(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
