"""Networks that are fused: the same numbers whatever is done to their layers, and only where these are called in order."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from compare import same, within
from serial_networks import randomised
from torch import nn

import fused_res
import torchvision_operators
from fused_res import explain, fuse, network, refresh, unfuse

torchvision_operators.load()
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from torchvision.models._utils import IntermediateLayerGetter  # noqa: E402
from torchvision.models.resnet import BasicBlock, ResNet  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def torchvisions(**options):
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7, **options)


def timms(**options):
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=7, **options)


def deep():
    return timms(stem_type="deep", stem_width=16)


def backbone():
    return IntermediateLayerGetter(torchvisions(), {"layer1": "first", "layer4": "last"})


NETWORKS = {"torchvision": torchvisions, "timm": timms, "timm deep": deep, "backbone": backbone}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))


def drawn(make, dtype=torch.float64):
    torch.manual_seed(0)
    return randomised(make().to(dtype)).to(memory_format=torch.channels_last)


def images(dtype=torch.float64, size=37):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def outputs(net, x):
    found = net(x)
    return list(found.values()) if isinstance(found, dict) else [found]


def stem_row(net, x):
    """What `explain` says of the stem, or None where there is none."""
    rows = [row for row in explain(net, x).rows if row.block == "Stem"]
    assert len(rows) <= 1
    return rows[0] if rows else None


@networks
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_network_computes_what_it_did(make, training):
    net = drawn(make).train(training)
    fused = fuse(copy.deepcopy(net))
    x = images()
    with torch.set_grad_enabled(training):
        expected, found = outputs(net, x), outputs(fused, x)
    for a, b in zip(found, expected, strict=True):
        within(a, b, 1e-10)
        assert a.stride() == b.stride()
    row = stem_row(fused, x)
    if training:
        assert row is None
        for net_ in (net, fused):
            sum(out.sum() for out in outputs(net_, x)).backward()
        for (name, p), q in zip(net.named_parameters(), fused.parameters(), strict=True):
            if p.grad is not None:
                within(q.grad, p.grad, 1e-8, name)
        for (name, a), b in zip(net.named_buffers(), fused.buffers(), strict=True):
            within(b.double(), a.double(), 1e-10, name)
    else:
        assert row.backend == "native"
        assert len(row.units) == (3 if make is deep else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@networks
def test_evaluation_in_fewer_bits(make, dtype):
    net = drawn(make).eval()
    fused = fuse(copy.deepcopy(net).to(dtype))
    bound = 1e-4 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        for a, b in zip(outputs(fused, images(dtype)), outputs(net, images(dtype).double()), strict=True):
            within(a.double(), b, bound)


@networks
def test_names_and_modules_stay_and_unfuse_takes_it_back(make):
    net = drawn(make)
    kind, before = type(net), list(net.named_modules())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fuse(net)
    net(images())
    assert isinstance(net, kind)
    assert type(net) is not kind
    assert [(name, id(module)) for name, module in net.named_modules()] == [(name, id(module)) for name, module in before]
    assert list(net.state_dict()) == list(state)
    unfuse(net)
    assert type(net) is kind


@networks
def test_a_network_can_be_copied_pickled_and_saved(make):
    net = fuse(drawn(make, torch.float32).eval())
    x = images(torch.float32)
    with torch.no_grad():
        expected = [outputs(net, x) for _ in range(6)][-1]
    copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copied, pickled, torch.load(file, weights_only=False)):
        assert type(other) is type(net)
        with torch.no_grad():
            for a, b in zip(outputs(other, x), expected, strict=True):
                same(a, b)
        assert stem_row(other, x).backend == "native"


CHANGES = {
    "weight": lambda net: net.conv1.weight.data.add_(0.5),
    "another convolution": lambda net: setattr(net, "conv1", nn.Conv2d(3, 64, 7, 2, 3).double()),
    "another BN": lambda net: setattr(net, "bn1", nn.BatchNorm2d(64).double().eval()),
    "no BN": lambda net: setattr(net, "bn1", nn.Identity()),
    "another activation": lambda net: setattr(net, "relu", nn.SiLU()),
    "another pooling": lambda net: setattr(net, "maxpool", nn.AvgPool2d(2)),
    "pooling elsewhere": lambda net: setattr(net.maxpool, "stride", 3),
    "a hook on the convolution": lambda net: net.conv1.register_forward_hook(lambda m, i, out: out * 2) and None,
    "a hook on the ReLU": lambda net: net.relu.register_forward_hook(lambda m, i, out: out * 2) and None,
    "a hook on the pooling": lambda net: net.maxpool.register_forward_hook(lambda m, i, out: out * 2) and None,
    "training BN": lambda net: net.bn1.train() and None,
    "a parametrization": lambda net: nn.utils.parametrizations.weight_norm(net.conv1) and None,
    "statistics": lambda net: [net.bn1.running_var.mul_(4)],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_is_done_to_its_layers_shows(change):
    net = drawn(torchvisions).eval()
    fused, x = fuse(copy.deepcopy(net).float()), images(torch.float32)
    with torch.no_grad():
        for _ in range(6):
            within(fused(x).double(), net(x.double()), 1e-4)
        for each in (net, fused):
            torch.manual_seed(2)
            change(each)
        refresh(fused)
        fused.float()
        expected = net(x.double())
        for _ in range(70):  # until programs are put together once more
            within(fused(x).double(), expected, 1e-4)


def test_nobody_warns_of_a_stem_that_is_not_fused():
    net = fuse(drawn(torchvisions).eval())
    net.conv1.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        net(images())


class Observing(ResNet):
    """Reads what its first convolution made."""

    def _forward_impl(self, x):
        first = self.conv1(x)
        x = self.layer1(self.maxpool(self.relu(self.bn1(first))))
        x = self.layer4(self.layer3(self.layer2(x)))
        return x.mean() + first.mean()


class Twice(ResNet):
    """Calls its BN with something else than what the convolution made."""

    def _forward_impl(self, x):
        x = self.relu(self.bn1(self.conv1(x) * 2))
        return self.layer1(self.maxpool(x))


class Weighs(ResNet):
    """Reads a parameter of its first convolution itself."""

    def _forward_impl(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.layer1(self.maxpool(x)) * self.conv1.weight.mean()


@pytest.mark.parametrize("kind", [Observing, Twice, Weighs], ids=lambda kind: kind.__name__)
def test_a_network_whose_forward_is_another_is_left_alone(kind):
    net = drawn(lambda: kind(BasicBlock, [1, 1, 1, 1])).eval()
    fused = fuse(copy.deepcopy(net))
    assert type(fused) is kind
    within(fused(images()), net(images()), 1e-10)


def test_the_layers_by_themselves_are_as_they_were():
    net = drawn(torchvisions).eval()
    fused = fuse(copy.deepcopy(net))
    fused(images())
    same(fused.conv1(images()), net.conv1(images()))
    same(fused.bn1(net.conv1(images())), net.bn1(net.conv1(images())))


@pytest.mark.parametrize("name", ["forward", "_forward_impl"])
def test_a_forward_that_is_replaced_later_is_called(name, monkeypatch):
    net = fuse(drawn(torchvisions).eval())
    with torch.no_grad():
        net(images())
        monkeypatch.setattr(ResNet, name, lambda self, x: self.conv1(x))
        same(net(images()), net.conv1(images()))


class Named(ResNet):
    """Has methods of its own, which are called as ours might be."""

    def _forward(self):
        return "forward"

    def _view(self):
        return "view"


class Saying(nn.Module):
    """A network of nobody's library, which names its layers."""

    fused_res_stem = ("first", "norm", "act", "pool")

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.body = nn.Sequential(fused_res.BasicBlock(64, 64), BasicBlock(64, 64))

    def forward(self, x):
        return self.body(self.pool(self.act(self.norm(self.first(x))))).mean((2, 3))


