"""Programs that launch kernels, on CPU tensors: over a driver that computes one kernel itself (`fake_driver.c`).

A program of its own, since nothing may be in the process that takes this driver for a GPU's. It says "done" where all is as it
should be.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from fake_gpu import load_driver

from fused_res.block import program
from fused_res.kernels import launching
from fused_res.kernels.launching import Again, Direct

SUM, FAULT = 4001, 4002
STREAM = 5


def add(a, b, scale, shift, function=SUM):
    """A launch of the driver's kernel, as a launcher of ours makes it: by itself computed here."""
    out = torch.empty_like(a)

    def by_itself(out, a, b, *numbers, stream=None):
        assert function == SUM
        assert stream is None, "Python's way was taken"
        out.copy_(a + scale * b + shift)

    arguments = out, a, b, a.numel(), scale, shift
    types = "*fp32", "*fp32", "*fp32", "i32", "fp32", "i64"
    parameters = (*zip(types, arguments, strict=True), ("*i8", None), ("*i8", None))
    again = Again(by_itself, arguments, {}, lambda tensor: STREAM, Direct(function, 1, 32, 0, parameters))
    launching._local.call(lambda: None if function == FAULT else by_itself(*arguments), lambda _: again)
    return out


def schedule(x, y):
    z = add(x, y, 0.5, 1 << 20)
    rows = z.view(2, -1)
    first = add(rows[1], rows[0], -2.0, -(1 << 20))
    return [add(first, first, 1.0, 0), rows.t(), torch.mm(rows, rows.t())]


def check_results(driver):
    programs, memory = {}, torch.randn(100)
    for start in (0, 5, 40):
        x, y = memory[start : start + 8], memory[start + 10 : start + 18]
        before = driver.fake_direct()
        found = program.run(programs, ("key",), schedule, (x, y), "triton")
        assert driver.fake_direct() - before == (0 if start == 0 else 3), start
        z = x + 0.5 * y + (1 << 20)
        first = z[4:] - 2.0 * z[:4] - (1 << 20)
        for got, expected in zip(found, (2 * first, z.view(2, 4).t(), z.view(2, 4) @ z.view(2, 4).t()), strict=True):
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride()
        assert start == 0 or driver.fake_stream() == STREAM


def check_errors():
    programs, x = {}, torch.ones(4)
    program.run(programs, ("key",), lambda x: add(x, x, 1.0, 0, FAULT), (x,), "triton")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error 700: the fake driver"):
            program.run(programs, ("key",), None, (x,), "triton")


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FAKE_SHARED"] = "0"
        driver = load_driver(Path(folder))
        check_results(driver)
        check_errors()
        print("done")


if __name__ == "__main__":
    main()
