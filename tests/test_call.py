"""`fused_res.call`: what is worked out once, and when it is worked out again."""

import pytest
import torch

import fused_res
from fused_res import BasicBlock, plans, use_backend
from fused_res import call as calls


@pytest.fixture
def prepared(monkeypatch):
    """Lists the calls that were worked out."""
    found, prepare = [], calls._prepare

    def noting(*arguments, **options):
        found.append(prepare(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(calls, "_prepare", noting)
    with plans.afresh():
        yield found


def test_a_call_like_another_is_not_checked_again(prepared):
    block, x = BasicBlock(4, 4), torch.randn(2, 4, 6, 5)
    block(x)
    block(torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()).sum().backward()
    block.load_state_dict(BasicBlock(4, 4).state_dict())
    with torch.no_grad():
        block(x)
    assert len(prepared) == 1
    assert not prepared[0].watched


CHANGES = {
    "sizes": lambda block, x: x[:, :, 1:],
    "dtype": lambda block, x: (block.double(), x.double())[1],
    "evaluation": lambda block, x: (block.eval(), x)[1],
    "one BN in evaluation": lambda block, x: (block.bn2.eval(), x)[1],
    "eps": lambda block, x: (setattr(block.bn1, "eps", 1e-3), x)[1],
    "padding": lambda block, x: (setattr(block.conv1, "padding", (2, 2)), setattr(block.conv2, "padding", (0, 0)), x)[2],
    "no gamma": lambda block, x: (setattr(block.bn1, "weight", None), x)[1],
    "a bias": lambda block, x: (setattr(block.conv1, "bias", torch.nn.Parameter(torch.rand(4))), x)[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_call_is_worked_out_and_right(prepared, change):
    block, x = BasicBlock(4, 4), torch.randn(2, 4, 6, 5)
    block(x)
    x = CHANGES[change](block, x)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    out = block(x)
    assert len(prepared) == 2
    block.load_state_dict(state)
    with use_backend("eager"):
        expected = block(x)
    torch.testing.assert_close(out, expected)


def test_autocast_and_use_backend_are_other_calls(prepared):
    block, x = BasicBlock(4, 4), torch.randn(2, 4, 6, 5)
    block(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert block(x).dtype == dtype
    for level in ("bn_act", "epilogue"):
        with use_backend("reference", level):
            block(x)
    assert [call.level for call in prepared[-2:]] == ["bn_act", "epilogue"]
    assert [call.backend for call in prepared[-2:]] == ["reference"] * 2
    assert [call.casts for call in prepared] == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda block: setattr(block.conv2, "weight", torch.nn.Parameter(torch.rand(4, 3, 3, 3))), "conv2/bn2: given groups=1"),
        (lambda block: setattr(block.bn1, "running_mean", torch.zeros(3)), "conv1/bn1.running_mean should contain 4 elements"),
        (lambda block: block.bn2.half(), "conv2/bn2.gamma: expected torch.float32"),
        (lambda block: setattr(block.bn1, "eps", -1.0), "conv1/bn1.eps: batch normalisation needs a positive eps"),
    ],
)
def test_errors_are_not_forgotten(prepared, spoil, message):
    block, x = BasicBlock(4, 4), torch.randn(2, 4, 6, 5)
    block(x)
    spoil(block)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=message):
            block(x)


def test_parts_of_the_wrong_type_are_named_after_a_right_call():
    x, unit = torch.randn(2, 4, 3, 3), fused_res.ConvBN(torch.randn(4, 4, 1, 1))
    fused_res.residual_block(x, [unit])
    for arguments, message in (
        ((x, [unit], (1, 2)), "shortcut: expected a ConvBN"),
        ((x, [tuple(unit)]), "main: expected a non-empty sequence of ConvBN"),
        ((x, []), "main: expected a non-empty sequence of ConvBN"),
        (("x", [unit]), "x: expected a Tensor"),
        ((x, [unit._replace(weight=[1.0])]), "weight: expected a Tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            fused_res.residual_block(*arguments)
    with pytest.raises(TypeError, match="residual_scale: expected a Tensor"):
        fused_res.residual_block(x, [unit], residual_scale=0.5)
    with pytest.raises(TypeError, match="pool: expected an AvgPool"):
        fused_res.residual_block(x, [unit], unit, pool=[2, 2])


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(plans, "_MOST_DERIVED", 3)
    with plans.afresh():
        block = BasicBlock(4, 4)
        for size in range(3, 9):
            block(torch.randn(1, 4, size, size))
            assert len(plans._derived) <= 3
