"""`move_statistics` against `nn.BatchNorm2d`'s own buffers."""

import pytest
import torch

from fused_res import backends
from fused_res.primitives import move_statistics as formula
from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.move_statistics import Move, move_statistics
from fused_res.spec import ConvBN

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
CHANNELS, SHAPE = 12, (3, 12, 2, 5)


def bn_of(dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    bn = torch.nn.BatchNorm2d(CHANNELS, **options).to(dtype)
    bn.running_mean.copy_(torch.randn(CHANNELS, generator=generator))
    bn.running_var.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
    return bn


def batch(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SHAPE, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)


def move_of(bn, y, bias=None):
    rows = y.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    partials, size = bn_stats(rows, backend="reference")
    vectors = bn_finalize(partials, size, len(rows), None, None, bn.eps, backend="reference")
    weight, momentum = torch.empty(CHANNELS, 1, 1, 1), bn.momentum
    unit = ConvBN(weight, bias, None, None, bn.running_mean, bn.running_var, bn.num_batches_tracked, momentum=momentum)
    return Move(unit, vectors, len(rows))


def buffers(*bns):
    return [buffer for bn in bns for buffer in bn.buffers()]


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, 1, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moves_as_batch_norm_does(cpu_backend, dtype, momentum):
    ours, theirs = ([bn_of(dtype, seed, momentum=momentum) for seed in range(2)] for _ in range(2))
    for step in range(3):
        ys = [batch(dtype, 10 * step + i) for i in range(2)]
        versions = [buffer._version for buffer in buffers(*ours)]
        move_statistics([move_of(bn, y) for bn, y in zip(ours, ys, strict=True)], backend=cpu_backend)
        assert all(b._version > before for b, before in zip(buffers(*ours), versions, strict=True))
        for bn, y in zip(theirs, ys, strict=True):
            bn(y)
    for a, b in zip(buffers(*ours), buffers(*theirs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_in_16_bits_are_rounded_once(cpu_backend, dtype):
    bn = bn_of(dtype)
    move, old = move_of(bn, batch(torch.float32)), [bn.running_mean.double(), bn.running_var.double()]
    move_statistics([move], backend=cpu_backend)
    var = move.vectors[1].double() * move.pixels / (move.pixels - 1)
    for new, before, value in zip((bn.running_mean, bn.running_var), old, (move.vectors[0].double(), var), strict=True):
        torch.testing.assert_close(new, (0.9 * before + 0.1 * value).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_a_bias_moves_the_mean(cpu_backend):
    ours, theirs = bn_of(), bn_of()
    bias, y = torch.linspace(-3, 3, CHANNELS).requires_grad_(), batch(torch.float32)
    move_statistics([move_of(ours, y, bias)], backend=cpu_backend)
    theirs(y + bias.detach().view(1, -1, 1, 1))
    for a, b in zip(buffers(ours), buffers(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_units_that_share_a_bn_move_it_one_after_the_other(cpu_backend):
    ours, theirs = bn_of(), bn_of()
    ys = [batch(torch.float32, seed) for seed in range(2)]
    move_statistics([move_of(ours, y) for y in ys], backend=cpu_backend)
    for y in ys:
        theirs(y)
    assert ours.num_batches_tracked == 2
    for a, b in zip(buffers(ours), buffers(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_without_running_statistics_only_the_counter_moves(cpu_backend):
    move, count = move_of(bn_of(), batch(torch.float32)), torch.tensor(4)
    bare = move.unit._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    move_statistics([move._replace(unit=bare)], backend=cpu_backend)
    move_statistics([move._replace(unit=bare._replace(num_batches_tracked=count))], backend=cpu_backend)
    assert count == 5


@pytest.mark.parametrize("given", ["another counter", "strided", "plain"])
def test_buffers_of_every_kind(cpu_backend, monkeypatch, given):
    """The compiled operator takes plain buffers; the formula moves all others."""
    calls, plain = [], formula.plain
    monkeypatch.setattr(formula, "plain", lambda moves: calls.append(moves) or plain(moves))
    bn, y = bn_of(), batch(torch.float32)
    theirs, move = bn_of(), move_of(bn, y)
    if given == "another counter":
        move = move._replace(unit=move.unit._replace(num_batches_tracked=torch.tensor([0.0])))
    if given == "strided":
        strided = torch.stack([move.unit.running_mean, move.unit.running_mean], 1)[:, 0]
        move = move._replace(unit=move.unit._replace(running_mean=strided))
    move_statistics([move], backend=cpu_backend)
    theirs(y)
    torch.testing.assert_close(move.unit.running_mean, theirs.running_mean)
    torch.testing.assert_close(move.unit.running_var, theirs.running_var)
    assert move.unit.num_batches_tracked == 1
    assert (len(calls) == 0) == (cpu_backend == "native" and given == "plain")


@pytest.mark.skipif(WHY is not None, reason=str(WHY))
def test_infinite_statistics_stay_infinite():
    bn = bn_of()
    bn.running_mean[0], bn.running_var[1] = float("inf"), float("nan")
    move_statistics([move_of(bn, batch(torch.float32))], backend="native")
    assert bn.running_mean[0] == float("inf")
    assert bn.running_var[1].isnan()
    assert bn.running_mean[1:].isfinite().all()
