"""The block operator: its registration, and its hand-written backward against finite differences."""

import functools
from contextlib import nullcontext

import pytest
import torch
from compare import same
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fused_res
from fused_res import accuracy, backends, use_backend
from fused_res.block import backward
from fused_res.block.packing import pack
from fused_res.functional import residual_block_with_saved
from fused_res.planner import LEVELS
from fused_res.primitives import bn_act_backward
from fused_res.spec import Block, ConvBN

BLOCKS = ["BasicBlock", "Bottleneck"]
SHORTCUTS = ["identity", "projection", "pooled", "given"]
OPERATORS = torch.ops.fused_res


def make(kind, shortcut, *, training=True, residual_scale=0.7, bias=False, dtype=torch.float64, width=4):
    torch.manual_seed(0)
    block_class = getattr(fused_res, kind)
    stride = 1 if shortcut == "identity" else 2
    planes = width // block_class.expansion if shortcut == "identity" else 2
    out = planes * block_class.expansion
    projection = [nn.Conv2d(width, out, 1, stride if shortcut != "pooled" else 1, bias=bias), nn.BatchNorm2d(out)]
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    downsample = {
        "identity": None,
        "projection": nn.Sequential(*projection),
        "pooled": nn.Sequential(pool, *projection),
        "given": nn.Conv2d(width, out, 1, stride),
    }[shortcut]
    block = block_class(width, planes, stride, downsample, residual_scale=residual_scale)
    if bias:
        block.conv1 = nn.Conv2d(width, block.conv1.out_channels, block.conv1.kernel_size, block.conv1.stride, block.conv1.padding)
    block = accuracy.random_block(block, 1).to(dtype).train(training)
    return block, torch.randn(3, width, 4, 3, dtype=dtype, requires_grad=True)


def as_function(block):
    names = [name for name, _ in block.named_parameters()]
    return lambda x, *values: torch.func.functional_call(block, dict(zip(names, values, strict=True)), x)


def passes_gradcheck(block, x, every=False):
    """Each derivative by itself, or random combinations of all, in which one that is wrong weighs little: hence the tolerances."""
    inputs = (x, *block.parameters())
    return torch.autograd.gradcheck(as_function(block), inputs, fast_mode=not every, rtol=1e-5, atol=1e-7)


def few_pixels(x):
    """Where the check fails torch differentiates each number by itself, to say which is wrong."""
    return x.detach()[:, :, :3, :1].requires_grad_()


def operator_arguments(block, x, *, save=True, backend="reference", level="bn_act"):
    operands = block.operands(x)
    given = isinstance(operands["shortcut"], torch.Tensor)
    skip = operands["shortcut"].detach().requires_grad_() if given else None
    parts = Block(operands["main"], None if given else operands["shortcut"], operands["pool"], given)
    tensors, spec, eps = pack(parts)
    return [x, skip, block.residual_scale, tensors, spec, eps, save, level, backend]


