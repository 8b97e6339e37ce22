"""The rule of accuracy: no further from float64 than eager, on a grid of blocks, shapes, dtypes and backends."""

import pytest
import torch
from compare import all_same
from formulas import assert_as_accurate_as_the_formulas
from torch import nn

import fused_res
from fused_res import accuracy
from fused_res.planner import LEVELS
from fused_res.primitives import bn_act_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = ["BasicBlock", "Bottleneck"]
SHORTCUTS = ["identity", "projection", "pooled"]


def case(kind, shortcut, shape, channels, *, mean=0.0, training=True, residual_scale=None, eps=1e-5, device="cpu"):
    """A maker for `accuracy.judge`; channels is the width of x, which an identity keeps and the others change."""

    def make(seed):
        torch.manual_seed(seed)
        block_class = getattr(fused_res, kind)
        stride = 1 if shortcut == "identity" else 2
        planes = channels // block_class.expansion if shortcut == "identity" else 10
        out = planes * block_class.expansion
        projection = [nn.Conv2d(channels, out, 1, stride if shortcut == "projection" else 1, bias=False), nn.BatchNorm2d(out)]
        pool = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)]
        downsample = {"identity": None, "projection": nn.Sequential(*projection), "pooled": nn.Sequential(*pool, *projection)}
        block = block_class(channels, planes, stride, downsample[shortcut], residual_scale=residual_scale)
        block = accuracy.random_block(block, seed).train(training)
        for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.eps = eps
        x = torch.randn(shape[0], channels, *shape[1:], dtype=torch.float64) + mean
        size = tuple(-(-s // stride) for s in shape[1:])
        dout = torch.randn(shape[0], out, *size, dtype=torch.float64)
        return block.to(device), x.to(device), dout.to(device)

    return make


def assert_accurate(make, dtype, backend_names=("reference",), seeds=8, sign_tolerance=None, pure=False, levels=("bn_act",)):
    # What one of many quantities misses by chance in a few problems, it does not in four times as many.
    ways = [(backend, level) for backend in backend_names for level in levels]
    for count in (seeds, 4 * seeds):
        failed = {}
        for way, verdicts in accuracy.judge_each(make, dtype, ways, range(count), sign_tolerance, pure).items():
            wrong = [f"{v.quantity}: {v.error:.2e}, eager {v.eager:.2e}, limit {v.limit:.2e}" for v in verdicts if not v.passed]
            failed |= {way: wrong} if wrong else {}
        if not failed:
            return
        ways = list(failed)
    pytest.fail("\n".join(f"{' at '.join(way)}: {line}" for way, lines in failed.items() for line in lines))


def tolerance(dtype):
    return 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_as_accurate_as_eager(kind, shortcut, training, dtype, cpu_backends):
    make = case(kind, shortcut, (4, 9, 7), 20, training=training, residual_scale=0.7)
    assert_accurate(make, dtype, cpu_backends, sign_tolerance=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(
    ("kind", "training", "levels"),
    [
        ("BasicBlock", True, ("epilogue", "prologue")),
        ("Bottleneck", True, ("moment",)),
        ("Bottleneck", False, ("prologue", "moment")),
    ],
)
def test_every_level_is_as_accurate_as_eager(kind, training, levels, shortcut, dtype, cpu_backends):
    make = case(kind, shortcut, (4, 9, 7), 40, training=training)
    assert_accurate(make, dtype, cpu_backends, sign_tolerance=tolerance(dtype), levels=levels)


def dead_channels(block):
    block.bn2.weight[:3] = 0
    block.bn2.bias[:3] = -1


def duplicate_channels(block):
    for tensor in (block.conv2.weight, block.bn2.weight, block.bn2.bias):
        tensor[1] = tensor[0]


def row_orthogonal_to_the_data(block):
    """A channel without variance. With a smaller eps its gradients, 300 times the others', drown them in 16 bits, in eager too."""
    duplicate_channels(block)
    block.conv3.weight[0] = 0
    block.conv3.weight[0, 0], block.conv3.weight[0, 1] = 1, -1
    block.bn3.eps = 0.1


def scales_of_every_sign(block):
    block.bn3.weight[:4] = 0
    block.bn3.weight[4:8] *= -1


def no_residual(block):
    block.residual_scale.zero_()


def no_projection(block):
    block.downsample[-1].weight.zero_()


def evaluation_mode_inside(block):
    block.bn3.eval()


def evaluation_mode_beside(block):
    block.downsample[-1].eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("edit", "shortcut"),
    [
        (dead_channels, "identity"),
        (duplicate_channels, "identity"),
        (row_orthogonal_to_the_data, "identity"),
        (scales_of_every_sign, "identity"),
        (no_residual, "projection"),
        (no_projection, "projection"),
        (evaluation_mode_inside, "projection"),
        (evaluation_mode_beside, "pooled"),
    ],
)
def test_the_moment_form_in_adversity(edit, shortcut, dtype, cpu_backends):
    ordinary = case("Bottleneck", shortcut, (4, 9, 7), 40, residual_scale=0.7)

    def make(seed):
        block, x, dout = ordinary(seed)
        with torch.no_grad():
            edit(block)
        return block, x, dout

    assert_accurate(make, dtype, cpu_backends, levels=["moment"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_the_moment_form_of_a_mean_a_thousand_deviations_from_zero(shortcut, dtype, cpu_backends):
    assert_accurate(case("Bottleneck", shortcut, (4, 9, 7), 20, mean=1e3), dtype, cpu_backends, levels=["moment"])


on_triton = pytest.mark.parametrize(
    ("kind", "shortcut", "training", "dtype", "level"),
    [
        ("BasicBlock", "identity", True, torch.float32, "bn_act"),
        ("Bottleneck", "pooled", True, torch.bfloat16, "bn_act"),
        ("Bottleneck", "projection", False, torch.float16, "bn_act"),
        ("BasicBlock", "projection", True, torch.float32, "prologue"),
        ("Bottleneck", "identity", True, torch.bfloat16, "prologue"),
        ("Bottleneck", "identity", True, torch.float32, "moment"),
        ("Bottleneck", "identity", True, torch.bfloat16, "moment"),
        ("Bottleneck", "projection", True, torch.float32, "moment"),
        ("Bottleneck", "projection", True, torch.float16, "moment"),
        ("Bottleneck", "pooled", True, torch.float16, "moment"),
        ("Bottleneck", "pooled", True, torch.bfloat16, "moment"),
        ("Bottleneck", "projection", False, torch.bfloat16, "moment"),
    ],
)


@on_triton
def test_blocks_on_triton_are_as_accurate_as_the_formulas(kind, shortcut, training, dtype, level, device, proven_interpreter):
    pytest.importorskip("triton")
    make = case(kind, shortcut, (4, 9, 7), 20, training=training, residual_scale=0.7, device=device)
    assert_as_accurate_as_the_formulas(make, dtype, "triton", level, tolerance(dtype))


@pytest.mark.long
@on_triton
def test_blocks_on_triton_are_as_accurate_as_eager(kind, shortcut, training, dtype, level, device, proven_interpreter):
    pytest.importorskip("triton")
    make = case(kind, shortcut, (4, 9, 7), 20, training=training, residual_scale=0.7, device=device)
    assert_accurate(make, dtype, ["triton"], sign_tolerance=tolerance(dtype), levels=[level])


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_levels_on_triton_agree(shortcut, device, proven_interpreter):
    """In float32 all levels are one function up to its rounding, no sign of a ReLU apart."""
    pytest.importorskip("triton")
    block, x, dout = case("Bottleneck", shortcut, (2, 7, 5), 20, residual_scale=0.7, device=device)(0)
    first, *others = (accuracy.step(block, x, dout, torch.float32, "triton", level, True) for level in LEVELS)
    for other in others:
        all_same(other.signs, first.signs)
        for name, want in first.tensors.items():
            assert (other.tensors[name] - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_modules_converted_to_sixteen_bits(kind, dtype):
    assert_accurate(case(kind, "projection", (4, 9, 7), 20), dtype, sign_tolerance=tolerance(dtype), pure=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 1, 1), (1, 1, 5)], ids=["P=2", "P=3", "P=5"])
def test_few_pixels(shape, dtype, cpu_backends):
    # Two or three values often nearly coincide, and 1 / sqrt(var) then has no finite variance over the seeds: eps bounds it.
    make = case("Bottleneck", "identity", shape, 256, eps=0.1)
    assert_accurate(make, dtype, cpu_backends, seeds=24, levels=("bn_act", "moment"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_mean_a_thousand_deviations_from_zero(kind, dtype, cpu_backends):
    assert_accurate(case(kind, "identity", (4, 9, 7), 20, mean=1e3), dtype, cpu_backends)


def test_the_rule_catches_a_wrong_gradient(monkeypatch):
    right = bn_act_backward.plain_finalize

    def wrong(*args):
        coefficients = right(*args)
        coefficients[1] *= 1.01
        return coefficients

    monkeypatch.setattr(bn_act_backward, "plain_finalize", wrong)
    verdicts = accuracy.judge(case("Bottleneck", "identity", (4, 9, 7), 20), torch.float32, "reference", "bn_act")
    assert not all(v.passed for v in verdicts)


def test_the_sign_check_catches_a_wrong_sign():
    block, x, dout = case("BasicBlock", "identity", (2, 4, 4), 8)(0)
    truth = accuracy._truth(block, x, dout)
    fused = accuracy.step(block, x, dout, torch.float32, "reference", "bn_act", True)
    accuracy.check_signs(fused, truth, 1e-4)
    fused.signs[0] = fused.signs[0].logical_xor(truth.pre_activations[0] > 1)
    with pytest.raises(AssertionError, match="a sign differs"):
        accuracy.check_signs(fused, truth, 1e-4)
