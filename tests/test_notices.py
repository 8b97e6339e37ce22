"""Warnings: which block they name, which line they point at, and how often they come."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from fused_res import BasicBlock


def _noticed(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if "fused_res" in str(w.message)]


def _net():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4)))
    for block in net[1]:
        block.conv2.register_forward_hook(lambda *args: None)
    return net


def test_the_block_is_named_as_in_the_model_and_the_line_is_the_callers():
    net, x = _net(), torch.randn(1, 3, 6, 6)
    line = inspect.currentframe().f_lineno + 1
    found = _noticed(lambda: net(x))
    assert [str(w.message) for w in found] == [
        "fused_res: 1.0 (BasicBlock) runs unfused, through its child modules: conv2 has a forward hook"
    ]
    assert (found[0].filename, found[0].lineno) == (__file__, line)
    assert found[0].category is UserWarning


def test_the_line_of_a_model_of_the_users_own_is_where_it_calls_the_block():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = _net()

        def forward(self, x):
            return self.stem(x)

    found = _noticed(lambda: Own()(torch.randn(1, 3, 6, 6)))
    assert "stem.1.0 (BasicBlock)" in str(found[0].message)
    lines, first = inspect.getsourcelines(Own.forward)
    assert found[0].lineno == first + next(i for i, text in enumerate(lines) if "self.stem" in text)


def test_a_library_between_is_passed_over(torchvision_resnet):
    net = torchvision_resnet.ResNet(BasicBlock, [1, 1, 1, 1]).eval()
    net.layer3[0].bn1 = nn.Identity()
    found = _noticed(lambda: net(torch.randn(1, 3, 32, 32)))
    assert [str(w.message).split(" runs")[0] for w in found] == ["fused_res: layer3.0 (BasicBlock)"]
    assert found[0].filename == __file__


def test_a_block_by_itself_goes_by_its_class():
    block = BasicBlock(4, 4)
    block.relu = nn.GELU()
    assert "fused_res: BasicBlock runs unfused" in str(_noticed(lambda: block(torch.randn(1, 4, 5, 5)))[0].message)


def test_each_matter_is_spoken_of_once_and_another_again():
    net, x = _net(), torch.randn(1, 3, 6, 6)
    assert len(_noticed(lambda: [net(x) for _ in range(3)])) == 1
    net[1][1].bn1 = nn.Identity()
    assert len(_noticed(lambda: net(x))) == 1


def test_warnings_turned_into_errors_are_raised_at_the_line():
    net = _net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"1\.0 \(BasicBlock\) runs unfused"):
            net(torch.randn(1, 3, 6, 6))
