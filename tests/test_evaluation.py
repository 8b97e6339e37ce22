"""Evaluation without gradients on a CPU, on prepared weights: right to the rule of fused_res/accuracy.py."""

import copy
import itertools

import pytest
import torch
from compare import every, same
from torch import nn

import fused_res
from blocks import Eager, add_biases, image, make, projection
from fused_res import BasicBlock, Bottleneck, Chain, Residual, backends, explain, folds, planner, use_backend
from fused_res.accuracy import random_block
from fused_res.primitives import library
from fused_res.primitives.step import Step
from fused_res.spec import CHAIN, FORMS, LINEAR, LINEAR_CHAIN, PRE_ACTIVATION, Block, ConvBN
from fused_res.tolerance import MARGIN, floor

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.usefixtures("one_thread")]

SEEDS = 8


def pooled(inputs, outputs):
    return nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def without_affine(block):
    for name, bn in list(block.named_modules()):
        if isinstance(bn, nn.BatchNorm2d):
            block.set_submodule(name, nn.BatchNorm2d(bn.num_features, affine=False))
    return block


def dilated():
    return Bottleneck(32, 8, dilation=2)


CASES = {
    "basic": (lambda: BasicBlock(64, 64), 9),
    "basic, narrow": (lambda: BasicBlock(8, 8), 9),
    "basic, strided": (lambda: BasicBlock(32, 48, 2, projection(32, 48, 2)), 9),
    "bottleneck": (lambda: Bottleneck(128, 32), 9),
    "bottleneck, projection": (lambda: Bottleneck(64, 32, 1, projection(64, 128)), 9),
    "bottleneck, strided": (lambda: Bottleneck(64, 32, 2, projection(64, 128, 2)), 8),
    "resnet-d": (lambda: Bottleneck(64, 32, 2, pooled(64, 128)), 8),
    "resnext": (lambda: Bottleneck(128, 32, groups=8, base_width=16), 9),
    "dilated": (dilated, 9),
    "shortcut as it is": (lambda: BasicBlock(32, 48, 2, nn.Sequential(nn.Conv2d(32, 48, 3, 2, 1))), 9),
    "residual scale": (lambda: Bottleneck(128, 32, residual_scale=0.3), 9),
    "biases": (lambda: Bottleneck(128, 32), 9),
    "affine=False": (lambda: without_affine(BasicBlock(64, 64)), 9),
    "one pixel": (lambda: Bottleneck(64, 16), 1),
    "wide and small": (lambda: Bottleneck(512, 128), 4),
}


def build(case, seed):
    torch.manual_seed(seed)
    make_block, size = CASES[case]
    block = random_block(make_block(), seed)
    if case == "biases":
        add_biases(block)
    x = torch.randn(2, block.conv1.in_channels, size, size, dtype=torch.float64).relu()
    return block.eval(), x


