"""Run one block from the installed wheel: not from the source tree, and with no development packages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

import fused_res
import fused_res.backends
import fused_res.benchmarks
import fused_res.kernels

for module in (fused_res, fused_res.kernels, fused_res.benchmarks):
    assert Path(sys.prefix) in Path(module.__file__).parents, f"{module.__file__} is not in {sys.prefix}"
for name in ("kernels", "benchmarks"):
    assert importlib.util.find_spec(name) is None, f"the wheel installs a top-level {name}"
assert importlib.util.find_spec("fused_res.benchmarks.conftest") is None, "the wheel installs the files of pytest benchmarks"

assert fused_res.backends.load("native").missing() is None, fused_res.backends.load("native").missing()

block = fused_res.Bottleneck(64, 16)
x = torch.randn(2, 64, 8, 8, requires_grad=True)
out = block(x)
out.square().sum().backward()
with fused_res.use_backend("native"):
    torch.testing.assert_close(block(x), out)
with fused_res.use_backend("eager"):
    torch.testing.assert_close(block(x), out)
assert x.grad.isfinite().all()
assert all(p.grad.isfinite().all() for p in block.parameters())
print(fused_res.explain(block, x.detach()))
subprocess.run([Path(sys.prefix) / "bin" / "fused-res", "info"], check=True)
