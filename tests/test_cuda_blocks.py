"""Whole blocks at level `moment` through the CUDA kernels as they run on the CPU: `native` as on a GPU, with no Triton."""

import shutil

import cuda_operators
import emulated_backend
import pytest
import torch

from fused_res import Bottleneck, accuracy, explain, use_backend
from fused_res.backends import native
from fused_res.block import dry_run
from fused_res.primitives import choice as choices
from fused_res.tuning import steps

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PARTS = (
    cuda_operators.Normalisation,
    cuda_operators.Finalize,
    cuda_operators.Pointwise,
    cuda_operators.Moments,
    cuda_operators.TailBackward,
)
# What a Bottleneck at this level does beside its 3x3 convolution and its first one's way back.
STEPS = {
    *("pointwise_fprop", "bn_finalize", "bn_stats", "moments", "moments_finalize_direct", "pointwise_tail", "move_statistics"),
    *("scaled_weight", "pointwise_tail_backward_reduce", "pointwise_tail_backward_finalize_direct"),
    *("pointwise_tail_backward_apply", "bn_act_backward_finalize"),
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    operators = cuda_operators.Together(*(part(tmp_path_factory.mktemp("emulator")) for part in PARTS))
    yield operators
    operators.close()


@pytest.fixture
def backend(monkeypatch, operators):
    """The convolutions that it has are its own; float32 is TF32."""
    monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "own")
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "tf32"
    operators.calls.clear()
    yield emulated_backend.install(monkeypatch, operators, native.PRIMITIVES + native.CUDA_CALLS)
    conv.fp32_precision = before


def drawn(inplanes, planes, shape, stride=1):
    """Makes a block, its input and the incoming gradient from a seed."""

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        projection = None
        if stride != 1 or inplanes != 4 * planes:
            convolution = torch.nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False)
            projection = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(4 * planes))
        block = accuracy.random_block(Bottleneck(inplanes, planes, stride, projection), seed)
        n, h, w = shape
        sizes = (n, inplanes, h, w), (n, 4 * planes, -(-h // stride), -(-w // stride))
        return block, *(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)

    return make


def check(make, dtype, backend, operators, seeds=1):
    verdicts = accuracy.judge(make, dtype, backend, "moment", seeds=range(seeds), sign_tolerance=0.1)
    # Eager is not TF32 on a CPU: a value, and each of the few factors that it has passed, keeps 11 bits.
    failed = [v for v in verdicts if not (v.error <= 2.0**-9 if dtype == F32 else v.passed)]
    assert not failed, failed
    asked = set(operators.calls)
    assert asked >= STEPS, STEPS - asked


@pytest.mark.parametrize(
    "dtype", [pytest.param(BF16, marks=pytest.mark.slow), *(pytest.param(d, marks=pytest.mark.long) for d in (F16, F32))], ids=str
)
def test_a_small_block_is_as_accurate_as_eager(backend, operators, dtype):
    check(drawn(32, 8, (2, 5, 7)), dtype, backend, operators)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("inplanes", [64, 256], ids=["first", "others"])
def test_stage_1_of_resnet_50_cut_to_a_few_tiles(backend, operators, dtype, inplanes):
    check(drawn(inplanes, 64, (1, 10, 15)), dtype, backend, operators)


@pytest.mark.long
def test_a_strided_projection(backend, operators):
    check(drawn(24, 8, (2, 6, 9), 2), BF16, backend, operators)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_its_steps_pass_the_trials_beside_tritons(backend, proven_interpreter):
    """The judge has no false alarm, and what one of them leaves the other takes: every step, alone and in pairs of either."""
    pytest.importorskip("triton")
    block, x, _ = drawn(24, 8, (2, 6, 9), 2)(0)
    block, x = block.to(BF16), x.to(BF16)
    calls = {call.key(): call for call in dry_run.steps(x, None, block.parts(), "moment", "triton", True)}
    calls, seen = list(calls.values()), []
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        choice, verdict = steps.try_step(call, x.device, lambda runs, *_: {n: 1.0 - (n == backend) / 2 for n in runs})
        assert (choice.lender, verdict.rejected) == (backend, {}), call.key()
        seen.append(call.primitive)
        if steps.shares(call, following):
            found = steps.try_both(call, following, x.device, lambda runs, *_: dict.fromkeys(runs, 1.0))
            assert [(verdict.rejected, len(verdict.seconds)) for _, verdict in found] == [({}, 4)] * 2
            seen.append("both")
    assert set(seen) == {*choices.STEPS, "both"}


@pytest.mark.parametrize(("precision", "missing"), [("tf32", False), ("ieee", True)], ids=["tf32", "ieee"])
def test_explain_names_every_step_without_a_kernel(monkeypatch, precision, missing):
    """At level `moment` none is missing in training but what tensor cores do not multiply; no kernel is run for that."""
    backend = emulated_backend.install(monkeypatch, None, native.PRIMITIVES + native.CUDA_CALLS)
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, precision
    multiplied = "moments", "pointwise_tail", "pointwise_tail_backward_reduce", "pointwise_tail_backward_apply"
    try:
        for dtype in (F32, BF16):
            block, x = Bottleneck(32, 8).to(dtype), torch.randn(2, 32, 5, 7, dtype=dtype)
            with use_backend(backend, "moment"):
                (row,) = _explained(block, x)
            wanted = multiplied if missing and dtype == F32 else ()
            assert row.formulas == tuple(f"{step}: no kernel for float32 without TF32" for step in wanted)
        with use_backend(backend, "moment"):
            (row,) = _explained(block.eval(), x)
        assert row.formulas == ("bn_running: no kernel",)
    finally:
        conv.fp32_precision = before


def _explained(block, x):
    """The rows of `explain`, which runs the block by formulas here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_res.primitives.run.Run.find", lambda run, primitive, device: None)
        patch.setattr("fused_res.primitives.run.Run.convolution", lambda run, primitive, unit, *operands: None)
        return explain(block, x).rows
