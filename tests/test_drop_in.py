"""Our blocks in place of torchvision's and timm's: same constructors, same state dicts, same numbers, same errors."""

import copy
import importlib
import importlib.util
import inspect
from functools import partial

import pytest
import torch
from compare import every, same
from torch import nn

import fused_res


def _randomise(module):
    """Give BN's parameters and buffers values that a swapped or forgotten one would show in."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)


def _networks(resnet, block, layers, dtype=torch.float64, **options):
    """Ours and torchvision's network with the same values, from one strict state dict."""
    torch.manual_seed(0)
    theirs = resnet.ResNet(getattr(resnet, block), layers, num_classes=10, **options)
    _randomise(theirs)
    ours = resnet.ResNet(getattr(fused_res, block), layers, num_classes=10, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert any(isinstance(m, getattr(fused_res, block)) for m in ours.modules())
    return ours.to(dtype), theirs.to(dtype)


def _train(model, images, labels, steps):
    """Losses, the last step's gradients, and the state afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses), **{f"d{k}": v for k, v in gradients.items()}, **model.state_dict()}


def _errors(ours, theirs):
    """Relative L2 error of every tensor; integers must agree exactly."""
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, expected in theirs.items():
        got = ours[name]
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        if expected.is_floating_point():
            every(got.isfinite())
            errors[name] = ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        else:
            same(got, expected, name)
    return errors


NETWORKS = {
    "resnet18": ("BasicBlock", [2, 2, 2, 2], {}),
    "resnet50": ("Bottleneck", [3, 4, 6, 3], {}),
    "resnext": ("Bottleneck", [2, 1, 1, 1], {"groups": 4, "width_per_group": 16}),
    "wide": ("Bottleneck", [1, 1, 1, 1], {"width_per_group": 96}),
    "dilated": ("Bottleneck", [1, 1, 2, 2], {"replace_stride_with_dilation": [False, True, True]}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n == "resnet50")) for n in NETWORKS])
def test_three_training_steps_and_an_evaluation_give_torchvisions_numbers(torchvision_resnet, name):
    block, layers, options = NETWORKS[name]
    ours, theirs = _networks(torchvision_resnet, block, layers, **options)
    images, labels = torch.randn(2, 3, 40, 40, dtype=torch.float64), torch.tensor([1, 7])  # of odd sizes from the second stage on
    nudged = copy.deepcopy(theirs)
    expected = _train(theirs, images, labels, 3)
    # Three steps of a deep network amplify rounding; how far, torchvision's own network tells, on images one ulp away.
    drift = max(_errors(_train(nudged, torch.nextafter(images, images + 1), labels, 3), expected).values())
    assert drift < 1e-6
    errors = _errors(_train(ours, images, labels, 3), expected)
    assert max(errors.values()) < 10 * drift, (drift, {k: v for k, v in errors.items() if v >= 10 * drift})
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-7, atol=1e-10)


def test_resnet18_in_float32_stays_within_rounding_of_torchvision(torchvision_resnet):
    ours, theirs = _networks(torchvision_resnet, *NETWORKS["resnet18"][:2], dtype=torch.float32)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([1, 7, 3, 0])
    errors = _errors(_train(ours, images, labels, 1), _train(theirs, images, labels, 1))
    # Gradients differ by single ReLU signs between any two float32 implementations.
    assert max(v for k, v in errors.items() if not k.startswith("d")) < 1e-4
    assert max(errors.values()) < 2e-2


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_state_dict_loads_strictly_both_ways_and_has_torchvisions_order(torchvision_resnet, name):
    ours, theirs = _networks(torchvision_resnet, *NETWORKS[name][:2])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert {n: type(m).__name__ for n, m in ours.named_modules()} == {n: type(m).__name__ for n, m in theirs.named_modules()}


def test_optimizer_state_of_torchvisions_network_continues_on_ours(torchvision_resnet):
    ours, theirs = _networks(torchvision_resnet, "BasicBlock", [1, 1, 1, 1])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (theirs, ours)]
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    theirs(images).square().sum().backward()
    optimizers[0].step()
    ours.load_state_dict(theirs.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    momenta = [[o.state[p].get("momentum_buffer") for p in m.parameters()] for o, m in zip(optimizers, (theirs, ours), strict=True)]
    by_name = [dict(zip(dict(m.named_parameters()), v, strict=True)) for m, v in zip((theirs, ours), momenta, strict=True)]
    for parameter, expected in by_name[0].items():
        torch.testing.assert_close(by_name[1][parameter], expected, rtol=0, atol=0, msg=parameter)


def test_frozen_batch_norm_layers_run_fused_and_give_torchvisions_numbers(torchvision_resnet):
    frozen = importlib.import_module("torchvision.ops").FrozenBatchNorm2d
    ours, theirs = _networks(torchvision_resnet, "Bottleneck", [1, 1, 1, 1], norm_layer=frozen)
    images, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 7])
    assert {row.reason for row in fused_res.explain(ours, images).rows} == {None}
    got = _train(ours, images, labels, 1)
    assert max(_errors(got, _train(theirs, images, labels, 1)).values()) < 1e-12


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_identity_block_with_zero_gamma_and_beta_returns_relu_of_x_exactly(block):
    torch.manual_seed(0)
    cls = getattr(fused_res, block)
    x = torch.randn(2, 8 * cls.expansion, 5, 5)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module = cls(8 * cls.expansion, 8)
        _randomise(module)
        module.zero_init_last()
        nn.init.zeros_(module._layers()[-1][1].bias)
        x = x.contiguous(memory_format=memory_format)
        same(module(x), x.relu())
        same(module.eval()(x), x.relu())


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_zero_init_last_does_what_torchvisions_zero_init_residual_does(torchvision_resnet, block):
    theirs = torchvision_resnet.ResNet(getattr(torchvision_resnet, block), [1, 1, 1, 1], zero_init_residual=True)
    ours = torchvision_resnet.ResNet(getattr(fused_res, block), [1, 1, 1, 1])
    for m in ours.modules():
        if isinstance(m, getattr(fused_res, block)):
            m.zero_init_last()
    zeros = [{n for n, p in m.named_parameters() if "bn" in n and n.endswith("weight") and not p.any()} for m in (ours, theirs)]
    assert zeros[0] == zeros[1]
    assert len(zeros[0]) == 4


def test_zero_init_last_without_gamma_says_which_norm_lacks_it():
    block = fused_res.BasicBlock(4, 4, norm_layer=partial(nn.BatchNorm2d, affine=False))
    with pytest.raises(RuntimeError, match="zero_init_last: bn2 has no weight"):
        block.zero_init_last()


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_constructor_takes_torchvisions_arguments_in_torchvisions_order(torchvision_resnet, block):
    theirs = list(inspect.signature(getattr(torchvision_resnet, block)).parameters.values())
    ours = list(inspect.signature(getattr(fused_res, block)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize(
    ("error", "options"),
    [(ValueError, {"groups": 2}), (ValueError, {"base_width": 128}), (NotImplementedError, {"dilation": 2})],
)
def test_constructor_refuses_what_torchvisions_refuses_in_its_words(torchvision_resnet, error, options):
    with pytest.raises(error) as theirs:
        torchvision_resnet.BasicBlock(8, 8, **options)
    with pytest.raises(error) as ours:
        fused_res.BasicBlock(8, 8, **options)
    assert str(theirs.value) in str(ours.value)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((32, 8, 8), torch.float32),
        ((2, 7, 8, 8), torch.float32),
        ((2, 32, 8, 8), torch.float64),
        ((2, 32, 8, 8), torch.int64),
        ((1, 32, 1, 1), torch.float32),
    ],
    ids=["three dimensions", "channels", "float64", "integers", "one value per channel"],
)
def test_bad_input_raises_torchvisions_exception_type(torchvision_resnet, block, shape, dtype):
    """x is too small, too wide or of the wrong type; buffers are then what torchvision leaves them at."""
    theirs = getattr(torchvision_resnet, block)(32, 32 // getattr(fused_res, block).expansion)
    ours = getattr(fused_res, block)(32, 32 // theirs.expansion)
    ours.load_state_dict(theirs.state_dict())
    x = torch.ones(shape).to(dtype)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(x)
    with pytest.raises((ValueError, RuntimeError)) as got:
        ours(x)
    assert type(got.value) is type(expected.value)
    for name, buffer in theirs.named_buffers():
        same(ours.get_buffer(name), buffer, name)


@pytest.mark.parametrize("value", [None, 0.0, 0.5])
def test_residual_scale_is_in_the_state_dict_only_if_asked_for(torchvision_resnet, value):
    ours = fused_res.BasicBlock(4, 4, residual_scale=value)
    theirs = torchvision_resnet.BasicBlock(4, 4)
    extra = set() if value is None else {"residual_scale"}
    assert set(ours.state_dict()) == set(theirs.state_dict()) | extra
    if value is not None:
        assert isinstance(ours.residual_scale, nn.Parameter)
        assert ours.state_dict()["residual_scale"].item() == value
        missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
        assert missing == ["residual_scale"]


def test_residual_scale_multiplies_the_main_branch_and_gets_its_gradient(torchvision_resnet):
    torch.manual_seed(0)
    ours = fused_res.Bottleneck(16, 4, residual_scale=0.25).double()
    theirs = torchvision_resnet.Bottleneck(16, 4).double()
    _randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    theirs.bn3.weight.data.mul_(0.25)
    theirs.bn3.bias.data.mul_(0.25)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-10, atol=1e-12)
    ours.zero_grad()
    ours(x).sum().backward()
    theirs(x).sum().backward()
    # a * (gamma n + beta): the gradient of a is that of gamma and beta of the scaled ones, weighted by the unscaled values
    expected = (theirs.bn3.weight.grad * ours.bn3.weight + theirs.bn3.bias.grad * ours.bn3.bias).sum()
    torch.testing.assert_close(ours.residual_scale.grad, expected.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 1}, {"stride": 1, "dilation": 2}], ids=["pool", "Identity", "same"])
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_resnet_d_shortcut_gives_timms_numbers(timm_resnet, block, options, size):
    torch.manual_seed(0)
    theirs = getattr(timm_resnet, block)
    width = 8 * theirs.expansion
    shortcut = timm_resnet.downsample_avg(6, width, 1, **options).double()
    theirs = theirs(6, 8, stride=options["stride"], downsample=shortcut).double()
    _randomise(theirs)
    ours = getattr(fused_res, block)(6, 8, stride=options["stride"], downsample=copy.deepcopy(shortcut)).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 6, size, size, dtype=torch.float64)
    kind = fused_res.explain(ours, x).rows[0].shortcut
    assert kind == ("as it is" if "dilation" in options else "projection" if options["stride"] == 1 else "pooled projection")
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        (out * weights).sum().backward()
        grads = {f"d{n}": p.grad for n, p in module.named_parameters()}
        results.append({"out": out.detach(), "dx": leaf.grad, **grads, **module.state_dict()})
    assert max(_errors(*results).values()) < 1e-10
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-12)
