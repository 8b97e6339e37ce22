"""Networks of torchvision, timm and transformers, fused: the original's numbers over optimiser steps, each block explained."""

import copy
import importlib
import re
import warnings

import pytest
import torch
from torch import nn

import fused_res
from fused_res import explain, fuse, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")


def torchvision(name, **options):
    return lambda get: getattr(get("torchvision", "torchvision.models"), name)(num_classes=10, **options)


def narrow(block, layers, **options):
    def make(get):
        resnet = get("torchvision", "torchvision.models.resnet")
        return resnet.ResNet(getattr(resnet, block), layers, num_classes=10, **options)

    return make


def timm(name, **options):
    return lambda get: get("timm", "timm").create_model(name, num_classes=10, **options)


def timm_narrow(block, *, d=False, **options):
    def make(get):
        resnet = get("timm", "timm.models.resnet")
        if d:
            options.update(avg_down=True, stem_type="deep", stem_width=8)
        return resnet.ResNet(getattr(resnet, block), [2, 1, 1, 1], num_classes=10, channels=(16, 16, 32, 32), **options)

    return make


def timm_v2(preact, **options):
    """Blocks whose BNs have their activations inside."""

    def make(get):
        layers = get("timm", "timm.layers")
        v2 = get("timm", "timm.models.resnetv2")
        kinds = {"conv_layer": layers.create_conv2d, "norm_layer": layers.BatchNormAct2d, "stem_type": ""} | options
        return v2.ResNetV2([1, 1, 1, 1], (16, 32, 64, 64), num_classes=10, preact=preact, **kinds)

    return make


def timm_group_norm(get):
    layers = get("timm", "timm.layers")
    return timm_v2(True, norm_layer=lambda *a, **k: layers.GroupNormAct(*a, num_groups=4, **k))(get)


def timm_frozen(get):
    return get("timm", "timm.layers").freeze_batch_norm_2d(timm_v2(False)(get))


def hugging_face(kind, widths):
    def make(get):
        transformers = get("transformers", "transformers")
        sizes = {"depths": [2, 1, 1, 1], "hidden_sizes": widths, "embedding_size": 8}
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, layer_type=kind, num_labels=10))

    return make


def fpn(get):
    utils = get("torchvision", "torchvision.models.detection.backbone_utils")
    frozen = get("torchvision", "torchvision.ops").FrozenBatchNorm2d
    return utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=frozen, trainable_layers=3)


def detector(get):
    return get("torchvision", "torchvision.models.detection").fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone


def segmenter(get):
    models = get("torchvision", "torchvision.models.segmentation")
    return models.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)


SMALL = {
    "torchvision BasicBlock": (narrow("BasicBlock", [1, 1, 1, 1]), 4),
    "torchvision Bottleneck": (narrow("Bottleneck", [2, 1, 1, 1], groups=4, width_per_group=4), 5),
    "torchvision frozen": (fpn, 8),
    "timm BasicBlock": (timm_narrow("BasicBlock"), 5),
    "timm Bottleneck": (timm_narrow("Bottleneck", d=True), 5),
    "timm dilated": (timm_narrow("Bottleneck", output_stride=8), 5),
    "timm BatchNormAct2d": (timm_v2(preact=False), 4),
    "timm BatchNormAct2d, pooled": (timm_v2(preact=False, avg_down=True), 4),
    "timm frozen": (timm_frozen, 4),
    "timm preact": (timm_v2(preact=True), 4),
    "timm preact, pooled": (timm_v2(preact=True, avg_down=True), 4),
    "timm preact, basic": (timm_v2(preact=True, basic=True), 4),
    "transformers basic": (hugging_face("basic", [8, 8, 16, 16]), 5),
    "transformers bottleneck": (hugging_face("bottleneck", [16, 16, 32, 32]), 5),
}
WHOLE = {
    **{
        f"torchvision {name}": (torchvision(name), count)
        for name, count in {
            "resnet18": 8,
            "resnet34": 16,
            "resnet50": 16,
            "resnet101": 33,
            "wide_resnet50_2": 16,
            "resnext50_32x4d": 16,
        }.items()
    },
    "torchvision fasterrcnn_resnet50_fpn": (detector, 16),
    "torchvision deeplabv3_resnet50": (segmenter, 16),
    **{
        f"timm {name}": (timm(name), count)
        for name, count in {
            "resnet18": 8,
            "resnet26d": 8,
            "resnet50d": 16,
            "resnet10t": 4,
            "resnext50_32x4d": 16,
            "resnet50s": 16,
            "resnetv2_50": 16,
        }.items()
    },
    "transformers ResNet-50": (hugging_face("bottleneck", [256, 512, 1024, 2048]), 5),
}
LEFT = {
    "timm seresnet50": (timm("seresnet50"), 16, "se is a SEModule, not nn.Identity"),
    "timm GroupNorm, preact": (timm_group_norm, 4, "norm1 is a GroupNormAct, not nn.BatchNorm2d"),
    "timm resnest14d": (timm("resnest14d"), 4, "its convolutions are weighted by attention"),
    "timm SiLU": (timm_narrow("BasicBlock", act_layer=nn.SiLU), 5, "act1 is a SiLU, not nn.ReLU"),
    "timm GroupNorm": (timm("resnet18", norm_layer="groupnorm"), 8, "bn1 is a GroupNorm, not nn.BatchNorm2d"),
    "torchvision quantizable": (
        lambda get: get("torchvision", "torchvision.models.quantization").resnet18(weights=None, quantize=False),
        8,
        "it is made for quantisation",
    ),
}


