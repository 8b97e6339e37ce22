"""A network in evaluation as one call: every change of its weights and modules is followed."""

import types

import pytest
import torch
from changes import CHANGES, owner_of
from compare import same, within
from serial_networks import (
    AGAIN,
    BasicBlock,
    ResNet,
    combine,
    drawn,
    eager,
    images,
    is_combined,
    marks,
    networks,
    one_by_one,
    served,
    torchvisions,
)
from torch import nn

from fused_res import fuse, refresh, unfuse

pytestmark = marks


TENSORS = [
    "conv1.weight",
    "bn1.weight",
    "bn1.bias",
    "bn1.running_mean",
    "bn1.running_var",
    *[f"layer{i}.0.conv{j}.weight" for i in (1, 2, 3, 4) for j in (1, 2)],
    *[f"layer{i}.0.bn2.{name}" for i in (1, 4) for name in ("weight", "bias", "running_mean", "running_var")],
    "layer2.0.downsample.0.weight",
    *[f"layer3.0.downsample.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")],
]


def _check_change(net, x, runs, change, differs=True, again=False):
    """A change of a network that is one call shows at the next call, and as long as it is called."""
    before = combine(net, x, runs)
    change(net)
    expected = one_by_one(net, x)
    assert torch.equal(expected, before) != differs
    with torch.no_grad():
        for _ in range(AGAIN + 1 if again else 3):
            same(net(x), expected)


@networks
def test_every_tensor_of_stem_and_blocks_is_followed(make, runs):
    net, x = served(make), images()
    for name in TENSORS:
        tensor = net.state_dict(keep_vars=True)[name]
        _check_change(net, x, runs, lambda net, tensor=tensor: tensor.detach().mul_(0.5))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.downsample.1.bias", "layer1.0.conv1.weight"])
def test_every_kind_of_change_is_followed(name, change, runs):
    net, x = served(), images()
    _check_change(net, x, runs, lambda net: change(net, name, net.state_dict(keep_vars=True)[name]))


@pytest.mark.parametrize("again", [False, True], ids=["at once", "and once it is one call again"])
def test_loading_other_weights_is_followed(again, runs):
    other = drawn(seed=5).state_dict()
    _check_change(served(), images(), runs, lambda net: net.load_state_dict(other), again=again)


def _other_block(net):
    net.layer2[0] = fuse(drawn(seed=4)).layer2[0]


def _other_layer(net):
    net.layer3 = fuse(drawn(seed=4)).layer3


def _more_blocks(net):
    torch.manual_seed(3)
    net.layer1.append(fuse(BasicBlock(64, 64).eval()))


def _unfused_block(net):
    net.layer3[0] = unfuse(drawn(seed=4)).layer3[0]


def _set(path, name, value):
    def change(net):
        setattr(net.get_submodule(path), name, value)

    return change


def _doubling(path):
    def change(net):
        net.get_submodule(path).register_forward_hook(lambda module, args, out: out * 2)

    return change


def _doubling_what_comes(path):
    def change(net):
        net.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    return change


STRUCTURE = {
    "another convolution": lambda net: setattr(net.layer1[0], "conv2", nn.Conv2d(64, 64, 3, padding=1, bias=False)),
    "another convolution in front": lambda net: setattr(net, "conv1", nn.Conv2d(3, 64, 7, 2, 3, bias=False)),
    "another BN": lambda net: setattr(net.layer1[0], "bn2", nn.BatchNorm2d(64).eval()),
    "another BN in front": lambda net: setattr(net, "bn1", nn.BatchNorm2d(64).eval()),
    "another activation": lambda net: setattr(net.layer4[0], "relu", nn.SiLU()),
    "another activation in front": lambda net: setattr(net, "relu", nn.SiLU()),
    "another pooling": lambda net: setattr(net, "maxpool", nn.AvgPool2d(3, 2, 1)),
    "another shortcut": lambda net: net.layer2[0].downsample.append(nn.Hardtanh(-0.5, 0.5)),
    "another block": _other_block,
    "another layer": _other_layer,
    "one more block": _more_blocks,
    "a block that is not fused": _unfused_block,
    "eps": _set("layer1.0.bn1", "eps", 0.5),
    "eps in front": _set("bn1", "eps", 0.5),
    "dilation": lambda net: vars(net.layer1[0].conv1).update(padding=(2, 2), dilation=(2, 2)),
    "pooling elsewhere": _set("maxpool", "stride", 3),
    "pooling of a smaller window": lambda net: vars(net.maxpool).update(kernel_size=2, padding=0),
    "pooling with gaps": lambda net: vars(net.maxpool).update(padding=1, kernel_size=2, dilation=2),
    "training BN": lambda net: net.layer1[0].bn1.train(),
    "training BN in front": lambda net: net.bn1.train(),
    "a parametrization": lambda net: nn.utils.parametrize.register_parametrization(net.layer1[0].conv1, "weight", nn.Tanh()),
}


