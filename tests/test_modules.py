"""Blocks as modules: copied, pickled, checkpointed, called functionally, converted and under autocast."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocks import assert_same, eager, every_block, image, make, projection, step, weights
from fused_res import BasicBlock, Bottleneck


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_runs_alone_and_alike(copied):
    block = make("pooled")
    x = image(block)
    step(block, x)
    twin = copied(block)
    before = copy.deepcopy(twin.state_dict())
    expected = step(block, x)
    assert_same(twin.state_dict(), before, rtol=0, atol=0)
    assert_same(step(twin, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_block
def test_activation_checkpointing_gives_eagers_gradients_and_buffers(kind, use_reentrant):
    block = make(kind)
    peer, x = eager(block), image(block)
    expected = step(peer, x, call=lambda t: checkpoint(peer, t, use_reentrant=use_reentrant))
    got = step(block, x, call=lambda t: checkpoint(block, t, use_reentrant=use_reentrant))
    # Also without reentry, where the recomputation stops once everything is saved again: both passes move them.
    assert peer.bn1.num_batches_tracked == block.bn1.num_batches_tracked == 2
    assert_same(got, expected)


def test_functional_call_uses_the_tensors_given():
    block = make("pooled")
    peer, x = eager(block), image(block)
    torch.manual_seed(2)
    values = {n: torch.rand_like(t) + 0.1 if t.is_floating_point() else t.clone() for n, t in block.state_dict().items()}
    before, results = copy.deepcopy(block.state_dict()), []
    for module in (block, peer):
        given = {n: v.clone().requires_grad_(v.is_floating_point() and "running" not in n) for n, v in values.items()}
        out = torch.func.functional_call(module, given, (x,))
        out.backward(weights(out))
        results.append(
            {"out": out.detach()} | {n: v.detach() for n, v in given.items()} | {f"d{n}": v.grad for n, v in given.items()}
        )
    assert_same(*results)
    assert_same(block.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@every_block
def test_without_gradients_output_and_buffers_are_eagers_and_nothing_is_recorded(kind, training, context):
    block = make(kind).train(training)
    peer, x = eager(block), image(block)
    with context():
        out = block(x)
        torch.testing.assert_close(out, peer(x), rtol=1e-10, atol=1e-12)
    assert not out.requires_grad
    assert out.is_inference() == (context is torch.inference_mode)
    assert_same(block.state_dict(), peer.state_dict())


@pytest.mark.parametrize("training", [True, False])
@every_block
def test_autocast_computes_in_bfloat16_and_returns_float32_gradients(kind, training):
    block = make(kind, torch.float32).train(training)
    peer, x = eager(block), image(block).float()

    def under_autocast(module):
        def call(t):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return module(t)

        return step(module, x, call=call)

    got, expected = under_autocast(block), under_autocast(peer)
    assert got["out"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
    # Gradients are held against float64 in test_accuracy.py, where a ReLU sign that rounding flips can be told from an error.
    torch.testing.assert_close(got["out"], expected["out"], rtol=0.02, atol=0.06)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 8e-3), (torch.bfloat16, 6e-2), (torch.float64, 1e-12)], ids=str)
@every_block
def test_a_converted_module_keeps_to_its_dtype(kind, dtype, atol):
    block = make(kind, torch.float32).to(dtype)
    peer, x = eager(block), image(block).to(dtype)
    got, expected = step(block, x), step(peer, x)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
    torch.testing.assert_close(got["out"], expected["out"], rtol=atol / 3, atol=atol)


EDITS = {
    "one number": lambda m: (setattr(m.conv1, "stride", 1), setattr(m.conv2, "dilation", 2), setattr(m.conv2, "padding", 2)),
    "lists": lambda m: (setattr(m.conv1, "stride", [1, 1]), setattr(m.conv2, "padding", [1]), setattr(m.conv2, "dilation", (1,))),
    "sizes": lambda m: setattr(m.conv2, "padding", torch.Size((1, 1))),
    "a number of numpy": lambda m: setattr(m.conv2, "padding", np.int64(1)),
    "a number of torch": lambda m: setattr(m.conv2, "stride", torch.tensor(1)),
    "same": lambda m: (setattr(m.conv2, "padding", "same"), setattr(m.conv2, "dilation", 2)),
    "valid": lambda m: setattr(m.conv1, "padding", "valid") or setattr(m.conv2, "padding", 2),
    "another kernel": lambda m: (
        setattr(m.conv2, "weight", nn.Parameter(m.conv2.weight.detach()[:, :, 1:2, 1:2].clone()))
        or setattr(m.conv2, "padding", "same")
    ),
    "groups": lambda m: (
        setattr(m.conv2, "groups", 2) or setattr(m.conv2, "weight", nn.Parameter(m.conv2.weight.detach()[:, ::2].clone()))
    ),
    "eps and momentum": lambda m: (setattr(m.bn1, "eps", 1), setattr(m.bn1, "momentum", 1), setattr(m.bn2, "momentum", None)),
    "statistics no longer tracked": lambda m: setattr(m.bn1, "track_running_stats", False),
    "training as a number": lambda m: setattr(m.bn1, "training", 0),
}


@pytest.mark.parametrize("name", EDITS)
def test_attributes_edited_after_construction_are_read_as_eager_reads_them(name):
    block = make("identity")
    EDITS[name](block)
    peer, x = eager(block), image(block)
    assert block.unfused_reason(x) is None
    assert_same(step(block, x), step(peer, x))


POOLS = ({"kernel_size": 2, "stride": None}, {"kernel_size": [2], "stride": (2, 2)}, {"stride": 2, "padding": (0,)})


@pytest.mark.parametrize("edit", POOLS)
def test_an_edited_pool_is_read_as_eager_reads_it(edit):
    block = make("pooled")
    for name, value in edit.items():
        setattr(block.downsample[0], name, value)
    peer, x = eager(block), image(block)
    assert_same(step(block, x), step(peer, x))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", (1, 1, 1)),
        ("stride", 1.0),
        ("stride", (1.0, 1.0)),
        ("dilation", True),
        ("padding", None),
        ("stride", 0),
        ("padding", -1),
    ],
)
def test_an_attribute_that_eager_refuses_is_refused_with_its_exception(name, value):
    block = make("identity")
    setattr(block.conv2, name, value)
    peer, x = eager(block), image(block)
    with pytest.raises((TypeError, RuntimeError)) as expected:
        peer(x)
    with pytest.raises(type(expected.value)) as got:
        block(x)
    assert name in str(got.value)


def test_same_padding_with_a_stride_is_refused_in_eagers_words():
    block = make("identity")
    block.conv2.padding, block.conv2.stride = "same", 2
    x = image(block)
    for module in (block, eager(block)):
        with pytest.raises(RuntimeError, match="padding='same' is not supported for strided convolutions"):
            module(x)


def test_residual_scale_survives_the_meta_device_to_empty_and_reset_parameters():
    with torch.device("meta"):
        block = Bottleneck(16, 4, residual_scale=0.25)
    block.to_empty(device="cpu")
    with torch.no_grad():
        block.residual_scale.fill_(float("nan"))
    for module in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        for m in module.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        assert module.residual_scale.item() == 0.25
        assert all(p.isfinite().all() for p in module.parameters())
    plain = Bottleneck(16, 4)
    plain.reset_parameters()
    assert plain.residual_scale is None


SIZES = [(1, 1), (1, 3), (3, 1), (2, 2)]


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize(("inputs", "outputs"), itertools.product((1, 2), (1, 2)))
def test_output_strides_are_eagers_for_one_channel_and_one_pixel(inputs, outputs, layout, weights_last):
    for block_type, size, n, stride in itertools.product((BasicBlock, Bottleneck), SIZES, (1, 2), (1, 2)):
        last = outputs * block_type.expansion
        downsample = None if inputs == last and stride == 1 else projection(inputs, last, stride)
        block = block_type(inputs, outputs, stride, downsample).eval()
        if weights_last:
            block = block.to(memory_format=torch.channels_last)
        x = torch.randn(n, inputs, *size)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "permuted":
            x = torch.randn(n, *size, inputs).permute(0, 3, 1, 2)
        out = x
        for i in range(1, block.depth + 1):
            out = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(out))
            out = block.relu(out) if i < block.depth else out
        out += x if downsample is None else downsample(x)  # in place, as torchvision adds
        expected = block.relu(out)
        assert block.unfused_reason(x) is None
        calls = [block]
        # Each type of block and each stride is exported once for each layout of x and of the weights.
        if size == (1, 1) and n == 2 and block_type is (BasicBlock, Bottleneck)[inputs - 1] and stride == outputs:
            calls.append(torch.export.export(block, (x,)).module())
        for got in (call(x) for call in calls):
            assert got.stride() == expected.stride(), (block_type, size, n, stride)
            torch.testing.assert_close(got, expected)


def replica_of(module):
    """As DataParallel makes one for another device: parameters are plain tensors, set on the modules."""
    replicas = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in m._modules.items():
            if child is not None:
                setattr(replica, name, replicas[child])
        for name, p in m._parameters.items():
            setattr(replica, name, None if p is None else p.clone())
    return replicas[module]


@every_block
def test_a_replica_of_data_parallel_stays_fused_and_has_eagers_gradients(kind):
    block = make(kind)
    peer, x = eager(block), image(block)
    assert replica_of(block).unfused_reason(x) is None
    got = step(block, x, call=lambda t: replica_of(block)(t))
    assert_same(got, step(peer, x))
