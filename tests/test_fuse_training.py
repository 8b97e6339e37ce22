"""What people do in their training loops, with a fused model beside the original: the same parameters and buffers afterwards."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fused_res import explain, fuse
from users import Functional, Network, Scaled

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(block=Functional, dtype=torch.float64, level=None):
    torch.manual_seed(0)
    net = Network(block).to(dtype)
    return fuse(copy.deepcopy(net), level=level, strict=True), net


def batches(count=3, n=4, dtype=torch.float64):
    torch.manual_seed(1)
    return [(torch.randn(n, 3, 9, 9, dtype=dtype), torch.arange(n) % 5) for _ in range(count)]


def sgd(net):
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def plain(net):
    optimizer = sgd(net)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def accumulation(net):
    optimizer = sgd(net)
    for i, (x, y) in enumerate(batches(4)):
        (F.cross_entropy(net(x), y) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()


def frozen_bn(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.requires_grad_(False)
    plain(net)


def partly_frozen(net):
    net.stem.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    net.blocks[1].requires_grad_(False).eval()
    plain(net)


def channels_last(net):
    net.to(memory_format=torch.channels_last)
    plain(net)


def changing_modes(net):
    optimizer = sgd(net)
    for x, y in batches():
        net.train()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            net.eval()(x)


def reentrant(net):
    optimizer = sgd(net)
    for x, y in batches():
        layers = nn.Sequential(net.stem, *net.blocks)
        out = checkpoint_sequential(layers, 2, x.requires_grad_(), use_reentrant=True)
        F.cross_entropy(net.head(out.mean((2, 3))), y).backward()
        optimizer.step()


def not_reentrant(net):
    optimizer = sgd(net)
    for x, y in batches():
        F.cross_entropy(checkpoint(net, x, use_reentrant=False), y).backward()
        optimizer.step()


def optimizer_in_backward(net):
    def hook(parameter):
        with torch.no_grad():
            parameter -= 0.05 * parameter.grad
        parameter.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for x, y in batches():
        F.cross_entropy(net(x), y).backward()


def averaged(net):
    ema, swa = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)), AveragedModel(net, use_buffers=True)
    optimizer = sgd(net)
    for x, y in batches():
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        ema.update_parameters(net)
        swa.update_parameters(net)
    update_bn([x for x, _ in batches()], ema)
    return {f"ema.{k}": v for k, v in ema.state_dict().items()} | {f"swa.{k}": v for k, v in swa.state_dict().items()}


def sharpness_aware(net):
    """Two forwards and backwards for each step, the second at parameters moved along the gradient."""
    optimizer = sgd(net)
    for x, y in batches():
        F.cross_entropy(net(x), y).backward()
        moves = [0.05 * p.grad for p in net.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(net.parameters()), moves)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(net.parameters()), moves)
        optimizer.step()
        optimizer.zero_grad()


def gradient_penalty(net):
    optimizer = sgd(net)
    for x, y in batches():
        x = x.requires_grad_()
        loss = F.cross_entropy(net(x), y)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def clipped(net):
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for x, y in batches():
        F.cross_entropy(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def called_twice(net):
    optimizer = sgd(net)
    for x, y in batches():
        (F.cross_entropy(net(x), y) + F.cross_entropy(net(x.flip(3)), y)).backward()
        optimizer.step()


LOOPS = [
    plain,
    accumulation,
    frozen_bn,
    partly_frozen,
    channels_last,
    changing_modes,
    reentrant,
    not_reentrant,
    optimizer_in_backward,
    averaged,
    sharpness_aware,
    gradient_penalty,
    clipped,
    called_twice,
]


def assert_near(got, expected, limit):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            error = (got[name] - value).norm() / value.norm().clamp_min(1e-30)
            assert error < limit, f"{name}: {error}"
        else:
            assert got[name].equal(value), name


@pytest.mark.parametrize("level", [None, "moment"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_leaves_the_originals_parameters_and_buffers(loop, level):
    fused, net = pair(Scaled, level=level)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got, expected = ((loop(model) or {}) | model.state_dict() for model in (fused, net))
    assert_near(got, expected, 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_gradients_are_as_near_to_float32_as_eagers(dtype):
    """Over eight batches; with a GradScaler in float16, as always."""
    fused, net = pair(dtype=torch.float32)
    errors = [0.0, 0.0]
    for x, y in batches(8, 16, torch.float32):
        truth = copy.deepcopy(net)
        F.cross_entropy(truth(x), y).backward()
        for i, model in enumerate((fused, net)):
            scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(sgd(model))
            pairs = zip(model.parameters(), truth.parameters(), strict=True)
            errors[i] += sum(float((p.grad - q.grad).square().sum() / q.grad.square().sum()) for p, q in pairs)
            model.zero_grad()
    assert errors[0] ** 0.5 <= 1.25 * errors[1] ** 0.5


def test_an_overflow_in_float16_skips_the_step_as_in_eager():
    x, y = batches(1, 8, torch.float32)[0]
    states = []
    for model in pair(dtype=torch.float32):
        scaler, optimizer, scales = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1), sgd(model), []
        before = copy.deepcopy(dict(model.named_parameters()))
        for _ in range(60):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            if len(scales) == 1:
                assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            if scales[-1] > min(scales):
                break
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        states.append(scales)
    assert states[0][0] == states[1][0] == 2.0**59


def test_frozen_parameters_cost_no_weight_gradient(calls):
    fused, _ = pair()
    fused.blocks[1].conv1.weight.requires_grad_(False)
    fused(batches(1)[0][0]).sum().backward()
    # 5 of the main branches, and a projection
    assert calls["conv_wgrad"] == 6


def test_explain_says_what_a_level_buys():
    fused, _ = pair(Scaled, level="moment")
    rows = explain(fused, batches(1)[0][0]).rows
    assert all(row.level == "moment" and row.saved_bytes < row.eager_saved_bytes for row in rows)
