"""What evaluation has prepared of a block's weights follows every change of them that can be seen, and goes with the block."""

import copy
import gc
import operator
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from changes import CHANGES, by_a_new_tensor_on_the_same_memory, in_place, tensors
from compare import every, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import fused_res
from blocks import image, make
from fused_res import backends, folds
from fused_res.block import evaluation

WHY = backends.supports("native", torch.device("cpu"), torch.float32)
pytestmark = [pytest.mark.skipif(WHY is not None, reason=str(WHY)), pytest.mark.usefixtures("one_thread")]

KINDS = ("identity", "projection", "bottleneck", "pooled")


def served(kind="bottleneck", dtype=torch.float32, **options):
    return make(kind, dtype, **options).eval()


def fresh(block, x):
    """What the block gives where nothing is kept of it: a copy has no fold."""
    with torch.no_grad():
        return copy.deepcopy(block)(x)


def is_kept(block):
    fold = folds._folds.get(id(block))
    return fold is not None and bool(fold.made)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["projection", "bottleneck"])
def test_every_change_of_every_tensor_is_followed(kind, change):
    block = served(kind)
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        for name in tensors(block):
            before = block(x)
            assert is_kept(block)
            change(block, name, tensors(block)[name])
            after = block(x)
            same(after, fresh(block, x), name)
            assert not torch.equal(after, before), f"{name} makes no difference"


def _without(field):
    """`Sources.hold` and `Sources.are_unchanged` as they would be if they did not look at this."""

    def hold(self, tensors):
        return all(
            asked
            for name, asked in {
                "tensor": all(map(operator.is_, tensors, self.tensors)),
                "version": [tensor._version for tensor in tensors] == self.versions,
                "pointer": [tensor.data_ptr() for tensor in tensors] == self.places,
                "strides": [tensor.stride() for tensor in tensors] == self.strides,
                "storage": not any(storage.expired() for storage in self.storages),
            }.items()
            if name != field
        )

    # Who asks this has seen that they are the same tensors in the same strides.
    return hold, lambda self: hold(self, self.tensors)


def _turned(block, memory):
    block.conv2.weight.data = block.conv2.weight.data.transpose(2, 3)


def _elsewhere(block, memory):
    block.conv1.weight.data = block.conv1.weight.data * 0.5


def _where_it_was(block, memory):
    """Other memory that was given out at the address of the old one."""
    memory *= 0.5
    block.conv1.weight.data = torch.from_numpy(memory)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("version", lambda block, memory: in_place(block, "", block.conv1.weight)),
        ("tensor", lambda block, memory: by_a_new_tensor_on_the_same_memory(block, "conv1.weight", block.conv1.weight)),
        ("pointer", _elsewhere),
        ("strides", _turned),
        ("storage", _where_it_was),
    ],
)
def test_each_part_of_what_is_looked_at_is_needed(field, change, monkeypatch):
    def changed():
        block = served("identity")
        memory = np.ascontiguousarray(block.conv1.weight.detach().numpy().copy())
        block.conv1.weight.data = torch.from_numpy(memory)
        x = image(block, dtype=torch.float32)
        with torch.no_grad():
            block(x)
            old = block.conv1.weight.data if field == "pointer" else None  # noqa: F841, keeps the memory
            change(block, memory)
            return torch.equal(block(x), fresh(block, x))

    assert changed()
    hold, are_unchanged = _without(field)
    monkeypatch.setattr(folds.Sources, "hold", hold)
    monkeypatch.setattr(folds.Sources, "are_unchanged", are_unchanged)
    assert not changed()


