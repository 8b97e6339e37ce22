"""Every option of `nn.BatchNorm2d`, alone and mixed inside one block."""

import copy
from functools import partial

import pytest
import torch
from compare import same
from torch import nn

import fused_res
from blocks import add_biases, assert_same, eager, every_block, image, make, step


def each_bn(block, change):
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            change(m)


def set_all(**values):
    def change(bn):
        for name, value in values.items():
            setattr(bn, name, value)

    return lambda block: each_bn(block, change)


OPTIONS = {
    "momentum None": ({"momentum": None}, lambda block: None),
    "momentum 0": ({"momentum": 0.0}, lambda block: None),
    "momentum 1": ({"momentum": 1.0}, lambda block: None),
    "eps": ({"eps": 0.1}, lambda block: None),
    "no affine": ({"affine": False}, lambda block: None),
    "no beta": ({}, set_all(bias=None)),
    "no gamma": ({}, set_all(weight=None)),
    "no tracking": ({"track_running_stats": False}, lambda block: None),
    "tracking ended": ({}, set_all(track_running_stats=False)),
    "no running statistics": ({}, set_all(running_mean=None, running_var=None)),
    "no counter": ({}, set_all(num_batches_tracked=None)),
    "momentum None without a counter": ({"momentum": None}, set_all(num_batches_tracked=None)),
    "biases": ({}, add_biases),
    "bn1 frozen": ({}, lambda block: block.bn1.eval()),
    "bn2 frozen": ({}, lambda block: block.bn2.eval()),
    "bn3 frozen": ({}, lambda block: block.bn3.eval()),
    "shortcut frozen": ({}, lambda block: block.downsample.eval()),
    "all frozen, tracking ended": ({}, lambda block: set_all(track_running_stats=False)(block.eval())),
    "biases, bn2 frozen": ({}, lambda block: (add_biases(block), block.bn2.eval())),
    "negative momentum": ({"momentum": -0.1}, lambda block: None),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_three_steps_with_bn_options_give_eagers_gradients_and_buffers(option, training):
    options, change = OPTIONS[option]
    block = make("pooled", norm_layer=partial(nn.BatchNorm2d, **options)).train(training)
    for name, value in options.items():
        setattr(block.downsample[-1], name, value) if name in ("momentum", "eps") else None
    change(block)
    peer, x = eager(block), image(block)
    for k in range(3):
        got, expected = step(block, x + k), step(peer, x + k)
        for name in [n for n in expected if n.endswith("bias") and "conv" in n and training and option == "biases"]:
            assert not got[name].any()
            assert expected[name].abs().max() < 1e-12
            expected[name] = got[name]
        assert_same(got, expected)


def test_bias_under_a_live_bn_has_an_exactly_zero_gradient_and_moves_the_running_mean():
    block = make("projection", torch.float32)
    add_biases(block)
    without = copy.deepcopy(block)
    for m in without.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = None
    x = image(block, dtype=torch.float32)
    got, other = step(block, x), step(without, x)
    for name in ("conv1", "conv2", "downsample.0"):
        same(got[f"d{name}.bias"], torch.zeros_like(got[f"d{name}.bias"]))
    torch.testing.assert_close(got["bn1.running_mean"], other["bn1.running_mean"] + 0.1 * block.conv1.bias)


POOLS = {
    "padding counted": nn.AvgPool2d(3, 2, 1),
    "padding left out": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ceil": nn.AvgPool2d((2, 3), 2, (0, 1), ceil_mode=True),
    "stride of the kernel": nn.AvgPool2d((2, 2)),
    "divisor": nn.AvgPool2d(3, 2, 1, divisor_override=4),
}


@pytest.mark.parametrize("pool", POOLS)
def test_every_option_of_the_shortcuts_pooling_is_obeyed(pool):
    block = make("pooled")
    block.downsample[0] = POOLS[pool]
    peer, x = eager(block), image(block, size=7 if pool == "ceil" else 8)
    assert fused_res.explain(block, x).rows[0].shortcut == ("as it is" if pool == "divisor" else "pooled projection")
    assert_same(step(block, x), step(peer, x))


@pytest.mark.parametrize("training", [True, False])
@every_block
def test_an_empty_batch_does_what_eager_does(kind, training):
    block = make(kind).train(training)
    peer, x = eager(block), image(block)[:0]
    assert_same(step(block, x), step(peer, x))


def test_units_that_share_a_bn_move_its_statistics_one_after_the_other():
    block = make("identity")
    block.bn2 = block.bn1
    peer, x = eager(block), image(block)
    peer.bn2 = peer.bn1
    assert_same(step(block, x), step(peer, x))
    assert block.bn1.num_batches_tracked == 2
