"""`residual_block` and the blocks on bad input: the errors eager gives, and nothing half-updated after them."""

import copy

import pytest
import torch
from compare import same
from torch import nn

import fused_res
from fused_res import ConvBN, reference, residual_block, use_backend


def unit(inputs, outputs, kernel=1, **options):
    tensors = {
        "weight": torch.randn(outputs, inputs, kernel, kernel),
        "gamma": torch.rand(outputs),
        "beta": torch.randn(outputs),
        "running_mean": torch.zeros(outputs),
        "running_var": torch.ones(outputs),
        "num_batches_tracked": torch.tensor(0),
    }
    return ConvBN(**(tensors | options))


def main():
    return [unit(4, 6), unit(6, 4, 3, padding=(1, 1))]


X = torch.randn(2, 4, 5, 5)


def changed(index, **fields):
    units = main()
    units[index] = units[index]._replace(**fields)
    return units


BAD = {
    "x is no tensor": (lambda: residual_block(3.0, main()), TypeError, "x: expected a Tensor, got float"),
    "three dimensions": (lambda: residual_block(X[0], main()), ValueError, r"expected 4D input \(got 3D input\)"),
    "integers": (lambda: residual_block(X.long(), main()), RuntimeError, "x: expected a floating-point dtype"),
    "no units": (lambda: residual_block(X, []), TypeError, "main: expected"),
    "a tensor for a unit": (lambda: residual_block(X, [X]), TypeError, "main: expected"),
    "wrong channels": (lambda: residual_block(X[:, :3], main()), RuntimeError, r"main\[0\].*expected input to have 4 channels"),
    "wrong groups": (lambda: residual_block(X, changed(0, groups=4)), RuntimeError, "groups=4"),
    "half weight": (
        lambda: residual_block(X, changed(1, weight=main()[1].weight.half())),
        RuntimeError,
        r"main\[1\].weight.*float16",
    ),
    "half gamma": (lambda: residual_block(X, changed(1, gamma=torch.ones(4).half())), RuntimeError, r"main\[1\].gamma.*float16"),
    "float64 x": (lambda: residual_block(X.double(), main()), RuntimeError, r"main\[0\].weight: expected torch.float64"),
    "short gamma": (lambda: residual_block(X, changed(0, gamma=torch.ones(5))), RuntimeError, "should contain 6 elements"),
    "other device": (lambda: residual_block(X, changed(0, beta=torch.ones(6, device="meta"))), RuntimeError, "device of x"),
    "flat weight": (lambda: residual_block(X, changed(0, weight=torch.ones(6, 4))), RuntimeError, "expected 4 dimensions"),
    "stride 0": (lambda: residual_block(X, changed(0, stride=(0, 1))), RuntimeError, "stride"),
    "eps 0": (lambda: residual_block(X, changed(0, eps=0.0)), ValueError, "eps"),
    "negative eps": (lambda: residual_block(X, changed(0, eps=-1.0, training=False)), ValueError, "eps"),
    "no statistics": (lambda: residual_block(X, changed(0, training=False, running_var=None)), RuntimeError, "must be defined"),
    "kernel too large": (lambda: residual_block(X, [unit(4, 4, 9)]), RuntimeError, "Kernel size can't be greater"),
    "shortcut does not fit": (lambda: residual_block(X, main(), torch.zeros(2, 4, 5, 4)), RuntimeError, "expand"),
    "identity does not fit": (lambda: residual_block(X, [unit(4, 6)]), RuntimeError, "expand"),
    "projection channels": (lambda: residual_block(X, main(), unit(4, 5)), RuntimeError, "shortcut: expected 4 output channels"),
    "projection size": (lambda: residual_block(X, main(), unit(4, 4, stride=(2, 2))), RuntimeError, "shortcut: its output size"),
    "pool alone": (lambda: residual_block(X, main(), pool=fused_res.AvgPool((2, 2), (2, 2))), TypeError, "pool"),
    "vector scale": (lambda: residual_block(X, main(), residual_scale=torch.ones(1)), RuntimeError, "residual_scale"),
    "number scale": (lambda: residual_block(X, main(), residual_scale=1.0), TypeError, "residual_scale"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_and_names_the_argument(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def bottleneck(**options):
    torch.manual_seed(0)
    return fused_res.Bottleneck(8, 2, **options)


@pytest.mark.parametrize("x", [torch.randn(2, 7, 4, 4), torch.randn(2, 8, 4, 4).half(), torch.randn(8, 4, 4)])
def test_after_an_error_buffers_and_parameters_are_as_before(x):
    block = bottleneck()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises((RuntimeError, ValueError)):
        block(x)
    for name, value in block.state_dict().items():
        same(before[name], value)


def test_one_value_per_channel_raises_as_eager_and_counts_the_batch_as_eager():
    x = torch.randn(1, 8, 1, 1)
    ours, eager = bottleneck(), bottleneck()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as our_error:
        ours(x)
    with use_backend("eager"), pytest.raises(ValueError, match="Expected more than 1 value") as eager_error:
        eager(x)
    assert str(our_error.value) == str(eager_error.value)
    for name, buffer in eager.named_buffers():
        same(buffer, ours.get_buffer(name), name)


def test_one_value_per_channel_is_fine_in_evaluation():
    block = bottleneck().eval()
    x = torch.randn(1, 8, 1, 1)
    with use_backend("eager"):
        expected = block(x)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (0, 8, 1, 1)])
def test_empty_batches_do_what_eager_does(shape):
    ours, eager = bottleneck(), bottleneck()
    x = torch.empty(shape, requires_grad=True)
    out = ours(x)
    out.sum().backward()
    with use_backend("eager"):
        expected = eager(torch.empty(shape))
    assert out.shape == expected.shape
    assert x.grad.shape == x.shape
    assert ours.bn1.weight.grad.abs().sum() == 0
    for name, buffer in eager.named_buffers():
        same(buffer, ours.get_buffer(name), name)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_a_forced_backend_that_cannot_run_raises_with_the_reason(name):
    block = bottleneck()
    block.bn2 = nn.GroupNorm(1, 2)
    with use_backend(name), pytest.raises(RuntimeError, match="bn2 is a GroupNorm"):
        block(torch.randn(2, 8, 4, 4))


def test_triton_refuses_float64_by_name():
    pytest.importorskip("triton")
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run this block: takes float32"):
        bottleneck().double()(torch.randn(2, 8, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nonsense",), "backend: expected one of"), (("reference", "nonsense"), "level: expected"), (("eager", "bn_act"), "level")],
)
def test_use_backend_refuses_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message), use_backend(*arguments):
        pass


def test_use_backend_nests_and_ends_after_an_error():
    from fused_res import planner

    with use_backend("eager"):
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert planner.forced().backend == "eager"
    assert planner.forced() is None


def test_a_broadcast_identity_does_what_eager_does():
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    units = [u._replace(**{n: getattr(u, n).double() for n in ("weight", "gamma", "beta")}) for u in [unit(1, 6)]]
    units = [u._replace(running_mean=None, running_var=None) for u in units]
    ours = residual_block(x, units)
    eager = reference.residual_block(x, units)
    torch.testing.assert_close(ours, eager)
    (dx,) = torch.autograd.grad(ours.square().sum(), x)
    (expected,) = torch.autograd.grad(eager.square().sum(), x)
    torch.testing.assert_close(dx, expected)


def test_the_functional_form_updates_buffers_as_the_reference_does():
    ours, theirs = main(), main()
    theirs = [u._replace(weight=o.weight, gamma=o.gamma, beta=o.beta) for u, o in zip(theirs, ours, strict=True)]
    torch.testing.assert_close(residual_block(X, ours), reference.residual_block(X, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)
        assert a.num_batches_tracked == b.num_batches_tracked == 1


def test_one_number_stands_for_both_directions():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    expected = residual_block(x, [ConvBN(weight, padding=(1, 1))])
    same(residual_block(x, [ConvBN(weight, stride=1, padding=1, dilation=[1])]), expected)
    projected = ConvBN(torch.randn(4, 4, 1, 1), stride=2)
    out = residual_block(x, [ConvBN(weight, stride=2, padding=1)], projected)
    same(out, residual_block(x, [ConvBN(weight, stride=(2, 2), padding=(1, 1))], projected._replace(stride=(2, 2))))


def test_on_the_meta_device_and_in_a_trace_the_reference_runs():
    x, unit = torch.randn(2, 4, 6, 6), ConvBN(torch.randn(4, 4, 3, 3), padding=(1, 1))
    assert residual_block(x.to("meta"), [unit._replace(weight=unit.weight.to("meta"))]).shape == x.shape
    traced = torch.jit.trace(lambda t: residual_block(t, [unit]), (x,))
    assert "fused_res::" not in str(traced.graph)
    torch.testing.assert_close(traced(x), residual_block(x, [unit]))


def test_a_tensor_that_acts_has_its_effect():
    class Halved(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                if func is torch.nn.functional.conv2d:
                    args = (args[0], args[1] * 0.5, *args[2:])
                return func(*args, **(kwargs or {}))

    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 1, 1)
    running = {"running_mean": torch.zeros(4), "running_var": torch.ones(4), "training": False}
    got = residual_block(x, [ConvBN(Halved(weight), **running)])
    torch.testing.assert_close(got, residual_block(x, [ConvBN(weight * 0.5, **running)]))