class SayingWrong(Saying):
    def forward(self, x):
        return super().forward(self.norm(self.first(x)).relu()[:, :3])


def test_a_class_may_name_its_layers(runs):
    net, x = drawn(Saying, torch.float32).eval(), images(torch.float32)
    fused = fuse(copy.deepcopy(net))
    with torch.no_grad():
        for _ in range(6):
            within(fused(x), net(x), 1e-4)
    assert len(runs) == 2
    assert type(fuse(drawn(SayingWrong))) is SayingWrong


def test_what_a_class_that_is_derived_has_beside_stays_its_own():
    net = drawn(lambda: Named(BasicBlock, [1, 1, 1, 1])).eval()
    fused = fuse(copy.deepcopy(net))
    assert type(fused) is not Named
    assert (fused._forward(), fused._view()) == ("forward", "view")
    with torch.no_grad():
        within(fused(images()), net(images()), 1e-10)


def test_checkpointing_that_is_switched_on_later_is_followed():
    net = drawn(timms).eval()
    fused = fuse(copy.deepcopy(net))
    with torch.no_grad():
        expected = net(images())
        for _ in range(3):
            within(fused(images()), expected, 1e-10)
            fused.set_grad_checkpointing(not fused.grad_checkpointing)


def test_layers_that_are_to_be_returned_later_are():
    net = fuse(drawn(backbone).eval())
    with torch.no_grad():
        net(images())
        net.return_layers["conv1"] = "zeroth"
        same(net(images())["zeroth"], net.conv1(images()))


