"""`fused_res.benchmarks.heap`: memory that was freed is not given back to the system."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from fused_res.benchmarks import heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep" and not heap.keep_freed():
    sys.exit(3)

def touch():
    blocks = [libc.malloc(2**24) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 2**24)
    for block in reversed(blocks):
        libc.free(block)

for _ in range(3):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if run.returncode == 3:
        pytest.skip("this malloc cannot be told")
    return int(run.stdout)


def test_memory_that_was_freed_is_kept():
    assert faults("keep") < 100 < faults("as it is")