@pytest.mark.parametrize("kind", KINDS)
def test_training_between_two_evaluations_is_followed(kind):
    block, x = served(kind), image(served(kind), dtype=torch.float32)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    with torch.no_grad():
        block(x)
    block.train()
    for _ in range(2):
        block(x).square().mean().backward()
        optimizer.step()
    assert not is_kept(block)  # training needs no memory for it
    block.eval()
    with torch.no_grad():
        same(block(x), fresh(block, x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("how", ["fused", "foreach", None])
def test_steps_of_optimizers_are_followed_with_evaluations_in_between(optimizer, how):
    block, other = served(), served()
    x = image(block, dtype=torch.float32)
    steps = optimizer(block.parameters(), lr=0.1, **({} if how is None else {how: True}))
    with torch.no_grad():
        other(x)
    for _ in range(2):
        loss = block(x).square().mean()
        with torch.no_grad():
            before = block(x)
            assert is_kept(block)
        loss.backward()
        steps.step()
        with torch.no_grad():
            same(block(x), fresh(block, x))
            assert not torch.equal(block(x), before)
    assert is_kept(other)  # nobody has stepped it


def test_batches_in_training_mode_without_gradients_are_followed():
    block = served()
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        before = block(x)
        block.train()(x)  # moves the running statistics, in our own kernel
        block.eval()
        same(block(x), fresh(block, x))
        assert not torch.equal(block(x), before)


@pytest.mark.parametrize("kind", ["identity", "bottleneck"])
def test_conversions_are_followed(kind):
    block = served(kind)
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        first = block(x)
        block.half().float()
        rounded = block(x)
        same(rounded, fresh(block, x))
        assert not torch.equal(rounded, first)
        block.to(memory_format=torch.channels_last)
        same(block(x), fresh(block, x))
        same(block.bfloat16()(x.bfloat16()), fresh(block, x.bfloat16()))
        same(block.double()(x.double()), fresh(block, x.double()))


def test_numbers_of_the_children_are_followed():
    block = served("identity")
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        block(x)
        block.bn1.eps = 0.5
        same(block(x), fresh(block, x))
        block.conv1.padding, block.conv2.padding = (2, 2), (0, 0)
        same(block(x), fresh(block, x))


def test_averaged_weights_swapped_in_and_out_are_followed():
    block, x = served(), image(served(), dtype=torch.float32)
    average = torch.optim.swa_utils.AveragedModel(block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        own = block(x)
        average.update_parameters(block)
        block.conv1.weight.mul_(0.5)
        average.update_parameters(block)
        swapped = {n: p.clone() for n, p in average.module.named_parameters()}
        for name, parameter in block.named_parameters():
            kept = parameter.clone()
            parameter.copy_(swapped[name])
            swapped[name] = kept
        same(block(x), fresh(block, x))
        given = torch.func.functional_call(block, swapped, (x,))
        same(block(x), fresh(block, x))
        assert not torch.equal(given, block(x))
        assert not torch.equal(own, block(x))


def test_what_pytorch_does_not_count_takes_a_refresh():
    model = nn.Sequential(served("identity"), served("identity"))
    x = image(model[0], dtype=torch.float32)
    with torch.no_grad():
        before = model(x)
        model[1].conv1.weight.data.mul_(0.5)
        same(model(x), before)  # the limit that the documentation names
        fused_res.refresh(model)
        same(model(x), fresh(model, x))
        model[0].bn2.bias.detach().numpy()[:] += 1
        fused_res.refresh()
        same(model(x), fresh(model, x))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module or None, got int"):
        fused_res.refresh(3)


def test_nothing_is_kept_where_gradients_may_follow():
    block = served()
    x = image(block, dtype=torch.float32)
    block(x).sum().backward()
    assert not is_kept(block)
    assert block.conv1.weight.grad is not None
    block.requires_grad_(False)
    block(x)
    assert is_kept(block)
    y = x.clone().requires_grad_()
    block(y).sum().backward()
    assert not is_kept(block)
    assert y.grad is not None


def test_nothing_is_kept_of_tensors_without_a_count():
    with torch.inference_mode():
        block = served()
        x = image(block, dtype=torch.float32)
        first = block(x)
        assert not is_kept(block)
        block.conv1.weight.mul_(0.5)
        assert not torch.equal(block(x), first)
    usual = served()
    with torch.inference_mode():
        usual(x)
        assert is_kept(usual)
    with torch.no_grad():
        same(usual(x.clone()), fresh(usual, x.clone()))


def test_nothing_is_kept_of_memory_that_other_processes_share():
    block = served()
    block.share_memory()
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        block(x)
    assert not is_kept(block)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["fully_shard", "original parameters", "flat parameters"])
def test_nothing_is_kept_of_what_fsdp_manages(way, one_process):
    block, plain = served("projection"), served("projection")
    x = image(block, dtype=torch.float32)
    if way == "fully_shard":
        sharded = fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    else:
        sharded = FullyShardedDataParallel(block, device_id=torch.device("cpu"), use_orig_params=way == "original parameters")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(sharded(x), fresh(plain, x), rtol=1e-5, atol=1e-6)
            assert not is_kept(block)
            if way == "fully_shard":
                sharded.reshard()
            for module in (sharded, plain):
                for parameter in module.parameters():
                    (parameter.to_local() if isinstance(parameter, DTensor) else parameter).mul_(0.5)


def test_nothing_is_kept_while_somebody_traces():
    block = served()
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        torch.jit.trace(block, (x,), check_trace=False)
        torch.export.export(block, (x,))
    assert not is_kept(block)


def test_what_is_kept_is_not_part_of_the_block():
    block = served()
    x = image(block, dtype=torch.float32)
    names, attributes = list(block.state_dict()), set(vars(block))
    with torch.no_grad():
        block(x)
    assert is_kept(block)
    assert list(block.state_dict()) == names
    assert set(vars(block)) == attributes
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert not is_kept(other)
        with torch.no_grad():
            same(other(x), block(x))


def test_it_is_freed_with_the_block_and_bounded():
    block = served()
    with torch.no_grad():
        for size in range(5, 15):
            block(image(block, size=size, dtype=torch.float32))
    assert len(folds._folds[id(block)].made) == folds._MOST
    key, weight = id(block), weakref.ref(block.conv1.weight)
    del block
    gc.collect()
    assert key not in folds._folds
    assert weight() is None


@pytest.mark.parametrize("kind", ["identity", "projection", "bottleneck"])
def test_batches_of_all_sizes_share_what_is_prepared(kind, monkeypatch):
    block = served(kind)
    made, prepare = [], evaluation.prepare
    monkeypatch.setattr(evaluation, "prepare", lambda *a: made.append(a[2]) or prepare(*a))
    with torch.no_grad():
        expected = [fresh(block, image(block, n, dtype=torch.float32)) for n in range(1, 9)]
        made.clear()
        for _ in range(2):
            for n in (3, 8, 1, 2, 4, 5, 6, 7):
                torch.testing.assert_close(block(image(block, n, dtype=torch.float32)), expected[n - 1])
    assert len(made) <= 2  # with so few pixels that a kernel of ours declines, another one
    fold = folds._folds[id(block)]
    assert len(fold.calls) == 8
    assert len({id(call) for call, _ in fold.calls.values()}) == 8


def test_calls_of_more_sizes_than_are_remembered_stay_right(monkeypatch):
    monkeypatch.setattr(folds, "_MOST_CALLS", 3)
    block = served()
    with torch.no_grad():
        for n in (1, 2, 3, 4, 5, 1, 4):
            x = image(block, n, dtype=torch.float32)
            torch.testing.assert_close(block(x), fresh(block, x))
    assert len(folds._folds[id(block)].calls) <= 3


def test_the_weights_that_were_replaced_are_let_go_at_the_next_call():
    block = served()
    x = image(block, dtype=torch.float32)
    with torch.no_grad():
        block(x)
        old = weakref.ref(block.conv1.weight)
        block.load_state_dict(block.state_dict(), assign=True)
        block.conv1.weight = nn.Parameter(block.conv1.weight.detach().clone())
        block(x)
    gc.collect()
    assert old() is None


def test_threads_share_what_is_prepared(monkeypatch):
    block = served()
    x = image(block, dtype=torch.float32)
    made, prepare = [], evaluation.prepare
    monkeypatch.setattr(evaluation, "prepare", lambda *a: made.append(1) or prepare(*a))
    barrier, results = threading.Barrier(4), []

    def call():
        barrier.wait()
        with torch.no_grad():
            results.append(block(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    for result in results:
        same(result, results[0])


def test_threads_that_call_while_weights_are_swapped_see_one_set_or_the_other_once_they_are_swapped():
    block = served()
    x = image(block, dtype=torch.float32)
    states = [{n: t.clone() for n, t in block.state_dict().items()} for _ in range(2)]
    for name, tensor in states[1].items():
        states[1][name] = tensor * 0.5 if tensor.is_floating_point() else tensor
    expected = []
    for state in states:
        block.load_state_dict(state)
        expected.append(fresh(block, x))
    gate, stop, failures = threading.Lock(), threading.Event(), []
    current = [1]

    def serve():
        while not stop.is_set():
            with torch.no_grad():
                block(x)  # races with the swap: any result, but nothing of it may be kept
            with gate, torch.no_grad():
                if not torch.equal(block(x), expected[current[0]]):
                    failures.append(current[0])

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(40):
        with gate:
            block.load_state_dict(states[i % 2])
            current[0] = i % 2
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_write_while_it_is_prepared_is_not_missed(monkeypatch):
    block = served()
    x = image(block, dtype=torch.float32)
    prepare = evaluation.prepare

    def late(*arguments):
        found = prepare(*arguments)
        with torch.no_grad():
            block.conv1.weight.mul_(0.5)
        return found

    monkeypatch.setattr(evaluation, "prepare", late)
    with torch.no_grad():
        block(x)
        assert not is_kept(block)
        monkeypatch.setattr(evaluation, "prepare", prepare)
        same(block(x), fresh(block, x))
        every(block(x).isfinite())
