"""Pre-activation blocks: eager's numbers, gradients and statistics at every level, and what they refuse."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from compare import same
from formulas import assert_as_accurate_as_the_formulas
from preactivated import KINDS, SHORTCUTS, image, make, peer
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_res
from blocks import assert_same, step, weights
from fused_res import accuracy, backends, explain, use_backend
from fused_res.benchmarks.memory import saved_bytes
from fused_res.block.packing import pack, unpack
from fused_res.functional import residual_block_with_saved
from fused_res.geometry import Convolution, Geometry
from fused_res.planner import LEVELS
from fused_res.primitives import bn_act_backward
from fused_res.spec import PRE_ACTIVATION, AvgPool, Block, ConvBN, in_front, regrouped
from fused_res.tuning.levels import try_levels

MEANT = LEVELS[:3]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_shortcut = pytest.mark.parametrize("shortcut", SHORTCUTS)
pytestmark = pytest.mark.usefixtures("one_thread")


def as_function(block):
    names = [name for name, _ in block.named_parameters()]
    return lambda x, *values: torch.func.functional_call(block, dict(zip(names, values, strict=True)), x)


@pytest.mark.parametrize(("training", "scale"), [(True, None), (True, 0.7), (False, 0.7)], ids=["train", "scaled", "eval"])
@pytest.mark.parametrize(("kind", "level"), [*((KINDS[1], level) for level in MEANT), (KINDS[0], "bn_act"), (KINDS[0], "moment")])
@every_shortcut
def test_a_step_is_eagers(kind, shortcut, level, training, scale, cpu_backend):
    block = make(kind, shortcut, bias=shortcut == "projection", training=training, residual_scale=scale)
    other, x = peer(block), image(block)
    with use_backend(cpu_backend, level):
        assert_same(step(block, x), step(other, x))
        with torch.no_grad():
            torch.testing.assert_close(block(x), other(x), rtol=1e-9, atol=1e-10)
    assert_same(block.state_dict(), other.state_dict())


@pytest.mark.parametrize("level", MEANT)
@every_shortcut
@every_kind
def test_gradcheck_through_our_backward(kind, shortcut, level):
    scale = 0.7 if shortcut != "pooled" else None
    block = make(kind, shortcut, bias=shortcut == "projection", residual_scale=scale)
    x = image(block, 2, (3, 3)).requires_grad_()
    with use_backend("reference", level):
        inputs = (x, *block.parameters())
        every = (kind, shortcut, level) == ("PreActBottleneck", "projection", "bn_act")
        assert torch.autograd.gradcheck(as_function(block), inputs, fast_mode=not every)


@pytest.mark.parametrize("level", MEANT)
def test_gradcheck_at_residual_scale_zero_and_with_single_bns_in_evaluation_mode(level):
    for frozen in ("norm1", "norm2", "norm3"):
        block = make("PreActBottleneck", "projection", bias=True, residual_scale=0.0)
        block.get_submodule(frozen).eval()
        with use_backend("reference", level):
            x = image(block, 2, (3, 3)).requires_grad_()
            assert torch.autograd.gradcheck(as_function(block), (x, *block.parameters()), fast_mode=True), frozen


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_shortcut
def test_second_derivatives(shortcut, training):
    block = make("PreActBasicBlock", shortcut, width=2, bias=True, training=training, residual_scale=0.7)
    x = image(block, 2, (3, 2)).requires_grad_()
    assert torch.autograd.gradgradcheck(as_function(block), (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("wanted", ["conv2.weight", "norm1.bias", "conv3.bias", "residual_scale", "downsample.weight", "x"])
@pytest.mark.parametrize("level", MEANT)
def test_single_gradients(wanted, level, cpu_backend):
    block = make("PreActBottleneck", "projection", bias=True, residual_scale=0.7)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name == wanted)
    other, x, results = peer(block), image(block), []
    for module in (block, other):
        leaf = x.clone().requires_grad_(wanted == "x")
        with use_backend(cpu_backend, level):
            out = module(leaf)
        out.backward(weights(out))
        results.append({"dx": leaf.grad} | {f"d{name}": p.grad for name, p in module.named_parameters()})
    assert_same(*results)


def test_gradcheck_fails_on_a_wrong_coefficient(monkeypatch):
    right = bn_act_backward.plain_finalize

    def wrong(*args):
        coefficients = right(*args)
        coefficients[1] *= -1
        return coefficients

    monkeypatch.setattr(bn_act_backward, "plain_finalize", wrong)
    block = make("PreActBasicBlock", "identity")
    with use_backend("reference", "bn_act"):
        inputs = (image(block, 2, (3, 3)).requires_grad_(), *block.parameters())
        assert not torch.autograd.gradcheck(as_function(block), inputs, raise_exception=False, fast_mode=True)


def problem(kind, shortcut, training, scale, device="cpu"):
    def make_one(seed):
        block = make(kind, shortcut, width=20, planes=10, seed=seed, training=training, residual_scale=scale)
        size = (9, 7) if shortcut == "identity" else (5, 4)
        x, outer = torch.randn(4, 20, 9, 7, dtype=torch.float64), block.get_submodule(f"conv{block.depth}").out_channels
        return block.to(device), x.to(device), torch.randn(4, outer, *size, dtype=torch.float64).to(device)

    return make_one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "shortcut", "training", "scale", "level"),
    [
        ("PreActBasicBlock", "identity", True, None, "bn_act"),
        ("PreActBasicBlock", "projection", True, 0.7, "prologue"),
        ("PreActBasicBlock", "pooled", False, None, "epilogue"),
        ("PreActBottleneck", "identity", True, 0.7, "bn_act"),
        ("PreActBottleneck", "projection", True, None, "epilogue"),
        ("PreActBottleneck", "pooled", True, 0.7, "prologue"),
        ("PreActBottleneck", "identity", False, None, "prologue"),
    ],
)
def test_blocks_are_as_accurate_as_eager(kind, shortcut, training, scale, level, dtype, cpu_backends):
    make_one, tolerance = problem(kind, shortcut, training, scale), 64 * torch.finfo(dtype).eps
    found = accuracy.judge_each(make_one, dtype, [(name, level) for name in cpu_backends], sign_tolerance=tolerance)
    failed = [
        f"{name}: {v.quantity}: {v.error:.2e}, eager {v.eager:.2e}, limit {v.limit:.2e}"
        for (name, _), verdicts in found.items()
        for v in verdicts
        if not v.passed
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("kind", "shortcut", "training", "scale", "dtype", "level"),
    [
        pytest.param("PreActBasicBlock", "identity", True, None, torch.float32, "bn_act", marks=pytest.mark.slow),
        pytest.param("PreActBasicBlock", "projection", True, 0.7, torch.bfloat16, "prologue", marks=pytest.mark.slow),
        ("PreActBottleneck", "identity", True, None, torch.float16, "prologue"),
        pytest.param("PreActBottleneck", "pooled", True, 0.7, torch.float32, "epilogue", marks=pytest.mark.slow),
        ("PreActBottleneck", "projection", False, None, torch.float32, "prologue"),
    ],
)
def test_blocks_on_triton_are_as_accurate_as_the_formulas(
    kind, shortcut, training, scale, dtype, level, device, proven_interpreter
):
    pytest.importorskip("triton")
    make_one = problem(kind, shortcut, training, scale, device)
    assert_as_accurate_as_the_formulas(make_one, dtype, "triton", level, 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("shortcut", "level", "traced"),
    [
        ("identity", "bn_act", False),
        ("pooled", "prologue", False),
        pytest.param("projection", "bn_act", True, marks=pytest.mark.slow),
    ],
)
def test_opcheck(shortcut, level, traced):
    block = make("PreActBottleneck", shortcut, dtype=torch.float32, bias=shortcut == "projection", residual_scale=0.7)
    x, parts = image(block, dtype=torch.float32).requires_grad_(), block.parts()
    tensors, spec, eps = pack(parts)
    forward = [x, None, block.residual_scale, tensors, spec, eps, True, level, "reference"]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    checks = checks if traced else checks[:3]
    opcheck(torch.ops.fused_res.block_forward.default, forward, test_utils=checks)
    out, saved = torch.ops.fused_res.block_forward(*forward)
    needs = [True, False, True] + [t.requires_grad for t in tensors]
    arguments = [torch.randn_like(out), x, block.residual_scale, tensors, [t.detach() for t in saved], spec, eps, needs]
    opcheck(torch.ops.fused_res.block_backward.default, [*arguments, level, "reference"], test_utils=checks)


@every_kind
def test_nothing_is_kept_but_x_what_the_inner_convolutions_made_and_the_vectors(kind):
    block = make(kind, "identity", dtype=torch.float32)
    x = image(block, dtype=torch.float32)
    for level in LEVELS:
        with use_backend("reference", level):
            _, saved = residual_block_with_saved(x, **block.operands(x))
        inner = [getattr(block, f"conv{i}").out_channels for i in range(1, block.depth)]
        pixels = x.numel() // x.shape[1]
        assert [tuple(t.shape) for t in saved] == [(5, x.shape[1]), *((5, k) for k in inner), *((pixels, k) for k in inner)]


@pytest.mark.parametrize("scale", [None, 0.7], ids=["", "scaled"])
@every_shortcut
@every_kind
def test_explain_tells_the_bytes_that_are_kept(kind, shortcut, scale):
    block = make(kind, shortcut, width=8, dtype=torch.float32, residual_scale=scale).to(memory_format=torch.channels_last)
    x = image(block, size=(6, 6), dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with use_backend("reference"):
        (row,) = explain(block, x).rows
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        assert row.saved_bytes == saved_bytes(lambda: block(leaf), block)
    other = peer(block)
    assert row.eager_saved_bytes == saved_bytes(lambda: other(leaf), other)
    assert (row.level, row.reason) == ("bn_act", None)
    assert row.shortcut == {"pooled": "pooled projection"}.get(shortcut, shortcut)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("weights_last", [False, True])
def test_output_strides_are_eagers(layout, weights_last):
    for kind, inputs, size, n, shortcut in itertools.product(KINDS, (1, 4), ((1, 1), (1, 3)), (1, 2), SHORTCUTS[:2]):
        if shortcut == "identity" and inputs == 1 and kind == KINDS[1]:
            continue
        block = make(kind, shortcut, width=inputs, planes=1, dtype=torch.float32, training=False)
        if weights_last:
            block = block.to(memory_format=torch.channels_last)
        x = torch.randn(n, inputs, *size).contiguous(memory_format=layout)
        expected = peer(block)(x)
        got = block(x)
        assert block.unfused_reason(x) is None
        # The sum of two layouts has strides of its own where there is only one line or pixel, which nobody steps along.
        steps = [[s for s, count in zip(t.stride(), t.shape, strict=True) if count > 1] for t in (got, expected)]
        assert steps[0] == steps[1], (kind, inputs, size, n, shortcut)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_moves_the_statistics_in_both_passes_as_eager_does(use_reentrant):
    block = make("PreActBottleneck", "projection")
    other, x = peer(block), image(block)
    got, expected = (step(m, x, call=lambda t, m=m: checkpoint(m, t, use_reentrant=use_reentrant)) for m in (block, other))
    assert block.norm1.num_batches_tracked == 2
    assert_same(got, expected)


def test_biases_stepped_between_two_backwards_change_no_gradient():
    block = make("PreActBottleneck", "projection", bias=True, residual_scale=0.7)
    out = block(image(block))
    out.backward(weights(out), retain_graph=True)
    first = {n: p.grad.clone() for n, p in block.named_parameters()}
    block.zero_grad()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1)
    out.backward(weights(out))
    for name, parameter in block.named_parameters():
        same(parameter.grad, first[name], name)


def test_copies_pickles_and_scripts():
    block = make("PreActBottleneck", "projection", dtype=torch.float32, residual_scale=0.7).eval()
    x = image(block, dtype=torch.float32)
    expected = block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        same(twin(x), expected)
    scripted, stored = torch.jit.script(block), io.BytesIO()
    torch.jit.save(scripted, stored)
    torch.testing.assert_close(torch.jit.load(io.BytesIO(stored.getvalue()))(x), expected)


def test_torch_compile_follows_it_whole(dynamo):
    block = make("PreActBasicBlock", "projection", dtype=torch.float32)
    x = image(block, dtype=torch.float32)
    expected = step(copy.deepcopy(block), x)
    assert_same(step(block, x, call=torch.compile(block, backend="aot_eager", fullgraph=True)), expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_images_that_eagers_bn_would_take_in_float32_run_unfused():
    block = make("PreActBasicBlock", "identity", dtype=torch.float32)
    other, x = peer(block), image(block, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block.unfused_reason(x) == (
            "x is in torch.float32, in which its BN computes under autocast, and not in torch.bfloat16"
        )
        assert block.unfused_reason(x.bfloat16()) is None
        with pytest.warns(UserWarning, match="its BN computes under autocast"):
            got = block(x)
        torch.testing.assert_close(got, other(x), rtol=0.02, atol=0.02)
        assert block(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:fused_res")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: setattr(b, "downsample", nn.Conv2d(4, 4, 1, padding_mode="circular").double()), "padding_mode='circular'"),
        (lambda b: setattr(b, "downsample", nn.MaxPool2d(1)), "downsample is a MaxPool2d, not nn.Sequential"),
        (lambda b: setattr(b, "norm1", nn.GroupNorm(2, 4).double()), "norm1 is a GroupNorm, not nn.BatchNorm2d"),
        (lambda b: setattr(b, "relu", nn.SiLU()), "relu is a SiLU, not nn.ReLU"),
        (lambda b: b.conv2.register_forward_hook(lambda *_: None), "conv2 has a forward hook"),
    ],
)
def test_what_the_operator_cannot_stand_for_runs_through_the_children(change, reason):
    block = make("PreActBasicBlock", "identity")
    change(block)
    other, x = peer(block), image(block)
    assert reason in block.unfused_reason(x)
    assert_same(step(block, x), step(other, x))


def test_zero_init_last_starts_as_the_identity():
    for kind in KINDS:
        block = make(kind, "identity", bias=True)
        block.zero_init_last()
        x = image(block)
        for level in LEVELS:
            with use_backend("reference", level):
                same(block(x), x)


def test_a_batch_of_one_value_is_refused_in_eagers_words_and_counted():
    block = make("PreActBasicBlock", "identity")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 4, 1, 1, dtype=torch.float64))
    assert [block.norm1.num_batches_tracked.item(), block.norm2.num_batches_tracked.item()] == [1, 0]


def test_units_that_do_not_fit_are_refused_by_name():
    block = make("PreActBasicBlock", "projection")
    x, operands = image(block), block.operands(image(block))
    first, *rest = operands["main"]
    with pytest.raises(RuntimeError, match=r"norm1/conv1.gamma should contain 4 elements"):
        fused_res.residual_block(x, **operands | {"main": [first._replace(gamma=first.gamma[:3]), *rest]})
    gamma = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="a pre-activation block's projection is a convolution without a BN, got gamma"):
        fused_res.residual_block(x, **operands | {"shortcut": operands["shortcut"]._replace(gamma=gamma)})
    with pytest.raises(ValueError, match="form: expected one of post-activation"):
        fused_res.residual_block(x, **operands | {"form": "backwards"})


def test_a_block_regrouped_and_back_is_itself_and_so_it_is_packed_and_unpacked():
    weight = torch.zeros(3, 2, 1, 1)
    units = [
        ConvBN(weight, torch.ones(3), torch.ones(2), running_mean=torch.ones(2), stride=(1, 2), momentum=0.5),
        ConvBN(torch.zeros(2, 3, 1, 1), None, torch.ones(3), torch.ones(3), training=False, eps=0.5),
    ]
    block = Block(units, ConvBN(weight, training=False), None, False, PRE_ACTIVATION)
    head, behind = regrouped(block)
    assert [unit.gamma is units[1].gamma for unit in behind.main] == [True, False]
    assert behind.main[1].training is False
    back = in_front(head, behind)
    for ours, theirs in zip(back.main, units, strict=True):
        assert all(a is b for a, b in zip(ours, theirs, strict=True))
    restored = unpack(*pack(block))
    assert restored.form == PRE_ACTIVATION
    assert [u[7:12] for u in restored.main] == [u[7:12] for u in units]


def test_state_dicts_are_timms(libraries):
    v2, layers = libraries("timm", "timm.models.resnetv2"), libraries("timm", "timm.layers")
    kinds = {"conv_layer": layers.create_conv2d, "norm_layer": layers.BatchNormAct2d, "proj_layer": v2.DownsampleConv}
    for ours, theirs in (
        (fused_res.PreActBasicBlock(16, 32, 2), v2.PreActBasic(16, 32, stride=2, **kinds)),
        (fused_res.PreActBottleneck(16, 8, 2), v2.PreActBottleneck(16, 32, stride=2, **kinds)),
    ):
        ours.downsample = nn.Sequential()
        ours.downsample.add_module("conv", nn.Conv2d(16, 32, 1, 2, bias=False))
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 16, 6, 6)
        assert ours.unfused_reason(x) is None
        torch.testing.assert_close(ours(x), theirs(x))


def test_every_backend_that_runs_here_is_asked():
    block = make("PreActBasicBlock", "identity", dtype=torch.float32)
    x = image(block, dtype=torch.float32)
    for name in ("reference", "native"):
        if backends.supports(name, x.device, x.dtype) is None:
            with use_backend(name, "moment"):
                assert explain(block, x).rows[0].level == "prologue"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [None, AvgPool((2, 2), (2, 2))], ids=["identity", "pooled"])
def test_tuning_finds_every_level_of_the_plain_formulas_right(pool, dtype):
    def convolution(out, into, size, stride=1):
        return Convolution((out, into, size, size), (stride, stride), (size // 2, size // 2), (1, 1), 1, True)

    main = (convolution(32, 128, 1), convolution(32, 32, 3, 1 if pool is None else 2), convolution(128, 32, 1))
    geometry = Geometry(main, None if pool is None else convolution(128, 128, 1), pool, False, (2, 8, 8), PRE_ACTIVATION)
    _, verdict = try_levels(geometry, "reference", dtype, torch.device("cpu"), lambda runs, *_: dict.fromkeys(runs, 1.0))
    assert verdict.rejected == {}
    assert list(verdict.seconds) == list(MEANT)


@every_shortcut
def test_an_export_keeps_it_as_one_operator_and_its_decomposition_gives_the_same(shortcut):
    block = make("PreActBottleneck", shortcut, bias=shortcut == "projection", dtype=torch.float32, residual_scale=0.7)
    x = image(block, dtype=torch.float32)
    expected = copy.deepcopy(block)
    want = expected(x)
    program, plain = (torch.export.export(copy.deepcopy(block), (x,)) for _ in range(2))
    assert [str(node.target) for node in program.graph.nodes if "fused_res" in str(node.target)] == ["fused_res.block.default"]
    plain = plain.run_decompositions()
    assert not any("fused_res" in str(node.target) for node in plain.graph.nodes)
    for exported in (program, plain):
        module = exported.module()
        torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(module.get_buffer(name), buffer, rtol=1e-5, atol=1e-5)
