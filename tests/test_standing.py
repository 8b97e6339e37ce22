"""What is kept of a block's modules between calls: let go as soon as any of them is not what it was."""

import copy
import gc
import weakref

import pytest
import torch
from compare import same
from torch import nn

import fused_res
import torchvision_operators
from fused_res import BasicBlock, Chain, Residual, standing


def block_of(stride=2):
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(4, 6, 1, stride, bias=False), nn.BatchNorm2d(6))
    return BasicBlock(4, 6, stride, downsample)


def double(module, inputs, output):
    return 2 * output


def scaled(convolution):
    return nn.Parameter(convolution.weight.detach() * 1.5)


class Halving(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


def of_class(module, kind):
    module.__class__ = kind


def insert(sequence, layer):
    sequence._modules = {"first": layer, **sequence._modules}


CHANGES = {
    "a parameter": lambda b: setattr(b.conv1, "weight", scaled(b.conv1)),
    "a parameter, past setattr": lambda b: b.conv1._parameters.update(weight=scaled(b.conv1)),
    "a parameter of the projection": lambda b: setattr(b.downsample[0], "weight", scaled(b.downsample[0])),
    "a bias that was none": lambda b: setattr(b.conv2, "bias", nn.Parameter(torch.ones(6))),
    "a buffer": lambda b: setattr(b.bn1, "running_mean", torch.ones(6)),
    "a counter": lambda b: setattr(b.bn1, "num_batches_tracked", torch.tensor(7)),
    "a mode": lambda b: b.bn2.eval(),
    "all modes": lambda b: b.eval(),
    "a number": lambda b: setattr(b.bn1, "eps", 0.5),
    "a momentum": lambda b: setattr(b.bn1, "momentum", 0.9),
    "statistics that are not tracked": lambda b: setattr(b.bn1, "track_running_stats", False),
    "a stride": lambda b: (setattr(b.conv1, "stride", (1, 1)), setattr(b.conv2, "stride", (2, 2))),
    "a padding mode": lambda b: setattr(b.conv1, "padding_mode", "circular"),
    "another child": lambda b: setattr(b, "bn1", nn.BatchNorm2d(6, eps=0.1)),
    "another child, past setattr": lambda b: b._modules.update(bn1=nn.BatchNorm2d(6, eps=0.1)),
    "another activation": lambda b: setattr(b, "relu", nn.ELU()),
    "another layer in the shortcut": lambda b: insert(b.downsample, nn.Identity()),
    "an emptied shortcut": lambda b: b.downsample._modules.clear(),
    "children in a new dictionary": lambda b: setattr(b, "_modules", {**b._modules, "bn1": nn.BatchNorm2d(6, eps=0.1)}),
    "parameters in a new dictionary": lambda b: setattr(b.conv1, "_parameters", {"weight": scaled(b.conv1), "bias": None}),
    "another class": lambda b: of_class(b.conv1, Halving),
    "a method": lambda b: setattr(b.conv1, "forward", lambda x: nn.Conv2d.forward(b.conv1, x) / 2),
    "a hook": lambda b: b.bn1.register_forward_hook(double),
    "a hook in the shortcut": lambda b: b.downsample[1].register_forward_hook(double),
    "a hook on the shortcut": lambda b: b.downsample.register_forward_hook(double),
    "a hook in front": lambda b: b.conv2.register_forward_pre_hook(lambda m, x: (x[0] + 1,)),
    "an array": lambda b: setattr(b.bn1, "eps", torch.tensor([0.5])),
    "an attribute that is gone": lambda b: delattr(b.conv1, "transposed"),
    "a residual scale": lambda b: setattr(b, "residual_scale", nn.Parameter(torch.tensor(0.5))),
}


UNFUSED = ("a hook", "a hook in front", "a method", "another class", "another activation", "a padding mode")
WITHOUT_EFFECT = ("a counter", "a momentum", "a buffer", "a bias that was none", "statistics that are not tracked")
WITHOUT_EFFECT += ("an attribute that is gone", "another layer in the shortcut")


@pytest.mark.filterwarnings("ignore:fused_res. BasicBlock runs unfused:UserWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name):
    block, x = block_of(), torch.randn(2, 4, 6, 5)
    if name == "an emptied shortcut":
        block, x = BasicBlock(4, 4, 1, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), torch.randn(2, 4, 6, 5)
    before = block(x)
    assert standing.last(block) is not None
    CHANGES[name](block)
    assert standing.last(block) is None
    twin = copy.deepcopy(block)
    same(block(x), twin(x))
    assert (block.unfused_reason(x) is not None) == (name in UNFUSED)
    assert torch.equal(twin(x), before) == (name in WITHOUT_EFFECT)


def test_a_change_between_two_calls_is_followed_and_then_kept():
    block, x = block_of(), torch.randn(2, 4, 6, 5)
    block(x)
    first = standing.last(block)
    block(x)
    assert standing.last(block) is first
    handle = block.relu.register_forward_hook(double)
    with pytest.warns(UserWarning, match="relu has a forward hook"):
        block(x)
    assert standing.last(block) is None
    handle.remove()
    block(x)
    assert standing.last(block) is not None


def test_what_is_put_back_as_it_was_is_no_change():
    block, x = block_of(), torch.randn(2, 4, 6, 5)
    block(x)
    first, weight, statistics = standing.last(block), block.conv1.weight, block.bn1.running_mean
    block.conv1.weight, block.bn1.running_mean = scaled(block.conv1), torch.ones(6)
    block.conv1.weight, block.bn1.running_mean = weight, statistics
    block.train()
    assert standing.last(block) is first
    del block.conv1.weight  # and comes back behind the bias
    block.conv1.weight = weight
    assert standing.last(block) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: block_of(),
        lambda: Chain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        lambda: Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))),
    ],
    ids=["block", "chain", "residual"],
)
def test_it_goes_with_its_block(make):
    block = make()
    block(torch.randn(2, 4, 6, 5))
    key, weight = id(block), weakref.ref(next(block.parameters()))
    assert key in standing._kept
    del block
    gc.collect()
    assert key not in standing._kept
    assert weight() is None


def test_attributes_that_may_be_edited_where_they_are_are_read_at_every_call():
    block, x = block_of(), torch.randn(2, 4, 6, 5)
    block.conv1.dilation = [1, 1]
    block(x)
    assert standing.last(block) is None
    block.conv1.dilation[:] = [2, 2]
    block.conv1.padding = (2, 2)
    same(block(x), copy.deepcopy(block)(x))


def test_a_foreign_layers_method_is_looked_at(monkeypatch):
    torchvision_operators.load()
    layers = pytest.importorskip("timm.layers")
    from timm.models.resnetv2 import PreActBasic

    block, x = PreActBasic(8, 8, conv_layer=layers.create_conv2d, norm_layer=layers.BatchNormAct2d), torch.randn(2, 8, 5, 5)
    fused_res.fuse(block, strict=True)
    block(x)
    assert standing.last(block) is not None
    monkeypatch.setattr(layers.BatchNormAct2d, "forward", lambda self, x: x)
    assert standing.last(block) is None


def test_copies_and_pickles_know_nothing_of_it():
    block, x = block_of(), torch.randn(2, 4, 6, 5)
    out = block(x)
    twin = copy.deepcopy(block)
    assert standing.last(twin) is None
    nn.init.zeros_(twin.bn2.weight)
    twin.bn2.weight = nn.Parameter(torch.zeros(6))
    assert not torch.equal(twin(x), out)
    same(block(x), out)
