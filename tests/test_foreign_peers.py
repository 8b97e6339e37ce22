"""Peers that need other packages: that they compute the block, and say so where the package is missing.

cuDNN's graphs and inplace_abn need a GPU; here they are wired up on stand-ins of their packages that compute with torch.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cudnn_stand_in as cudnn_stand_in_module
from fused_res.benchmarks import peers, runner
from fused_res.benchmarks.cases import Case, Network
from fused_res.benchmarks.peers import Setup

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CASES = (
    Case("basic", "basic", 8, 8, 6),
    Case("basic projection", "basic", 8, 16, 7, 2),
    Case("bottleneck", "bottleneck", 16, 4, 6),
    Case("grouped projection", "bottleneck", 16, 8, 7, 2, groups=4, base_width=32),
)
EAGER = ("eager NCHW", "eager channels_last")


def row_of(name, case, mode, dtype=torch.float32):
    return runner.run_case(Setup(case, 2, dtype, CPU, mode), (*EAGER, name), rounds=1)[-1]


@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO"])
@pytest.mark.parametrize("case", [*CASES, Network("tiny", "basic", (1, 1, 1, 1))], ids=lambda case: case.name)
def test_inference_engines(name, case, monkeypatch):
    for package in ("onnx", {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}[name]):
        pytest.importorskip(package)
    monkeypatch.setattr("fused_res.benchmarks.cases.IMAGE", 32)
    row = row_of(name, case, "eval")
    assert row["reason"] is None
    assert max(row["max_relative_error"].values()) < 1e-5
    assert row["bytes"] is None
    assert "CPU only" in row_of(name, case, "train")["reason"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO"])
def test_inference_engines_in_16_bits(name, dtype):
    for package in ("onnx", {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}[name]):
        pytest.importorskip(package)
    row = row_of(name, CASES[3], "eval", dtype)
    assert row["reason"] or max(row["max_relative_error"].values()) < 4 * torch.finfo(dtype).eps


MISSING = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino", "inplace_abn": "inplace_abn", "cuDNN graphs": "cudnn"}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_package_is_the_reason(name, monkeypatch):
    monkeypatch.setitem(sys.modules, MISSING[name], None)
    reason = row_of(name, CASES[0], "eval")["reason"]
    assert "not installed" in reason
    assert "fused-res[peers]" in reason


def test_foreign_peers_are_timed_where_they_belong():
    everywhere = {"eager NCHW", "eager channels_last", "torch.compile", "bare convolutions", "fused_res"}
    gpu = torch.device("cuda")
    assert set(peers.usual(CPU, "train")) == everywhere
    assert set(peers.usual(CPU, "eval")) == everywhere | {"ONNX Runtime", "OpenVINO"}
    assert set(peers.usual(gpu, "train")) == everywhere | {"torch.compile max-autotune", "inplace_abn"}
    assert set(peers.usual(gpu, "eval")) == everywhere | {"torch.compile max-autotune", "cuDNN graphs"}


class InPlaceABN(nn.BatchNorm2d):
    """The function of inplace_abn's layer, not in place."""

    def __init__(self, channels, eps, momentum, activation, activation_param=0.01):
        super().__init__(channels, eps, momentum)
        self.slope = {"identity": 1.0, "leaky_relu": activation_param}[activation]

    def forward(self, x):
        return F.leaky_relu(super().forward(x), self.slope)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inplace_abn_is_compared_with_its_own_function(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "inplace_abn", SimpleNamespace(InPlaceABN=InPlaceABN))
    row = row_of("inplace_abn", case, "train")
    assert row["reason"] is None
    assert row["saved_bytes"] > 0
    monkeypatch.setattr(InPlaceABN, "forward", nn.BatchNorm2d.forward)
    assert "differs from plain PyTorch" in row_of("inplace_abn", case, "train")["reason"]


@pytest.fixture
def cudnn_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_stand_in_module)


@pytest.mark.usefixtures("cudnn_stand_in")
@pytest.mark.parametrize("mode", ["forward", "eval"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cudnn_graphs_are_the_block(case, mode):
    row = row_of("cuDNN graphs", case, mode)
    assert row["reason"] is None
    assert max(row["max_relative_error"].values()) < 1e-5


@pytest.mark.usefixtures("cudnn_stand_in")
def test_cudnn_graphs_say_what_they_cannot():
    assert "fused backward" in row_of("cuDNN graphs", CASES[0], "train")["reason"]
