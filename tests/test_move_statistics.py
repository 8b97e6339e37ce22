"""`move_statistics` against `nn.BatchNorm2d`'s own buffers."""

import pytest
import torch
from compare import every

from fused_res.primitives import move_statistics as formula
from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.move_statistics import Move, move_statistics
from fused_res.primitives.run import of
from fused_res.spec import ConvBN

CHANNELS, SHAPE = 12, (3, 12, 2, 5)


def bn_of(device, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    bn = torch.nn.BatchNorm2d(CHANNELS, **options).to(dtype)
    bn.running_mean.copy_(torch.randn(CHANNELS, generator=generator))
    bn.running_var.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
    return bn.to(device)


def batch(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SHAPE, generator=generator, dtype=torch.float64) * 2 + 3).to(device, dtype)


def move_of(bn, y, bias=None):
    rows = y.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    partials, size = bn_stats(rows, run=of("reference"))
    vectors = bn_finalize(partials, size, len(rows), None, None, bn.eps, run=of("reference"))
    weight, momentum = torch.empty(CHANNELS, 1, 1, 1, device=y.device), bn.momentum
    unit = ConvBN(weight, bias, None, None, bn.running_mean, bn.running_var, bn.num_batches_tracked, momentum=momentum)
    return Move(unit, vectors, len(rows))


def buffers(*bns):
    return [buffer for bn in bns for buffer in bn.buffers()]


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, 1, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moves_as_batch_norm_does(backend, device, dtype, momentum):
    ours, theirs = ([bn_of(device, dtype, seed, momentum=momentum) for seed in range(2)] for _ in range(2))
    for step in range(3):
        ys = [batch(device, dtype, 10 * step + i) for i in range(2)]
        versions = [buffer._version for buffer in buffers(*ours)]
        move_statistics([move_of(bn, y) for bn, y in zip(ours, ys, strict=True)], run=of(backend))
        assert all(b._version > before for b, before in zip(buffers(*ours), versions, strict=True))
        for bn, y in zip(theirs, ys, strict=True):
            bn(y)
    for a, b in zip(buffers(*ours), buffers(*theirs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_in_16_bits_are_rounded_once(backend, device, dtype):
    bn = bn_of(device, dtype)
    move, old = move_of(bn, batch(device)), [bn.running_mean.double(), bn.running_var.double()]
    move_statistics([move], run=of(backend))
    var = move.vectors[1].double() * move.pixels / (move.pixels - 1)
    for new, before, value in zip((bn.running_mean, bn.running_var), old, (move.vectors[0].double(), var), strict=True):
        torch.testing.assert_close(new, (0.9 * before + 0.1 * value).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_a_bias_moves_the_mean(backend, device):
    ours, theirs = bn_of(device), bn_of(device)
    bias, y = torch.linspace(-3, 3, CHANNELS, device=device).requires_grad_(), batch(device)
    move_statistics([move_of(ours, y, bias)], run=of(backend))
    theirs(y + bias.detach().view(1, -1, 1, 1))
    for a, b in zip(buffers(ours), buffers(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_units_that_share_a_bn_move_it_one_after_the_other(backend, device):
    ours, theirs = bn_of(device), bn_of(device)
    ys = [batch(device, seed=seed) for seed in range(2)]
    move_statistics([move_of(ours, y) for y in ys], run=of(backend))
    for y in ys:
        theirs(y)
    assert ours.num_batches_tracked == 2
    for a, b in zip(buffers(ours), buffers(theirs), strict=True):
        torch.testing.assert_close(a, b)


def test_without_running_statistics_only_the_counter_moves(backend, device):
    move, count = move_of(bn_of(device), batch(device)), torch.tensor(4, device=device)
    bare = move.unit._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    move_statistics([move._replace(unit=bare)], run=of(backend))
    move_statistics([move._replace(unit=bare._replace(num_batches_tracked=count))], run=of(backend))
    assert count == 5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_units_of_every_width_in_one_go(backend, device):
    """More channels than a program takes at once, one channel, a missing counter, momenta of every kind, and NaN where it was."""
    generator, moves, expected = torch.Generator().manual_seed(3), [], []
    kinds = ((1500, 0.1, 7, False), (1, None, 2, True), (33, None, None, True), (64, 1.0, 0, False))
    for channels, momentum, counter, with_bias in kinds:
        mean, var, bias = (torch.rand(channels, generator=generator).to(device) for _ in range(3))
        vectors = torch.rand(5, channels, generator=generator).to(device)
        vectors[0, 0] = float("nan")
        count = None if counter is None else torch.tensor(counter, device=device)
        unit = ConvBN(mean, bias if with_bias else None, None, None, mean.clone(), var.clone(), count, momentum=momentum)
        moves.append(Move(unit, vectors, 50))
        weight = momentum if momentum is not None else 0.0 if counter is None else 1 / (counter + 1)
        batch_mean = vectors[0].double() + (bias if with_bias else 0)
        moved = [(1 - weight) * old + weight * new for old, new in ((mean, batch_mean), (var, vectors[1].double() * 50 / 49))]
        expected.append((*moved, None if counter is None else counter + 1))
    move_statistics(moves, run=of(backend))
    for (unit, _, _), (mean, var, count) in zip(moves, expected, strict=True):
        torch.testing.assert_close(unit.running_mean, mean.float(), equal_nan=True)
        torch.testing.assert_close(unit.running_var, var.float())
        assert count is None or unit.num_batches_tracked == count


@pytest.mark.parametrize("given", ["another counter", "strided", "plain"])
def test_buffers_of_every_kind(backend, device, monkeypatch, given):
    """The compiled operator takes plain buffers; the formula moves all others."""
    calls, plain = [], formula.plain
    monkeypatch.setattr(formula, "plain", lambda moves: calls.append(moves) or plain(moves))
    bn, y = bn_of(device), batch(device)
    theirs, move = bn_of(device), move_of(bn, y)
    if given == "another counter":
        move = move._replace(unit=move.unit._replace(num_batches_tracked=torch.tensor([0.0], device=device)))
    if given == "strided":
        strided = torch.stack([move.unit.running_mean, move.unit.running_mean], 1)[:, 0]
        move = move._replace(unit=move.unit._replace(running_mean=strided))
    move_statistics([move], run=of(backend))
    theirs(y)
    torch.testing.assert_close(move.unit.running_mean, theirs.running_mean)
    torch.testing.assert_close(move.unit.running_var, theirs.running_var)
    assert move.unit.num_batches_tracked == 1
    own = backend == "triton" or (backend == "native" and device == "cpu")
    assert (len(calls) == 0) == (own and given == "plain")


def test_infinite_statistics_stay_infinite(backend, device):
    if backend == "reference" or (backend == "native" and device != "cpu"):
        pytest.skip("torch's own interpolation makes NaN of an infinity")
    bn = bn_of(device)
    bn.running_mean[0], bn.running_var[1] = float("inf"), float("nan")
    move_statistics([move_of(bn, batch(device))], run=of(backend))
    assert bn.running_mean[0] == float("inf")
    assert bn.running_var[1].isnan()
    every(bn.running_mean[1:].isfinite())
