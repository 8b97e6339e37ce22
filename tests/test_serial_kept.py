"""A network in evaluation as one call: what is kept for it, when that is let go of, and threads that write meanwhile."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from compare import same
from serial_networks import (
    AGAIN,
    combine,
    drawn,
    images,
    marks,
    one_by_one,
    served,
)
from torch import nn

from fused_res import network, refresh, serial, unfuse
from fused_res.block import evaluated

pytestmark = marks


def memory_of(net):
    """Weak references to all that a network's combined calls hold of what was prepared."""
    made = vars(net)[network._MADE]
    found = [together for part in made.stands_in.values() if isinstance(part, serial.Serial) for together in part._together]
    assert found
    return [weakref.ref(tensor) for together in found for tensor in together._tensors]


def are_gone(references):
    gc.collect()
    return all(reference() is None for reference in references)


GOING = {
    "refresh": refresh,
    "refresh of all": lambda net: refresh(),
    "refresh of the blocks and the stem": lambda net: [refresh(module) for module in net.children()],
    "unfuse": lambda net: refresh(unfuse(net)),
}


@pytest.mark.parametrize("how", GOING)
def test_what_was_prepared_is_let_go_of(how, runs):
    net, x = served(), images()
    combine(net, x, runs)
    references = memory_of(net)
    assert len(references) > 10
    GOING[how](net)
    assert are_gone(references)


def test_what_was_prepared_goes_with_the_network(runs):
    net, x = served(), images()
    combine(net, x, runs)
    references = [*memory_of(net), weakref.ref(net), weakref.ref(net.conv1.weight), weakref.ref(net.layer1[0])]
    del net
    assert are_gone(references)


def test_what_was_prepared_of_weights_that_have_changed_is_let_go_at_the_next_call(runs):
    net, x = served(), images()
    combine(net, x, runs)
    references, old = memory_of(net), weakref.ref(net.conv1.weight)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
        net(x)
    assert are_gone(references)
    net.conv1.weight = nn.Parameter(net.conv1.weight.detach().clone())
    with torch.no_grad():
        net(x)
    assert are_gone([old])


def test_a_write_while_programs_are_put_together_is_not_missed(runs, monkeypatch):
    net, x = served(), images()
    of_block, last = serial._program_of, net.layer4[0]

    def late(block, image):
        found = of_block(block, image)
        if block is last:  # as another thread may
            net.layer1[0].conv1.weight.detach().mul_(0.5)
        return found

    with torch.no_grad():
        before = [net(x) for _ in range(serial._FIRST - 1)][-1]
        monkeypatch.setattr(serial, "_program_of", late)
        net(x)
        monkeypatch.setattr(serial, "_program_of", of_block)
        expected = one_by_one(net, x)
        assert not torch.equal(expected, before)
        for _ in range(3):
            same(net(x), expected)


def test_a_refresh_while_programs_are_put_together_is_not_missed(runs, monkeypatch):
    net, x = served(), images()
    of_block, last = serial._program_of, net.layer4[0]

    def late(block, image):
        found = of_block(block, image)
        if block is last:
            net.layer1[0].conv1.weight.data.mul_(0.5)
            refresh(net)
        return found

    with torch.no_grad():
        for _ in range(serial._FIRST - 1):
            net(x)
        monkeypatch.setattr(serial, "_program_of", late)
        net(x)
        monkeypatch.setattr(serial, "_program_of", of_block)
        expected = one_by_one(net, x)
        for _ in range(3):
            same(net(x), expected)


def test_what_was_recorded_of_weights_is_not_taken_for_that_of_others(monkeypatch):
    net, x = served(), images()
    block, run = net.layer1[0], evaluated.program.run
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)

    def late(*arguments):
        out = run(*arguments)
        monkeypatch.setattr(evaluated.program, "run", run)
        block.conv1.weight.detach().mul_(0.5)  # as other threads may
        block(x)
        return out

    with torch.no_grad():
        before = block(x)
        monkeypatch.setattr(evaluated.program, "run", late)
        same(block(x), before)
        expected = copy.deepcopy(block)(x)
        assert not torch.equal(expected, before)
        for _ in range(3):
            same(block(x), expected)


def test_threads_that_call_while_weights_are_swapped_see_one_set_or_the_other(runs):
    net, x = served(), images()
    states = [{name: t.clone() for name, t in net.state_dict().items()}, drawn(seed=5).state_dict()]
    expected = []
    for state in states:
        net.load_state_dict(state)
        expected.append(one_by_one(net, x))
    gate, stop, failures, current = threading.Lock(), threading.Event(), [], [1]

    def serve():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    net(x)  # races with the swap: any result, but nothing of it may be kept
                for _ in range(5):
                    with gate, torch.no_grad():
                        if not torch.equal(net(x), expected[current[0]]):
                            failures.append(current[0])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(16):
        with gate:
            net.load_state_dict(states[i % 2])
            refresh(net)  # so that it is one call soon again
            current[0], before = i % 2, len(runs)
        for _ in range(200):  # until it is one call, for some time
            if len(runs) > before + 3 or stop.wait(0.005):
                break
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(runs) > 3
    with torch.no_grad():
        same(net(x), expected[1])


def test_threads_that_call_together_get_what_one_gets(runs):
    net, x = served(), images()
    expected, results = one_by_one(net, x), []
    barrier = threading.Barrier(4)

    def call():
        barrier.wait()
        with torch.no_grad():
            results.extend(net(x) for _ in range(2 * AGAIN // 4))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * (2 * AGAIN // 4)
    for result in results:
        same(result, expected)
    assert runs


def test_a_second_call_while_the_first_is_under_way_has_its_layout(monkeypatch):
    """As another thread may make it: what layout comes out is not known by then."""
    net, x = served(), images(size=64)
    net.avgpool, net.fc = torch.nn.Identity(), torch.nn.Identity()
    inside, plain = [], serial.Serial._one_by_one

    def twice(self, *arguments):
        monkeypatch.setattr(serial.Serial, "_one_by_one", plain)
        inside.append(self(x))
        return plain(self, *arguments)

    monkeypatch.setattr(serial.Serial, "_one_by_one", twice)
    with torch.no_grad():
        net(x)
    assert inside[0].is_contiguous(memory_format=torch.channels_last)
    assert not inside[0].is_contiguous()