def build(make, get, dtype=torch.float64):
    torch.manual_seed(0)
    net = make(get)
    for m in net.modules():
        if isinstance(m, nn.Dropout):  # what it drops depends on the memory layout
            m.p = 0.0
        if getattr(m, "running_var", None) is not None:
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(std=0.2)
    return net.to(dtype)


def tensor_of(found):
    found = next(iter(found.values())) if isinstance(found, dict) else found
    return found if isinstance(found, torch.Tensor) else found.logits


def train(net, x, steps):
    """The last output, gradients and the whole state, counters among it."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    torch.manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        out = tensor_of(net(x))
        out.square().mean().backward()
        optimizer.step()
    gradients = {f"d{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients, **net.state_dict()}


def x_of(size):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def error_of(got, expected):
    """The largest relative L2 error of all tensors; counters must be the same."""
    assert got.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        if value.is_floating_point():
            worst = max(worst, float((got[name] - value).norm() / value.norm().clamp_min(1e-30)))
        else:
            assert torch.equal(got[name], value), name
    return worst


def compare(make, get, count, steps, size, limit):
    net = build(make, get)
    twin, classes = copy.deepcopy(net), [type(m) for m in net.modules()]
    x = x_of(size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fuse(net, strict=True)
        rows = explain(net, x).rows
        got, expected = train(net, x, steps), train(twin, x, steps)
    assert [(row.reason, row.backend) for row in rows] == [(None, "native")] * count
    assert error_of(got, expected) < limit(expected)
    assert sum(isinstance(m, fused_res.fusing.Fused) for m in net.modules()) == count
    assert [type(m) for m in unfuse(net).modules()] == classes


@pytest.mark.parametrize("name", SMALL)
def test_a_fused_network_trains_as_the_original(libraries, name):
    compare(SMALL[name][0], libraries, SMALL[name][1], steps=2, size=33, limit=lambda _: 1e-8)


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks_train_as_the_originals(libraries, name):
    """Within ten times what the memory layout changes in the original: so deep a network makes much of the last bit."""
    make, count = WHOLE[name]

    def limit(expected):
        net = build(make, libraries).to(memory_format=torch.channels_last)
        spread = error_of(train(net, x_of(64), 3), expected)
        assert spread < 1e-4
        return max(1e-10, 10 * spread)

    compare(make, libraries, count, steps=3, size=64, limit=limit)


@pytest.mark.parametrize("name", LEFT)
def test_what_would_change_is_left_alone_and_explained(libraries, name):
    make, count, reason = LEFT[name]
    net = build(make, libraries, torch.float32)
    classes = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match="model: "):
        fuse(net, strict=True)
    assert [type(m) for m in fuse(net).modules()] == classes
    rows = explain(net.eval(), torch.randn(1, 3, 33, 33)).rows
    assert [(row.reason, row.backend) for row in rows] == [(reason, "eager")] * count


def test_anti_aliasing_and_attention_leave_the_other_blocks_fused(libraries):
    net = fuse(build(timm("resnetblur18"), libraries, torch.float32))
    reasons = [row.reason for row in explain(net, torch.randn(2, 3, 33, 33)).rows]
    assert reasons.count(None) == 5
    assert reasons.count("aa is a BlurPool2d, not nn.Identity") == 3


@pytest.mark.filterwarnings("ignore:fused_res")
def test_drop_path_and_drop_block_run_unfused_in_training_and_fused_in_evaluation(libraries):
    net = build(timm_narrow("BasicBlock", drop_path_rate=0.3, drop_block_rate=0.1), libraries)
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 33, 33, dtype=torch.float64)
    fuse(net, strict=True)
    reasons = [row.reason for row in explain(net, x).rows]
    assert reasons[0] is None  # its rate is 0
    assert "drop_path drops at random (drop_prob=0.3)" in reasons[-1] or "drop_block drops at random" in reasons[-1]
    got, expected = train(net, x, 1), train(twin, x, 1)
    torch.testing.assert_close(got["out"], expected["out"])
    assert {row.reason for row in explain(net.eval(), x).rows} == {None}
    torch.testing.assert_close(net(x), twin.eval()(x))


@pytest.mark.filterwarnings("ignore:fused_res")
def test_frozen_bns_of_another_dtype_than_the_images_run_unfused(libraries):
    net = build(fpn, libraries, torch.float32)
    twin, x = copy.deepcopy(net), torch.randn(1, 3, 33, 33)
    fuse(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(net, x).rows[0].reason == (
            "bn1 is a FrozenBatchNorm2d in torch.float32: it makes torch.float32 of images in torch.bfloat16"
        )
        out, expected = net(x), twin(x)
    assert all(torch.equal(out[name], expected[name]) for name in expected)
    net, twin, x = net.bfloat16(), twin.bfloat16(), x.bfloat16()
    assert {row.reason for row in explain(net, x).rows} == {None}
    truth = copy.deepcopy(twin).double()(x.double())
    for name, value in truth.items():
        got, eager = ((out[name].double() - value).norm() for out in (net(x), twin(x)))
        assert got <= 1.25 * eager, name


def test_networks_are_recognised_without_importing_their_libraries():
    for name in ("known", "anatomy", "fusing", "fusible", "traced", "reading"):
        source = importlib.import_module(f"fused_res.{name}").__file__
        with open(source) as file:
            assert not re.search(r"^\s*(from|import) (timm|torchvision|transformers)\b", file.read(), re.MULTILINE)
