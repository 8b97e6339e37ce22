"""Blocks under DistributedDataParallel and fully_shard: two processes on this machine over gloo.

The processes run this file as a script, so that they need nothing of pytest.
"""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_res
from blocks import Eager
from users import Functional

WORLD = 2
SCENARIOS = ("step", "eager step", "fused step", "frozen, two forwards", "two forwards", "channels_last", "float32")
ORDERS = ("fuse, shard", "shard, fuse")


def network(kind="ours"):
    """Two blocks with a 1x1 convolution among their parameters: ours, their modules run by hand, or somebody's that are fused."""
    torch.manual_seed(0)
    if kind == "fused":
        return fused_res.fuse(nn.Sequential(Functional(4, 8, 2), Functional(8, 8)), strict=True).double()
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    blocks = [fused_res.BasicBlock(4, 8, 2, shortcut), fused_res.Bottleneck(8, 2, residual_scale=0.5)]
    return nn.Sequential(*(Eager(b) if kind == "eager" else b for b in blocks)).double()


def images(scenario, rank):
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7 + rank))
    return x.float() if scenario == "float32" else x


def prepare(scenario):
    model = network({"eager step": "eager", "fused step": "fused"}.get(scenario, "ours"))
    if scenario == "frozen, two forwards":
        model.eval()
    # In float32 the library lays out the gradient of a 1x1 weight otherwise than the weight.
    model = model.float() if scenario == "float32" else model
    return model.to(memory_format=torch.channels_last) if scenario == "channels_last" else model


def run(scenario, module, x):
    """The scenario's forward passes and one backward."""
    out = module(x)
    if "two forwards" in scenario:
        out = out - 3 * module(x.flip(0) * 2)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()


def state(module):
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    return {n: p.grad.clone() for n, p in module.named_parameters()}, buffers


def shard(order, rank):
    """Output and mean gradients of a network that is fused and sharded, and what `unfuse` says to that."""
    model = fused_res.unfuse(network("fused"))
    if order == "fuse, shard":
        fused_res.fuse(model, strict=True)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    if order == "shard, fuse":
        fused_res.fuse(model, strict=True)
    out = model(images(order, rank))
    out.square().sum().backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    try:
        fused_res.unfuse(model)
    except RuntimeError as error:
        return out.detach(), gradients, str(error)
    return out.detach(), gradients, [type(block).__name__ for block in model]


def worker(rank, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=WORLD)
    results = {}
    for scenario in SCENARIOS:
        model = prepare(scenario)
        parallel = DistributedDataParallel(model)
        # The second time, gradients are views of buckets and buffers have been broadcast.
        for _ in range(2):
            parallel.zero_grad()
            run(scenario, parallel, images(scenario, rank))
        results[scenario] = state(model)
        parallel(images(scenario, rank))
        results[f"{scenario}: broadcast buffers"] = state(model)[1]
    for order in ORDERS:
        results[order] = shard(order, rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank saved."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(WORLD)
    ]
    try:
        output = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(output)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)], "\n".join(output)


def tolerance(scenario):
    return {"rtol": 1e-4, "atol": 1e-4} if scenario == "float32" else {"rtol": 1e-9, "atol": 1e-11}


def single(scenario):
    """The ranks' mean gradients, and rank 0's buffers, without processes: every forward starts from rank 0's buffers."""
    models = [prepare(scenario) for _ in range(WORLD)]
    for _ in range(2):
        before = copy.deepcopy(dict(models[0].named_buffers()))
        for rank, model in enumerate(models):
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            model.zero_grad()
            run(scenario, model, images(scenario, rank))
    gradients = [state(model)[0] for model in models]
    return {n: sum(g[n] for g in gradients) / WORLD for n in gradients[0]}, state(models[0])[1]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_are_the_mean_over_processes_and_alike_on_all(results, scenario):
    (expected, buffers), near = single(scenario), tolerance(scenario)
    for rank in range(WORLD):
        gradients = results[0][rank][scenario][0]
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, **near, msg=lambda m, name=name: f"{name}: {m}")
    for name, value in buffers.items():
        torch.testing.assert_close(results[0][0][scenario][1][name], value, **near, msg=name)


def test_gradients_and_buffers_equal_those_of_eager_blocks(results):
    for rank in range(WORLD):
        ours, theirs = results[0][rank]["step"], results[0][rank]["eager step"]
        for got, expected in zip(ours, theirs, strict=True):
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("order", ORDERS)
def test_sharding_and_fusing_go_in_either_order_and_unfusing_says_where_it_cannot(results, order):
    expected = []
    for rank in range(WORLD):
        model = fused_res.unfuse(network("fused"))
        out, gradients, said = results[0][rank][order]
        torch.testing.assert_close(out, model(images(order, rank)))
        model(images(order, rank)).square().sum().backward()
        expected.append((state(model)[0], gradients))
        if order == "fuse, shard":
            assert said == "0: its class became FSDPFusedFunctional after it was fused (by fully_shard?): unfuse before"
        else:
            assert said == ["FSDPFunctional"] * 2
    for name in expected[0][0]:
        mean = sum(single[name] for single, _ in expected) / WORLD
        for _, gradients in expected:
            torch.testing.assert_close(gradients[name], mean, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_next_forward_starts_from_rank_zeros_buffers(results, scenario):
    before = dict(results[0][0][scenario][1])
    for rank in range(WORLD):
        after = results[0][rank][f"{scenario}: broadcast buffers"]
        model = prepare(scenario)
        model.load_state_dict({**model.state_dict(), **before})
        model(images(scenario, rank))
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(after[name], buffer, **tolerance(scenario), msg=name)


def test_no_process_printed_a_warning(results):
    assert "stride" not in results[1].lower()
    assert "warning" not in results[1].lower()


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