def test_images_in_another_layout_come_out_in_it():
    net = drawn(torchvisions, torch.float32).to(memory_format=torch.contiguous_format).eval()
    net.fc, net.avgpool = nn.Identity(), nn.Identity()
    net = IntermediateLayerGetter(net, {"layer4": "last"})
    fused, x = fuse(copy.deepcopy(net)), images(torch.float32).contiguous()
    with torch.no_grad():
        expected = net(x)["last"]
        for _ in range(8):
            found = fused(x)["last"]
            within(found, expected, 1e-4)
            assert found.stride() == expected.stride()


@pytest.mark.parametrize("calls", [0, 6])
def test_torch_fx_traces_the_original(calls):
    net = fuse(drawn(torchvisions, torch.float32).eval())
    x = images(torch.float32)
    with torch.no_grad():
        for _ in range(calls):
            net(x)
        graph = torch.fx.symbolic_trace(net)
        within(graph(x), net(x), 1e-4)


@pytest.mark.parametrize("wrong", [None, (1, 2), "x"])
def test_what_is_no_image_raises_what_eager_raises(wrong):
    net = drawn(torchvisions, torch.float32).eval()
    fused = fuse(copy.deepcopy(net))
    with torch.no_grad():
        for _ in range(6):
            fused(images(torch.float32))
        with pytest.raises(TypeError) as theirs:
            net(wrong)
        with pytest.raises(TypeError) as ours:
            fused(wrong)
    assert str(ours.value) == str(theirs.value)


def test_a_class_that_was_derived_again_stays():
    """As `fully_shard` gives a module one."""
    net = fuse(drawn(torchvisions).eval())
    kind = type("Sharded", (type(net),), {})
    net.__class__ = kind
    assert type(fuse(net, level="bn_act")) is kind
    with pytest.raises(RuntimeError, match="after it was fused"):
        unfuse(net)


def test_a_fused_optimizers_step_shows_after_other_weights_were_called():
    net = fuse(drawn(torchvisions, torch.float32).eval())
    x = images(torch.float32)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        before = [net(x) for _ in range(6)][-1]
        torch.func.functional_call(net, {name: p * 0.9 for name, p in net.named_parameters()}, (x,))
        torch.optim.SGD(net.parameters(), lr=1e-2, fused=True).step()
        after = net(x)
        assert not torch.equal(after, before)
        within(after, unfuse(copy.deepcopy(net))(x), 1e-4)


def test_a_compiled_network_has_its_layers_in_the_graph():
    net = drawn(torchvisions).eval()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    fused = fuse(copy.deepcopy(net))
    with torch.no_grad():
        within(torch.compile(fused, backend=keep, fullgraph=True)(images()), net(images()), 1e-10)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("conv2d" in name for name in names)
    torch._dynamo.reset()


def test_what_a_stem_has_prepared_goes_with_the_network():
    net = fuse(drawn(torchvisions, torch.float32).eval())
    with torch.no_grad():
        net(images(torch.float32))
    kept = weakref.ref(vars(net)[network._MADE].stem)
    net.trainer = {"model": net}
    del net
    gc.collect()
    assert kept() is None


def test_a_stem_has_the_level_that_was_asked_for():
    net, x = fuse(drawn(torchvisions, torch.float32).eval(), level="bn_act"), images(torch.float32)
    assert stem_row(net, x).level == "bn_act"
    fuse(net, level="epilogue")
    assert stem_row(net, x).level == "epilogue"


def test_without_blocks_that_are_fused_a_network_is_left_alone():
    net = drawn(torchvisions)
    for module in net.modules():
        if isinstance(module, BasicBlock):
            module.relu = nn.SiLU()
    assert type(fuse(net)) is ResNet


def test_a_network_follows_from_its_blocks_and_is_none_of_what_is_filtered():
    net = fuse(drawn(torchvisions), filter=lambda block, name: block.stride == 1 and name.startswith("layer1"))
    assert type(net) is not ResNet
    assert [name for name, module in net.named_modules() if isinstance(module, fused_res.fusible.Fusible)] == ["layer1.0"]
    assert type(fuse(drawn(torchvisions), filter=lambda block, name: False)) is ResNet
