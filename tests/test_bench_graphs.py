"""What capturing a step in a CUDA graph asks of all that the benchmark does before it, as far as a CPU shows it."""

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from fused_res.benchmarks import clocks, memory, peers, runner
from fused_res.benchmarks.cases import Case
from fused_res.benchmarks.peers import Setup

CPU = torch.device("cpu")
NAMES = ("eager channels_last", "eager NCHW", peers.BARE, peers.OURS)


class Watched:
    """A peer whose AccumulateGrad nodes can be told from those that are made later."""

    def __init__(self, peer, setup):
        parameters = peer.module.parameters() if peer.module is not None else ()
        self.leaves = [*(x for x, _ in setup.inputs(peer.layout)), *parameters]
        peer.step = self.marking(peer.step)
        peer.forward = peer.forward and self.marking(peer.forward)

    def marking(self, call):
        def marked(i):
            nodes = [get_gradient_edge(leaf).node for leaf in self.leaves]
            for node in nodes:
                node.metadata["made before"] = True
            return call(i)

        return marked

    def survivors(self):
        return sum("made before" in get_gradient_edge(leaf).node.metadata for leaf in self.leaves)


@pytest.fixture
def setup():
    return Setup(Case("small", "bottleneck", 32, 8, 8), 2, torch.float32, CPU)


@pytest.mark.parametrize("name", NAMES)
def test_measuring_what_is_saved_leaves_no_autograd_graph(setup, name):
    peer = peers.make(name, setup)
    watched = Watched(peer, setup)
    kept = peer.step(0)
    assert watched.survivors() or name == peers.BARE  # a graph that lives shows; bare convolutions give none away
    del kept
    assert not watched.survivors()
    if peer.forward is not None:
        assert memory.measure(peer, setup)["saved_bytes"] > 0
    assert not watched.survivors()


def test_no_autograd_graph_is_alive_when_steps_are_captured(setup, monkeypatch):
    """An AccumulateGrad node of before keeps a stream that is not capturing, and a gradient that reaches it ends the capture."""
    watched, seen, make = [], [], peers.make

    def made(name, setup):
        peer = make(name, setup)
        watched.append(Watched(peer, setup))
        return peer

    def replayed(ready, *_):
        seen.extend(one.survivors() for one in watched)
        return {}

    monkeypatch.setattr(peers, "make", made)
    monkeypatch.setattr(runner, "_replayed", replayed)
    rows = runner.run_case(setup, NAMES, rounds=1)
    assert [row["reason"] for row in rows] == [None] * len(NAMES)
    assert seen == [0] * len(NAMES)


def test_a_failed_capture_says_in_which_call_and_with_which_error():
    def convolution():
        raise ValueError("CUDA error: operation not permitted\nwhat follows is left out")

    def step():
        convolution()

    try:
        step()
    except ValueError as error:
        said = peers.first_line(clocks.CaptureFailedError("capture", error))
    assert said == ("CaptureFailedError: capture, in step > convolution: ValueError: CUDA error: operation not permitted")
