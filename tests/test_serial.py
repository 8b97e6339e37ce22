"""A network in evaluation as one call: that there is one, with the numbers of its modules one by one, whatever is done to it."""

import copy
import gc
import io
import pickle
import threading
import types
import weakref

import pytest
import torch
from changes import CHANGES, owner_of
from compare import same, within
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_res
import torchvision_operators
from fused_res import backends, folds, fuse, refresh, serial, stem, unfuse, use_backend
from fused_res.block import evaluated, lowered

torchvision_operators.load()
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from torchvision.models.resnet import BasicBlock, ResNet  # noqa: E402

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.usefixtures("one_thread")]

AGAIN = serial._MOST_SEEN + serial._FIRST
"""Calls after which programs are put together once more, however many there were before."""


def torchvisions(kind=ResNet):
    return kind(BasicBlock, [1, 1, 1, 1], num_classes=7)


def timms():
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=7)


NETWORKS = {"torchvision": torchvisions, "timm": timms}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))
DTYPES = [torch.float32, torch.bfloat16]


def drawn(make=torchvisions, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval().to(dtype)


def served(make=torchvisions, dtype=torch.float32):
    return fuse(drawn(make, dtype))


def images(dtype=torch.float32, size=32, n=2):
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by every combined call."""
    found, plain = [], lowered.run_programs

    def run(*arguments):
        found.append(threading.get_ident())
        return plain(*arguments)

    monkeypatch.setattr(lowered, "run_programs", run)
    return found


def is_combined(net, x, runs):
    """Whether a call of it is a combined one."""
    before = len(runs)
    with torch.no_grad():
        net(x)
    return len(runs) > before


def combine(net, x, runs):
    """Call it until that is one call, and return its output."""
    for _ in range(AGAIN):
        if is_combined(net, x, runs):
            break
    else:
        raise AssertionError("never one call")
    with torch.no_grad():
        return net(x)


class _Apart:
    """`serial.Serial` as it would be if it never put anything together."""

    def __enter__(self):
        self.kept = serial.Serial.__call__
        serial.Serial.__call__ = serial.Serial._one_by_one

    def __exit__(self, *_):
        serial.Serial.__call__ = self.kept


def one_by_one(net, x):
    """What a copy of the network, of which nothing is kept, makes of x, each of its modules called by itself."""
    with torch.no_grad(), _Apart():
        return copy.deepcopy(net)(x)


def eager(net, x):
    """What the network's copy makes of x without any of this."""
    with torch.no_grad():
        return unfuse(copy.deepcopy(net))(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@networks
def test_from_the_fourth_call_on_it_is_one_call_of_the_same_numbers(make, dtype, runs):
    net, x = served(make, dtype), images(dtype)
    expected = one_by_one(net, x)
    with torch.no_grad():
        truth = drawn(make, dtype).double()(x.double())
        for i in range(6):
            same(net(x), expected)
            assert len(runs) == max(0, i - 2)
        kept = x.clone()
        first, second = net(x), net(x)
    same(x, kept, "the image is left as it was")
    assert first.data_ptr() != second.data_ptr()
    within(first.double(), truth, 1e-4 if dtype == torch.float32 else 0.1)


@networks
def test_images_are_told_apart_by_their_values(make, runs):
    net, x = served(make), images()
    combine(net, x, runs)
    with torch.no_grad():
        same(net(-x), one_by_one(net, -x))
        assert not torch.equal(net(x), net(-x))


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
@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv1.weight"])
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


def memory_of(net):
    """Weak references to all that a network's combined calls hold of what was prepared."""
    made = stem._made[net]
    found = [together for part in made.stands_in.values() if isinstance(part, serial.Serial) for together in part._together]
    assert found
    return [weakref.ref(tensor) for together in found for tensor in together._tensors]


def are_gone(references):
    gc.collect()
    return all(reference() is None for reference in references)


GOING = {
    "refresh": refresh,
    "refresh of all": lambda net: refresh(),
    "refresh of the blocks and the stem": lambda net: [refresh(module) for module in net.children()],
    "unfuse": lambda net: refresh(unfuse(net)),
}


@pytest.mark.parametrize("how", GOING)
def test_what_was_prepared_is_let_go_of(how, runs):
    net, x = served(), images()
    combine(net, x, runs)
    references = memory_of(net)
    assert len(references) > 10
    GOING[how](net)
    assert are_gone(references)


def test_what_was_prepared_goes_with_the_network(runs):
    net, x = served(), images()
    combine(net, x, runs)
    references = [*memory_of(net), weakref.ref(net), weakref.ref(net.conv1.weight), weakref.ref(net.layer1[0])]
    del net
    assert are_gone(references)


def test_what_was_prepared_of_weights_that_have_changed_is_let_go_at_the_next_call(runs):
    net, x = served(), images()
    combine(net, x, runs)
    references, old = memory_of(net), weakref.ref(net.conv1.weight)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
        net(x)
    assert are_gone(references)
    net.conv1.weight = nn.Parameter(net.conv1.weight.detach().clone())
    with torch.no_grad():
        net(x)
    assert are_gone([old])


def test_kinds_of_images_are_kept_beside_each_other_within_bounds(runs):
    net = served()
    kinds = [images(), images(size=40), images(n=3)]
    expected = [combine(net, x, runs) for x in kinds]
    for x, out in zip(kinds, expected, strict=True):
        same(out, one_by_one(net, x))
        assert is_combined(net, x, runs)
    with torch.no_grad():
        for size in range(33, 33 + 2 * serial._MOST):
            for _ in range(5):
                net(images(size=size))
        assert len(stem._made[net].stands_in["conv1"]._together) <= serial._MOST
        for x, out in zip(kinds, expected, strict=True):
            same(net(x), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_take_turns(dtype, runs):
    net, x = served(dtype=dtype), images(dtype)
    for _ in range(5):
        for each in (x, x.contiguous()):
            with torch.no_grad():
                found = net(each)
            same(found, one_by_one(net, each))
    assert is_combined(net, x, runs)


def test_dtypes_take_turns(runs):
    net, x = served(), images()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        net.to(dtype)
        expected = one_by_one(net, x.to(dtype))
        with torch.no_grad():
            for _ in range(4):
                same(net(x.to(dtype)), expected)


def test_images_that_are_views_empty_or_of_too_few_dimensions(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    wide = torch.zeros(4, 3, 32, 64).contiguous(memory_format=torch.channels_last)
    wide[::2, :, :, ::2] = x
    with torch.no_grad():
        for _ in range(5):
            within(net(wide[::2, :, :, ::2]), expected, 1e-5)
            assert net(x[:0]).shape == (0, 7)
        behind = torch.zeros(x.numel() + 5)[5:].view(2, 32, 32, 3).permute(0, 3, 1, 2)
        behind.copy_(x)
        same(net(behind), expected)
        for wrong in (x[0, 0], x[:, :2], x.double(), x.long()):
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                net(wrong)
        same(net(x), expected)


class Marked(torch.Tensor):
    pass


def test_a_tensor_of_another_class_is_seen(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    with torch.no_grad():
        found = net(x.as_subclass(Marked))
    assert len(runs) == before
    assert isinstance(found, Marked)
    within(found.as_subclass(torch.Tensor), expected, 1e-4)


def test_gradients_flow_where_they_are_asked_for(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    y = x.clone().requires_grad_()
    net(y).sum().backward()
    assert len(runs) == before
    want = x.clone().requires_grad_()
    unfuse(copy.deepcopy(net))(want).sum().backward()
    torch.testing.assert_close(y.grad, want.grad, rtol=1e-3, atol=1e-4)
    assert net.conv1.weight.grad is not None
    with torch.no_grad():
        same(net(y), expected)
        net.requires_grad_(False)
        same(net(x), expected)
        same(net(y), expected)


@pytest.mark.parametrize("inside", [lambda: torch.inference_mode(), lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_torchs_take_turns_with_none(inside, runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    twin = copy.deepcopy(net)
    with torch.no_grad(), _Apart(), inside():
        within_it = twin(x)
    for _ in range(5):
        with torch.no_grad(), inside():
            found = net(x)
        same(found, within_it)
        assert found.is_inference() == within_it.is_inference()
        with torch.no_grad():
            plain = net(x)
        same(plain, expected)
        assert not plain.is_inference()
    with torch.inference_mode():
        made = images()
        for _ in range(5):
            same(net(made), expected)
    with torch.no_grad():
        same(net(x), expected)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_backend_that_is_asked_for_is_used(backend, runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    with torch.no_grad(), use_backend(backend):
        within(net(x), expected, 1e-3)
    assert len(runs) == before
    same(combine(net, x, runs), expected)


def test_who_is_to_run_the_convolutions_is_asked_at_every_call(runs, monkeypatch):
    net, x = served(), images()
    expected = combine(net, x, runs)
    for asked in ("library", "own"):
        monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", asked)
        want = one_by_one(net, x)
        with torch.no_grad():
            for _ in range(5):
                same(net(x), want)
        within(want, expected, 1e-3)
    assert len({tuple(key[0]) for key in folds._folds[id(net.layer1[0])].made}) == 3


@pytest.mark.parametrize("level", ["bn_act", "epilogue"])
def test_a_level_that_is_asked_for_stands(level, runs):
    net, x = served(), images()
    combine(net, x, runs)
    fuse(net, level=level)
    expected = one_by_one(net, x)
    with torch.no_grad():
        for _ in range(5):
            same(net(x), expected)


@networks
def test_it_can_be_copied_pickled_saved_and_unfused(make, runs):
    net, x = served(make), images()
    expected = combine(net, x, runs)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    others = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)
    for other in others:
        assert not is_combined(other, x, runs)
        same(combine(other, x, runs), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
            assert not torch.equal(other(x), expected)
            same(net(x), expected)
    assert is_combined(net, x, runs)
    unfuse(net)
    assert not is_combined(net, x, runs)
    with torch.no_grad():
        same(net(x), drawn(make)(x))


def test_other_parameters_for_one_call_are_used(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    halves = {name: p.detach() * 0.5 for name, p in net.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(net, halves, (x,))
        assert not torch.equal(found, expected)
        same(net(x), expected)
        net.load_state_dict(halves, strict=False)
        same(net(x), found)


def test_a_profiler_sees_the_blocks_operators(runs):
    net, x = served(), images()
    combine(net, x, runs)
    before = len(runs)
    with torch.no_grad(), torch.profiler.profile() as profile:
        net(x)
    assert len(runs) == before
    names = [event.name for event in profile.events()]
    assert "fused_res::run_programs" not in names
    assert any("max_pool" in name for name in names)
    assert sum("bn_act" in name or "convolution" in name for name in names) >= 12
    assert is_combined(net, x, runs)


def test_tracers_and_modes_see_the_layers(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    with torch.no_grad():
        traced = torch.jit.trace(net, (x,), check_trace=False)
        with FlopCounterMode(display=False) as flops:
            net(x)
        mapped = torch.func.vmap(lambda image: net(image[None])[0])(x)
    assert len(runs) == before
    assert flops.get_total_flops() > 0
    within(traced(x), expected, 1e-4)
    within(mapped, expected, 1e-4)


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


def test_a_write_while_programs_are_put_together_is_not_missed(runs, monkeypatch):
    net, x = served(), images()
    of_block, last = serial._program_of, net.layer4[0]

    def late(block, image):
        found = of_block(block, image)
        if block is last:  # as another thread may
            net.layer1[0].conv1.weight.detach().mul_(0.5)
        return found

    with torch.no_grad():
        before = [net(x), net(x)][1]
        monkeypatch.setattr(serial, "_program_of", late)
        net(x)
        monkeypatch.setattr(serial, "_program_of", of_block)
        expected = one_by_one(net, x)
        assert not torch.equal(expected, before)
        for _ in range(3):
            same(net(x), expected)


def test_a_refresh_while_programs_are_put_together_is_not_missed(runs, monkeypatch):
    net, x = served(), images()
    of_block, last = serial._program_of, net.layer4[0]

    def late(block, image):
        found = of_block(block, image)
        if block is last:
            net.layer1[0].conv1.weight.data.mul_(0.5)
            refresh(net)
        return found

    with torch.no_grad():
        net(x), net(x)
        monkeypatch.setattr(serial, "_program_of", late)
        net(x)
        monkeypatch.setattr(serial, "_program_of", of_block)
        expected = one_by_one(net, x)
        for _ in range(3):
            same(net(x), expected)


def test_what_was_recorded_of_weights_is_not_taken_for_that_of_others(monkeypatch):
    net, x = served(), images()
    block, run = net.layer1[0], evaluated.program.run
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)

    def late(*arguments):
        out = run(*arguments)
        monkeypatch.setattr(evaluated.program, "run", run)
        block.conv1.weight.detach().mul_(0.5)  # as other threads may
        block(x)
        return out

    with torch.no_grad():
        before = block(x)
        monkeypatch.setattr(evaluated.program, "run", late)
        same(block(x), before)
        expected = copy.deepcopy(block)(x)
        assert not torch.equal(expected, before)
        for _ in range(3):
            same(block(x), expected)


def test_threads_that_call_while_weights_are_swapped_see_one_set_or_the_other(runs):
    net, x = served(), images()
    states = [{name: t.clone() for name, t in net.state_dict().items()}, drawn(seed=5).state_dict()]
    expected = []
    for state in states:
        net.load_state_dict(state)
        expected.append(one_by_one(net, x))
    gate, stop, failures, current = threading.Lock(), threading.Event(), [], [1]

    def serve():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    net(x)  # races with the swap: any result, but nothing of it may be kept
                for _ in range(5):
                    with gate, torch.no_grad():
                        if not torch.equal(net(x), expected[current[0]]):
                            failures.append(current[0])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(30):
        with gate:
            net.load_state_dict(states[i % 2])
            refresh(net)  # so that it is one call soon again
            current[0] = i % 2
        stop.wait(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(set(runs)) > 1
    with torch.no_grad():
        same(net(x), expected[1])


def test_threads_that_call_together_get_what_one_gets(runs):
    net, x = served(), images()
    expected, results = one_by_one(net, x), []
    barrier = threading.Barrier(4)

    def call():
        barrier.wait()
        with torch.no_grad():
            results.extend(net(x) for _ in range(2 * AGAIN // 4))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * (2 * AGAIN // 4)
    for result in results:
        same(result, expected)
    assert runs


def test_an_operator_that_fails_is_called_by_python_once_more(monkeypatch, runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    monkeypatch.setattr(lowered, "run_programs", lambda *_: None)
    with torch.no_grad():
        same(net(x), expected)


def test_the_blocks_by_themselves_and_the_package_know_nothing_of_it(runs):
    net, x = served(), images()
    names, attributes = list(net.state_dict()), set(vars(net))
    combine(net, x, runs)
    assert list(net.state_dict()) == names
    assert set(vars(net)) == attributes
    assert not any(isinstance(module, fused_res.stem.Stem | serial.Serial) for module in net.modules())