def errors(case, dtype, channels_last, level, autocast=False):
    """Relative L2 errors over all seeds against float64, ours and eager's."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sums = {"ours": 0.0, "eager": 0.0, "truth": 0.0}
    for seed in range(SEEDS):
        block, x = build(case, seed)
        with torch.no_grad():
            truth = Eager(block)(x)
            ours = copy.deepcopy(block).to(torch.float32 if autocast else dtype).to(memory_format=layout)
            images = x.to(torch.float32 if autocast else dtype).contiguous(memory_format=layout)
            with torch.autocast("cpu", dtype, enabled=autocast):
                expected = Eager(ours)(images)
                if level is None:
                    got = ours(images)
                else:
                    with use_backend("native", level):
                        got = ours(images)
        assert folds._folds[id(ours)].made, "nothing was prepared"
        assert (got.dtype, got.stride()) == (expected.dtype, expected.stride())
        sums["ours"] += (got.double() - truth).square().sum().item()
        sums["eager"] += (expected.double() - truth).square().sum().item()
        sums["truth"] += truth.square().sum().item()
    return (sums["ours"] / sums["truth"]) ** 0.5, (sums["eager"] / sums["truth"]) ** 0.5


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_accurate_as_eager(case, channels_last):
    ours, eager = errors(case, torch.float32, channels_last, None)
    assert ours <= max(MARGIN * eager, floor(torch.float32))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["basic", "bottleneck, strided", "resnet-d", "resnext", "residual scale", "biases"])
def test_sixteen_bits_are_as_accurate_as_eager(case, dtype, autocast):
    ours, eager = errors(case, dtype, True, None, autocast)
    assert ours <= max(MARGIN * eager, floor(dtype))


@pytest.mark.parametrize("asked", ["library", "own"])
@pytest.mark.parametrize("level", ["epilogue", "prologue"])
def test_whoever_runs_the_convolutions_is_as_accurate(level, asked, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", asked)
    for case in ("basic", "resnet-d"):
        ours, eager = errors(case, torch.float32, True, level if case == "basic" else "epilogue")
        assert ours <= max(MARGIN * eager, floor(torch.float32))


@pytest.mark.parametrize("case", ["basic, narrow", "bottleneck, strided", "resnet-d", "resnext", "dilated"])
def test_without_the_librarys_fused_convolution_the_rest_follows_it(case, monkeypatch):
    monkeypatch.setattr(library, "fuses", lambda dtype: False)
    ours, eager = errors(case, torch.float32, True, None)
    assert ours <= max(MARGIN * eager, floor(torch.float32))


def simulated(unit, vectors, shape, relu, spare, kernel):
    """`library.fused` as an engine with instructions in 16 bits computes it: in float32, on operands and results of 16 bits."""
    weight, shift = (tensor.float() for tensor in library.folded(unit, vectors))
    steps = unit.stride, unit.padding, unit.dilation, unit.groups

    def step(x, skip):
        y = torch.conv2d(x.float(), weight, shift, *steps)
        y = y if skip is None else y + skip.float()
        return (y.relu() if relu else y).to(x.dtype).contiguous(memory_format=torch.channels_last)

    return Step(step, (weight, shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["basic", "bottleneck", "bottleneck, strided", "resnet-d", "resnext", "biases"])
def test_weights_folded_in_sixteen_bits_are_as_accurate_as_eager(case, dtype, monkeypatch):
    monkeypatch.setattr(library, "fuses", lambda asked: True)
    monkeypatch.setattr(library, "fused", simulated)
    ours, eager = errors(case, dtype, True, None)
    assert ours <= max(MARGIN * eager, floor(dtype))


@pytest.mark.skipif(not library.fuses(torch.bfloat16), reason="oneDNN has no bfloat16 convolutions for this CPU")
def test_the_library_runs_bfloat16_where_it_can():
    block, x = build("bottleneck", 0)
    row = explain(block.bfloat16(), x.bfloat16()).rows[0]
    assert row.who_convolves().startswith("library")


def test_a_scale_that_the_dtype_cannot_hold_is_not_folded(monkeypatch):
    monkeypatch.setattr(library, "fuses", lambda asked: True)
    monkeypatch.setattr(library, "fused", simulated)
    block, x = build("basic", 0)
    block = block.half()
    with torch.no_grad():
        block.bn1.weight.fill_(1e-3)
        block.bn1.running_var.fill_(1e4)
        got = block(x.half())
        assert list(folds._folds[id(block)].made.values()) == [None]
        every((got - Eager(block)(x.half())).abs() <= 1e-2)


@pytest.mark.parametrize("asked", ["auto", "library"])
@pytest.mark.parametrize("case", ["basic", "bottleneck, strided", "resnet-d", "resnext", "shortcut as it is"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_images_come_out(case, value, asked, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", asked)
    block, x = build(case, 0)
    block, x = block.float(), x.float().contiguous(memory_format=torch.channels_last)
    x[1, :, 4, 4] = value
    with torch.no_grad():
        got, expected = block(x), Eager(block)(x)
    assert expected.isnan().any()
    if asked == "library":
        same(got.isnan(), expected.isnan())
    every(got.isnan() | ~expected.isnan(), "NaN where eager's is")  # F(2x2, 3x3) makes NaN of some pixels beside, docs/winograd.md
    same(got[0].isfinite(), expected[0].isfinite())


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_odd_buffers_and_parameters_give_what_eager_gives(name, value):
    block, x = build("bottleneck", 0)
    block, x = block.float(), x.float()
    with torch.no_grad():
        getattr(block.bn2, name)[3] = value
        got, expected = block(x), Eager(block)(x)
    same(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4, equal_nan=True)


def test_a_variance_of_zero_is_held_by_eps():
    block, x = build("basic", 0)
    with torch.no_grad():
        for bn in (block.bn1, block.bn2):
            bn.running_var.zero_()
        truth = Eager(block)(x)
        got, expected = copy.deepcopy(block).float()(x.float()), Eager(copy.deepcopy(block).float())(x.float())
    assert (got - truth).norm() <= max(MARGIN * (expected - truth).norm(), floor(torch.float32) * truth.norm())


def test_an_image_that_is_a_view_and_a_batch_that_is_empty():
    block, x = build("bottleneck", 0)
    block, x = block.float(), x.float()
    with torch.no_grad():
        expected = block(x)
        wide = torch.zeros(4, 128, 9, 18)
        wide[::2, :, :, ::2] = x
        same(block(wide[::2, :, :, ::2]), expected)
        same(block(x[:1].expand(3, -1, -1, -1))[2:], expected[:1])
        assert block(x[:0]).shape == (0, 128, 9, 9)
        assert expected.data_ptr() not in (x.data_ptr(), block(x).data_ptr())


def test_an_image_does_not_depend_on_its_batch_and_calls_repeat_to_the_bit():
    block, x = build("bottleneck", 0)
    block, x = block.float(), x.float()
    with torch.no_grad():
        first = block(x)
        same(block(x), first)
        fused_res.refresh(block)
        same(block(x), first)
        same(x, build("bottleneck", 0)[1].float(), "the image is left as it was")


def test_frozen_norms_of_torchvision_are_folded():
    from torchvision_operators import load

    load()
    from torchvision.models.resnet import Bottleneck as Original
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    block = Original(128, 32, norm_layer=FrozenBatchNorm2d)
    for bn in (block.bn1, block.bn2, block.bn3):
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5), ("running_var", 0.5, 2)):
            nn.init.uniform_(getattr(bn, name), low, high)
    x = torch.randn(2, 128, 9, 9)
    with torch.no_grad():
        expected = block(x)
        fused_res.fuse(block, strict=True)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
        assert folds._folds[id(block)].made
        block.bn2.running_var.mul_(2)
        other = block(x)
        assert not torch.equal(other, expected)
        torch.testing.assert_close(other, fused_res.unfuse(block)(x), rtol=1e-4, atol=1e-5)


def test_explain_names_the_level_and_who_runs_what():
    block, x = build("bottleneck, projection", 0)
    block, x = block.float(), x.float()
    row = explain(block, x).rows[0]
    assert (row.backend, row.level) == ("native", "epilogue")
    assert row.who_convolves() == "own"
    assert {c.primitive for c in row.convolutions} == {"conv_bn_act"}
    grouped, x = build("resnext", 0)
    assert explain(grouped.float(), x.float()).rows[0].who_convolves() == "own/library (grouped)/own"


@pytest.mark.parametrize("level", ["bn_act", "moment"])
def test_a_level_that_is_asked_for_stands(level):
    block, x = build("bottleneck", 0)
    block, x = block.float(), x.float()
    with torch.no_grad(), use_backend("native", level):
        assert explain(block, x).rows[0].level == level
        block(x)
        assert id(block) not in folds._folds
    with torch.no_grad(), use_backend("reference"):
        block(x)
        assert id(block) not in folds._folds


def test_the_precision_of_float32_convolutions_is_asked_at_every_call(monkeypatch):
    block, x = make("bottleneck", torch.float32).eval(), image(make("bottleneck"), dtype=torch.float32)
    with torch.no_grad():
        block(x)
        monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "library")
        block(x)
    assert len(folds._folds[id(block)].made) == 2


def layers(*channels, kernel=3, groups=1, relu=True):
    """conv, BN, ReLU from each number of channels to the next; without the last ReLU unless `relu`."""
    found = []
    for into, out in itertools.pairwise(channels):
        found += [nn.Conv2d(into, out, kernel, 1, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return found if relu else found[:-1]


SEQUENCES = {
    CHAIN: lambda *channels, **options: Chain(*layers(*channels, **options)),
    LINEAR_CHAIN: lambda *channels, **options: Chain(*layers(*channels, relu=False, **options)),
    LINEAR: lambda *channels, **options: Residual(nn.Sequential(*layers(*channels, relu=False, **options)), residual_scale=0.5),
}
UNITS = {1: (16, 16), 3: (16, 32, 32, 16)}
CONVOLUTIONS = {"3x3": {}, "1x1": {"kernel": 1}, "grouped": {"groups": 4}}
sequences = pytest.mark.parametrize("form", SEQUENCES)
of_all_kinds = pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))


class Children(nn.Module):
    """What a chain, or a residual connection, calls, by hand."""

    def __init__(self, module):
        super().__init__()
        self.main = nn.Sequential(*(module if isinstance(module, Chain) else module.block))
        self.residual_scale = getattr(module, "residual_scale", None)

    def forward(self, x):
        out = self.main(x)
        return out if self.residual_scale is None else out * self.residual_scale + x


def sequence(form, units, options, seed=0):
    """A chain or a residual connection in float64, and x."""
    torch.manual_seed(seed)
    module = random_block(SEQUENCES[form](*UNITS[units], **options), seed).eval()
    assert module._anatomy.form == form
    assert len(module._anatomy.units) == units
    return module, torch.randn(2, 16, 9, 9, dtype=torch.float64)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_all_kinds
@pytest.mark.parametrize("units", UNITS)
@sequences
def test_chains_and_linear_blocks_are_as_accurate_on_prepared_weights_as_eager(form, units, options, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sums = {"ours": 0.0, "eager": 0.0, "truth": 0.0}
    for seed in range(SEEDS):
        module, x = sequence(form, units, options, seed)
        with torch.no_grad():
            truth = Children(module)(x)
            ours, images = copy.deepcopy(module).to(dtype), x.to(dtype).contiguous(memory_format=layout)
            expected, got = Children(ours)(images), ours(images)
            for _ in range(3):  # what is known by then of such calls makes no difference
                same(ours(images), got)
        assert folds._folds[id(ours)].made, "nothing was prepared"
        assert (got.dtype, got.stride()) == (expected.dtype, expected.stride())
        for name, error in (("ours", got - truth), ("eager", expected - truth), ("truth", truth)):
            sums[name] += error.square().sum().item()
    ours, eager = ((sums[name] / sums["truth"]) ** 0.5 for name in ("ours", "eager"))
    assert ours <= max(MARGIN * eager, floor(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_all_kinds
@pytest.mark.parametrize("units", UNITS)
@sequences
def test_nan_and_infinity_come_out_of_chains_and_linear_blocks(form, units, options, dtype, value, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "library")
    module, x = sequence(form, units, options)
    module, x = module.to(dtype), x.to(dtype).contiguous(memory_format=torch.channels_last)
    x[1, 3, 4, 4] = value
    with torch.no_grad():
        got, expected = module(x), Children(module)(x)
    assert folds._folds[id(module)].made
    assert not expected[1].isfinite().all()
    same(got.isnan(), expected.isnan())
    same(got.isfinite(), expected.isfinite())


@sequences
def test_changes_of_chains_and_linear_blocks_are_followed(form):
    module, x = sequence(form, 3, {})
    module, x = module.float(), x.float()
    layer = module[0] if isinstance(module, Chain) else module.block[0]
    with torch.no_grad():
        before = [module(x) for _ in range(3)][-1]
        layer.weight.mul_(0.5)
        after = module(x)
        same(after, copy.deepcopy(module)(x))
    assert not torch.equal(after, before)


def test_nothing_is_prepared_for_pre_activation_blocks():
    unit = ConvBN(torch.randn(8, 8, 1, 1), None, None, None, torch.zeros(8), torch.ones(8), training=False)
    levels = {form: planner.evaluation_level(Block([unit], form=form), torch.float32, "native") for form in FORMS}
    assert levels == {form: None if form == PRE_ACTIVATION else "epilogue" for form in FORMS}
