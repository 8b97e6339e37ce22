"""Many steps of a block leave nothing behind, also where some of them fail."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from fused_res import Bottleneck, backends, use_backend
from fused_res.planner import LEVELS

pytestmark = pytest.mark.usefixtures("one_thread")

WARM, ROUNDS, STEPS = 50, 4, 500
FEW_OBJECTS = STEPS // 5
"""What Python and torch keep for later, whatever the number of steps; more steps than that fail."""
FEW_BYTES = 2**20
"""The smallest image that a step keeps for its backward has 2 KiB."""


def resident():
    """Bytes of memory that this process has touched."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def fails(call):
    try:
        call()
    except (RuntimeError, ValueError):
        return
    pytest.fail("expected an error")


def step(block, x, i):
    if i % 4 == 0:
        # Refused by the checks, of the arguments and of the batch; and between forward and backward.
        fails(lambda: block(x[:, :-1]))
        fails(lambda: block(x[:1, :, :1, :1]))
        fails(lambda: block(x).backward(torch.ones(2)))
    block(x).sum().backward()


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("native", LEVELS[-1]),
        pytest.param("native", LEVELS[0], marks=pytest.mark.long),
        pytest.param("reference", LEVELS[-1], marks=pytest.mark.long),
    ],
)
def test_many_steps_leave_nothing_behind(name, level):
    reason = backends.supports(name, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    block = Bottleneck(16, 4)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with use_backend(name, level):
        for i in range(WARM):
            step(block, x, i)
        gc.collect()
        gc.disable()
        try:
            # What is kept for later grows more and more slowly, and what others have left may go meanwhile; what each step leaves
            # behind is there in every round.
            for _ in range(ROUNDS):
                before, touched = sys.getallocatedblocks(), resident()
                for i in range(STEPS):
                    step(block, x, i)
                grown = resident() - touched
                # What was in a cycle would count here; collecting also frees what Python keeps to make objects of.
                cyclic = gc.collect()
                left = sys.getallocatedblocks() - before
                if max(left, cyclic) <= FEW_OBJECTS:
                    break
        finally:
            gc.enable()
    assert cyclic <= FEW_OBJECTS, f"{cyclic} objects of {STEPS} steps are in cycles"
    assert left <= FEW_OBJECTS, f"{left} blocks of Python's memory stay of {STEPS} steps"
    assert grown <= FEW_BYTES, f"{grown} bytes of memory stay of {STEPS} steps"
