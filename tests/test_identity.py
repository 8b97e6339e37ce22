"""Where a block's main branch is nothing, it is its shortcut to the last bit: at every level, on every backend."""

import copy
import itertools

import pytest
import torch
from compare import same
from formulas import assert_as_accurate_as_the_formulas
from torch import nn

import fused_res
from blocks import projection
from fused_res import Chain, Residual, accuracy, fuse, residual_block, use_backend, zero_init_residual
from fused_res.planner import LEVELS

pytestmark = pytest.mark.usefixtures("one_thread")

every_level = pytest.mark.parametrize("level", LEVELS)


def _chain(*channels, relu):
    layers = []
    for into, out in itertools.pairwise(channels):
        layers += [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return Chain(*(layers if relu else layers[:-1]))


BLOCKS = {
    "BasicBlock": (lambda **kw: fused_res.BasicBlock(20, 20, **kw), torch.relu),
    "Bottleneck": (lambda **kw: fused_res.Bottleneck(20, 5, **kw), torch.relu),
    "PreActBasicBlock": (lambda **kw: fused_res.PreActBasicBlock(20, 20, **kw), lambda x: x),
    "PreActBottleneck": (lambda **kw: fused_res.PreActBottleneck(20, 5, **kw), lambda x: x),
    "Residual": (lambda **kw: Residual(_chain(20, 8, 20, relu=False), **kw), lambda x: x),
    "Residual, ReLU": (lambda **kw: Residual(_chain(20, 8, 20, relu=True), **kw), lambda x: x),
}
every_block = pytest.mark.parametrize("kind", BLOCKS)


def make(kind, dtype=torch.float32, **options):
    return accuracy.random_block(BLOCKS[kind][0](**options), 0).to(dtype)


def image(dtype, device="cpu"):
    torch.manual_seed(1)
    return torch.randn(3, 20, 4, 5, device=device).to(dtype)


def check_zero_weights(block, kind, x):
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.dim() == 4 or name.endswith("bias"):
                parameter.zero_()
    assert block.unfused_reason(x) is None
    same(block(x), BLOCKS[kind][1](x))
    with torch.no_grad():
        same(block(x), BLOCKS[kind][1](x))


def check_zero_scale(block, kind, x):
    with torch.no_grad():
        block.residual_scale.zero_()
    for training in (True, False):
        same(block.train(training)(x), BLOCKS[kind][1](x))


def check_zero_scale_beside_a_projection(block, x):
    """Its BN and the ReLU, as a chain of that one convolution alone computes them."""
    got, side = block(x), block.parts().projection
    alone = side._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    same(got, residual_block(x, [alone], form="chain"))


def projected():
    return accuracy.random_block(fused_res.Bottleneck(20, 8, 2, projection(20, 32, 2), residual_scale=0.0), 0).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_level
@every_block
def test_all_weights_and_betas_zero_give_the_shortcut_exactly(kind, level, dtype, cpu_backend):
    with use_backend(cpu_backend, level):
        check_zero_weights(make(kind, dtype), kind, image(dtype))


@every_level
@every_block
def test_a_scale_of_zero_gives_the_shortcut_exactly(kind, level, cpu_backend):
    with use_backend(cpu_backend, level):
        check_zero_scale(make(kind, residual_scale=0.0), kind, image(torch.float32))
        if level != "moment":
            check_zero_scale_beside_a_projection(projected(), image(torch.float32))


@pytest.mark.long
@every_level
@every_block
def test_both_hold_on_triton(kind, level, device, proven_interpreter, poisoned_memory):
    pytest.importorskip("triton")
    with use_backend("triton", level):
        for dtype in (torch.float32, torch.bfloat16):
            check_zero_weights(make(kind, dtype).to(device), kind, image(dtype, device))
        check_zero_scale(make(kind, residual_scale=0.0).to(device), kind, image(torch.float32, device))
        if level != "moment" and kind == "Bottleneck":
            check_zero_scale_beside_a_projection(projected().to(device), image(torch.float32, device))


def scaled(kind, seed):
    block = accuracy.random_block(BLOCKS[kind][0](residual_scale=0.0), seed)
    torch.manual_seed(seed)
    x, dout = torch.randn(4, 20, 9, 7, dtype=torch.float64), torch.randn(4, 20, 9, 7, dtype=torch.float64)
    return block, x, dout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Bottleneck", "PreActBasicBlock"])
def test_at_a_scale_of_zero_its_gradient_and_all_others_are_within_the_rule(kind, dtype, cpu_backends):
    ways = list(itertools.product(cpu_backends, LEVELS))
    for way, verdicts in accuracy.judge_each(lambda seed: scaled(kind, seed), dtype, ways).items():
        assert "dresidual_scale" in {v.quantity for v in verdicts}
        failed = [f"{v.quantity}: {v.error:.2e}, eager {v.eager:.2e}, limit {v.limit:.2e}" for v in verdicts if not v.passed]
        assert not failed, "\n".join([" at ".join(way), *failed])


@pytest.mark.long
@pytest.mark.parametrize(("kind", "level"), [("Bottleneck", "bn_act"), ("Bottleneck", "moment"), ("PreActBasicBlock", "prologue")])
def test_at_a_scale_of_zero_gradients_on_triton_are_those_of_the_formulas(kind, level, device, proven_interpreter):
    pytest.importorskip("triton")

    def make_one(seed):
        block, x, dout = scaled(kind, seed)
        return block.to(device), x.to(device), dout.to(device)

    assert_as_accurate_as_the_formulas(make_one, torch.float32, "triton", level, seeds=8)


class Network(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.layer1, self.pool, self.layer2 = first, nn.MaxPool2d(2), second

    def forward(self, x):
        return self.layer2(self.pool(self.layer1(x)))


def test_whole_networks_of_our_blocks_start_as_their_shortcuts():
    x = image(torch.float32)
    for first in BLOCKS:
        for second in BLOCKS:
            network = Network(BLOCKS[first][0](), BLOCKS[second][0]())
            assert zero_init_residual(network) is network
            same(network(x), BLOCKS[second][1](network.pool(BLOCKS[first][1](x))))


def test_networks_of_others_fused_or_not_get_what_their_own_option_gives(torchvision_resnet, libraries):
    v2, layers = libraries("timm", "timm.models.resnetv2"), libraries("timm", "timm.layers")
    kinds = {"conv_layer": layers.create_conv2d, "norm_layer": layers.BatchNormAct2d, "num_classes": 3}
    makers = (
        lambda zero: torchvision_resnet.ResNet(torchvision_resnet.Bottleneck, [1, 1, 1, 1], zero_init_residual=zero),
        lambda zero: v2.ResNetV2([1, 1, 1, 1], (16, 32, 64, 64), zero_init_last=zero, **kinds),
    )
    for build in makers:
        torch.manual_seed(0)
        theirs = build(True)
        for fused in (False, True):
            torch.manual_seed(0)
            ours = build(False)
            zero_init_residual(fuse(ours) if fused else ours)
            for name, tensor in theirs.state_dict().items():
                same(ours.state_dict()[name], tensor, name)


def test_what_cannot_be_zeroed_is_refused_and_nothing_has_changed():
    with pytest.raises(ValueError, match="no residual block that is known was found"):
        zero_init_residual(nn.Sequential(nn.Conv2d(3, 3, 1), _chain(3, 3, relu=True)))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        zero_init_residual(3)
    network = nn.Sequential(fused_res.BasicBlock(4, 4), fused_res.BasicBlock(4, 4))
    network[1].bn2 = nn.BatchNorm2d(4, affine=False)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match="bn2 has no weight to set to 0"):
        zero_init_residual(network)
    for name, tensor in network.state_dict().items():
        same(tensor, before[name], name)