@pytest.mark.parametrize("change", STRUCTURE)
def test_changes_of_modules_are_followed_at_once_and_later(change, runs):
    torch.manual_seed(7)
    net, x = served(), images()
    before = combine(net, x, runs)
    STRUCTURE[change](net)
    if "training" in change:  # which has other statistics at every call
        for _ in range(3):
            expected = one_by_one(net, x)
            with torch.no_grad():
                same(net(x), expected)
    else:
        expected = one_by_one(net, x)
        within(expected, eager(net, x), 1e-3)
        with torch.no_grad():
            for i in range(AGAIN + 1):
                same(net(x), expected, f"call {i}")
    assert not torch.equal(expected, before)


HOOKED = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer1.0", "layer1.0.conv2", "layer2.0.bn1", "layer2.0.downsample"]
HOOKED += ["layer2.0.downsample.0", "layer3.0.relu", "layer4", "layer4.0"]


@pytest.mark.parametrize("hook", [_doubling, _doubling_what_comes], ids=["after", "before"])
@pytest.mark.parametrize("path", HOOKED)
def test_hooks_are_called_and_may_change_what_passes(path, hook, runs):
    net, x = served(), images()
    before = combine(net, x, runs)
    called = []
    module = net.get_submodule(path)
    handle = module.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        within(net(x), before, 1e-4)
    assert called
    handle.remove()
    same(combine(net, x, runs), before)
    hook(path)(net)
    with torch.no_grad():
        found = net(x)
        same(net(x), found)
    within(found, eager(net, x), 1e-3)
    assert not torch.equal(found, before)


def test_hooks_for_all_modules_are_called(runs):
    net, x = served(), images()
    combine(net, x, runs)
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: names.append(type(module).__name__))
    with torch.no_grad():
        net(x)
    handle.remove()
    assert names.count("Conv2d") == 12
    assert is_combined(net, x, runs)


def test_training_and_evaluation_take_turns(runs):
    net, x = served(), images()
    for optimizer in (torch.optim.SGD(net.parameters(), 0.05), torch.optim.Adam(net.parameters(), 0.01, fused=True)):
        before = combine(net, x, runs)
        net.train()
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        net.eval()
        expected = one_by_one(net, x)
        with torch.no_grad():
            same(net(x), expected)
        assert not torch.equal(expected, before)


@pytest.mark.parametrize("name", ["conv1.weight", "layer3.0.conv1.weight"])
def test_a_step_of_a_fused_optimizer_is_followed(name, runs):
    net, x = served(), images()
    net.get_parameter(name).grad = torch.ones_like(net.get_parameter(name))
    optimizer = torch.optim.SGD([net.get_parameter(name)], 0.05, fused=True)
    _check_change(net, x, runs, lambda net: optimizer.step())


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer4.0.bn2.running_var"])
def test_what_pytorch_does_not_count_takes_a_refresh(name, runs):
    net, x = served(), images()
    before = combine(net, x, runs)
    module, last = owner_of(net, name)
    with torch.no_grad():
        getattr(module, last).data.mul_(0.5)
        same(net(x), before)  # the limit that the documentation names
        refresh(net)
        found = net(x)
        same(found, one_by_one(net, x))
        assert not torch.equal(found, before)
        same(combine(net, x, runs), found)
        getattr(module, last).data.mul_(2)
        refresh()
        same(net(x), before)


@pytest.mark.parametrize("name", ["forward", "instance"])
def test_a_blocks_forward_that_is_replaced_is_called(name, runs, monkeypatch):
    net, x = served(), images()
    before = combine(net, x, runs)
    original = BasicBlock.forward
    if name == "forward":
        monkeypatch.setattr(BasicBlock, "forward", lambda self, x: original(self, x) * 2)
    else:
        net.layer2[0].forward = types.MethodType(lambda self, x: original(self, x) * 2, net.layer2[0])
    with torch.no_grad():
        found = net(x)
    assert not torch.equal(found, before)
    within(found, eager(net, x), 1e-3)
    if name == "forward":
        monkeypatch.undo()
    else:
        del net.layer2[0].forward
    with torch.no_grad():
        same(net(x), before)


@pytest.mark.parametrize("name", ["forward", "_forward_impl"])
def test_a_networks_forward_that_is_replaced_is_called(name, runs, monkeypatch):
    net, x = served(), images()
    combine(net, x, runs)
    monkeypatch.setattr(ResNet, name, lambda self, x: self.conv1(x))
    with torch.no_grad():
        same(net(x), net.conv1(x))


def test_functions_of_torchs_that_are_replaced_are_called(runs, monkeypatch):
    net, x = served(), images()
    before = combine(net, x, runs)
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: original(self, x) * 2)
    with torch.no_grad():
        found = net(x)
    assert not torch.equal(found, before)
    within(found, eager(net, x), 1e-3)


class Counting(ResNet):
    """Notes something about its calls on itself."""

    calls = 0
    seen = None

    def _forward_impl(self, x):
        self.calls += 1
        self.seen = x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def test_what_a_forward_writes_to_the_network_stays(runs):
    net, plain, x = served(lambda: torchvisions(Counting)), drawn(lambda: torchvisions(Counting)), images()
    with torch.no_grad():
        for i in range(1, 6):
            within(net(x), plain(x), 1e-4)
            assert (net.calls, plain.calls) == (i, i)
            within(net.seen, plain.seen, 1e-4)