def backward_arguments(arguments):
    x, skip, scale, tensors, spec, eps, _, level, backend = arguments
    out, saved = OPERATORS.block_forward(*arguments)
    needs = [True, skip is not None, scale is not None] + [t.requires_grad for t in tensors]
    dout = torch.randn_like(out).requires_grad_()
    return [dout, x, scale, tensors, [t.detach() for t in saved], spec, eps, needs, level, backend]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    ("backend", "level"), [*(("reference", level) for level in LEVELS), ("native", "bn_act"), ("native", "moment")]
)
def test_gradcheck_through_our_backward(kind, shortcut, training, backend, level):
    reason = backends.supports(backend, torch.device("cpu"), torch.float64)
    if reason is not None:
        pytest.skip(reason)
    block, x = make(kind, shortcut, training=training, bias=shortcut == "projection")
    with use_backend(backend, level):
        assert passes_gradcheck(block, x, every=level == LEVELS[0] and (kind, shortcut) == ("BasicBlock", "projection"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_gradcheck_at_residual_scale_zero(kind, level):
    block, x = make(kind, "identity", residual_scale=0.0)
    with use_backend("reference", level):
        assert passes_gradcheck(block, x)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("frozen", ["bn1", "bn2", "bn3", "downsample.1"])
def test_gradcheck_with_one_bn_in_evaluation_mode(frozen, level):
    block, x = make("Bottleneck", "projection")
    block.get_submodule(frozen).eval()
    with use_backend("reference", level):
        assert passes_gradcheck(block, x)


def every_shape_of_block():
    """One unit only, a projection without a moment form beside a main branch with one, and a strided convolution behind a pool."""
    weight = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    bn = lambda channels: {"gamma": weight(channels), "beta": weight(channels)}  # noqa: E731
    wide = ConvBN(weight(4, 2, 3, 3), padding=(1, 1), groups=2, **bn(4))
    last = ConvBN(weight(4, 4, 1, 1), **bn(4))
    yield "one unit", [last], None, None
    yield "a given shortcut", [wide, last], weight(3, 4, 4, 3), None
    yield "a wide projection", [wide, last], wide, None
    yield "a strided last unit", [wide, last._replace(stride=(2, 1))], last._replace(stride=(2, 1)), None
    strided = ConvBN(weight(4, 4, 1, 1), stride=(1, 2), **bn(4))
    first = wide._replace(stride=(1, 2))
    yield "a strided projection behind a pool", [first, last], strided, fused_res.AvgPool((3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("which", range(5))
def test_gradcheck_of_blocks_of_every_shape(which, level):
    torch.manual_seed(0)
    _, main, shortcut, pool = list(every_shape_of_block())[which]
    x = torch.randn(3, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    fields = ("weight", "gamma", "beta")
    units = [*main, shortcut] if isinstance(shortcut, ConvBN) else main
    leaves = [getattr(unit, name) for unit in units for name in fields]
    leaves += [shortcut] if isinstance(shortcut, torch.Tensor) else []

    def run(x, *values):
        values = iter(values)
        made = [unit._replace(**{name: next(values) for name in fields}) for unit in units]
        side = made[len(main)] if isinstance(shortcut, ConvBN) else next(values, None)
        return fused_res.residual_block(x, made[: len(main)], side, pool=pool)

    with use_backend("reference", level):
        assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("row", list(bn_act_backward.Coefficients._fields[:6]))
def test_gradcheck_fails_on_a_wrong_sign(row, monkeypatch):
    right = bn_act_backward.plain_finalize

    def wrong(*args):
        coefficients = right(*args)
        coefficients[bn_act_backward.Coefficients._fields.index(row)] *= -1
        return coefficients

    monkeypatch.setattr(bn_act_backward, "plain_finalize", wrong)
    block, x = make("Bottleneck", "projection")
    with use_backend("reference", "bn_act"), pytest.raises(GradcheckError, match="Jacobian mismatch"):
        passes_gradcheck(block, few_pixels(x))


@pytest.mark.parametrize("field", ["dweight", "dgamma", "dbeta", "dscale", "quadratic", "constant"])
def test_gradcheck_of_the_moment_form_fails_on_a_wrong_sign(field, monkeypatch):
    right = backward.pointwise_tail_backward_finalize

    def wrong(*args, **kwargs):
        gradients = right(*args, **kwargs)
        return gradients._replace(**{field: -getattr(gradients, field)})

    monkeypatch.setattr(backward, "pointwise_tail_backward_finalize", wrong)
    block, x = make("Bottleneck", "projection")
    with use_backend("reference", "moment"), pytest.raises(GradcheckError, match="Jacobian mismatch"):
        passes_gradcheck(block, few_pixels(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_second_derivatives(shortcut, training):
    block, x = make("BasicBlock", shortcut, training=training, bias=True, width=2)
    x = x.detach()[:2].requires_grad_()
    every = training and shortcut == "projection"
    assert torch.autograd.gradgradcheck(as_function(block), (x, *block.parameters()), fast_mode=not every)


def test_second_derivatives_in_the_moment_form():
    block, x = make("Bottleneck", "identity")
    x = x.detach()[:2, :, :2, :2].requires_grad_()
    with use_backend("reference", "moment"):
        assert torch.autograd.gradgradcheck(as_function(block), (x, *block.parameters()), fast_mode=True)


@functools.cache
def _convolution_is_derived_twice_with_symbolic_sizes():
    """Whether torch can do that; 2.11 cannot."""

    def second(x, weight):
        y = torch.nn.functional.conv2d(x, weight)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weight)

    tensors = (torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True))
    try:
        make_fx(second, tracing_mode="symbolic")(*tensors)
    except RuntimeError as error:
        assert "symbolic sizes" in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "shortcut", "level", "traced"),
    [
        ("BasicBlock", "identity", "bn_act", False),
        ("Bottleneck", "projection", "prologue", False),
        pytest.param("Bottleneck", "projection", "moment", True, marks=pytest.mark.slow),
        ("Bottleneck", "pooled", "moment", False),
        ("BasicBlock", "given", "epilogue", True),
    ],
)
def test_opcheck(kind, shortcut, level, traced):
    """Ahead-of-time dispatch takes most of the time, and tells little of one block that another does not tell."""
    block, x = make(kind, shortcut, dtype=torch.float32, training=shortcut != "given", bias=shortcut == "projection")
    forward = operator_arguments(block, x, level=level)
    sizes = "dynamic" if _convolution_is_derived_twice_with_symbolic_sizes() else "static"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(OPERATORS.block_forward.default, forward, test_utils=(*checks, "test_aot_dispatch_dynamic")[: 4 if traced else 3])
    opcheck(
        OPERATORS.block_backward.default,
        backward_arguments(forward),
        test_utils=(*checks, f"test_aot_dispatch_{sizes}")[: 4 if traced else 3],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(("kind", "level"), [("BasicBlock", "bn_act"), ("Bottleneck", "prologue"), ("Bottleneck", "moment")])
def test_fakes_and_schemas_for_every_dtype_and_layout(kind, level, layout, dtype):
    block, x = make(kind, "projection", dtype=dtype)
    forward = operator_arguments(block.to(memory_format=layout), x, level=level)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(OPERATORS.block_forward.default, forward, test_utils=checks)
    opcheck(OPERATORS.block_backward.default, backward_arguments(forward), test_utils=checks)


def test_fake_without_saving():
    block, x = make("Bottleneck", "projection", dtype=torch.float32)
    with torch.no_grad():
        opcheck(OPERATORS.block_forward.default, operator_arguments(block, x.detach(), save=False), test_utils="test_faketensor")


@pytest.mark.parametrize("level", LEVELS)
def test_only_what_the_design_names_is_saved(level):
    block, x = make("Bottleneck", "projection", dtype=torch.float32)
    with use_backend("reference", level):
        out, saved = residual_block_with_saved(x, **block.operands(x))
    outer, inner = out.shape[1], block.conv1.out_channels
    pixels_in, pixels = x.shape[0] * 12, out.numel() // outer
    vectors = [(5, inner), (5, inner), (5, outer), (5, outer)]
    ys = [(pixels_in, inner), (pixels, inner)] + ([] if level == "moment" else [(pixels, outer), (pixels, outer)])
    # Mean and covariance of the last 1x1 convolution's input and of the projection's, and which channels took theirs directly.
    counted = [(inner,), (inner, inner), (outer,), (x.shape[1],), (x.shape[1],) * 2, (outer,)] if level == "moment" else []
    assert [tuple(t.shape) for t in saved] == [*vectors, *ys, *counted, (pixels, -(-outer // 8))]
    assert saved[-1].dtype == torch.uint8
    assert not any(t.requires_grad for t in saved)


def test_without_saving_there_is_no_backward():
    block, x = make("BasicBlock", "identity")
    out, _ = OPERATORS.block_forward(*operator_arguments(block, x, save=False))
    with pytest.raises(RuntimeError, match="save=False"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (1, torch.zeros(3, 4, 4, 3), "skip: expected None"),
        (3, [], "tensors: the spec names"),
        (4, [2], "spec: expected at least"),
        (4, [2, 0, 0, 0, 1], "spec: expected"),
        (5, [1e-5], "eps: expected 2 values"),
        (7, "nonsense", "level: expected one of"),
        (8, "nonsense", "backend: expected one of"),
    ],
)
def test_the_raw_operator_refuses_nonsense(at, value, message):
    arguments = operator_arguments(*make("BasicBlock", "identity", residual_scale=None))
    arguments[at] = value
    with pytest.raises(ValueError, match=message):
        OPERATORS.block_forward(*arguments)


def test_the_raw_backward_refuses_a_wrong_number_of_saved_tensors():
    arguments = backward_arguments(operator_arguments(*make("BasicBlock", "identity")))
    arguments[4] = arguments[4][:-1]
    with pytest.raises(ValueError, match="saved: expected 5 tensors"):
        OPERATORS.block_backward(*arguments)


def test_pack_and_unpack_are_inverse():
    from fused_res.block.packing import unpack

    weight = torch.zeros(2, 2, 1, 1)
    unit = ConvBN(weight, gamma=torch.ones(2), stride=(1, 2), dilation=(3, 1), groups=1, training=True, eps=0.5)
    block = Block([unit, unit._replace(beta=torch.ones(2))], unit, fused_res.AvgPool((2, 2), (2, 2), ceil_mode=True))
    restored = unpack(*pack(block))
    assert restored.pool == block.pool
    assert [u[7:11] for u in restored.units()] == [u[7:11] for u in block.units()]
    assert [u.eps for u in restored.units()] == [0.5] * 3
    assert restored.main[1].beta is block.main[1].beta
    assert restored.main[0].beta is None


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_direct_call_and_the_operator_give_the_same_bits(kind, shortcut):
    results = []
    for mode in (nullcontext(), _Watch()):
        block, x = make(kind, shortcut, bias=True, dtype=torch.float32)
        with mode, use_backend("reference"):
            out = fused_res.residual_block(x, **block.operands(x))
            grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
        results.append([out, *grads, *block.buffers()])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert type(results[0][0].grad_fn) is not type(results[1][0].grad_fn)


def test_a_dispatch_mode_sees_the_operators():
    block, x = make("BasicBlock", "identity")
    with _Watch() as seen:
        fused_res.residual_block(x, **block.operands(x)).sum().backward()
        with torch.no_grad():
            fused_res.residual_block(x, **block.operands(x))
    assert seen.names.count("fused_res.block_forward.default") == 2
    assert seen.names.count("fused_res.block_backward.default") == 1
