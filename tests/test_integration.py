"""Blocks inside the rest of PyTorch: compile, export, autograd's corners, BN's options, layouts, hooks and foreign layers."""

import copy
import importlib
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fused_res
from fused_res import BasicBlock, Bottleneck, use_backend


def _projection(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _pooled(inputs, outputs):
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


BLOCKS = {
    "identity": lambda **kw: BasicBlock(8, 8, **kw),
    "projection": lambda **kw: BasicBlock(6, 8, 2, _projection(6, 8, 2), **kw),
    "bottleneck": lambda **kw: Bottleneck(16, 4, residual_scale=0.5, **kw),
    "pooled": lambda **kw: Bottleneck(6, 4, 2, _pooled(6, 16), **kw),
    "as it is": lambda **kw: BasicBlock(6, 8, 2, nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1)), **kw),
}
every_block = pytest.mark.parametrize("kind", BLOCKS)


def make(kind, dtype=torch.float64, seed=0, **options):
    """A block whose parameters and buffers all differ, the same at every call."""
    torch.manual_seed(seed)
    block = BLOCKS[kind](**options)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in (
                (m.weight, 0.5, 1.5),
                (m.bias, -0.5, 0.5),
                (m.running_mean, -0.5, 0.5),
                (m.running_var, 0.5, 2),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
    return block.to(dtype)


def image(block, n=3, size=7, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, block.conv1.in_channels, size, size, dtype=dtype)


class Eager(nn.Module):
    """The block's own child modules, run by hand as torchvision runs them."""

    def __init__(self, block):
        super().__init__()
        self.depth = block.depth
        self.residual_scale = block.residual_scale
        for name, child in block.named_children():
            self.add_module(name, child)
        self.downsample = block.downsample

    def forward(self, x):
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            out = self.relu(out) if i < self.depth else out
        if self.residual_scale is not None:
            out = out * self.residual_scale
        out = out + (x if self.downsample is None else self.downsample(x)).to(out.dtype)
        return self.relu(out)


def eager(block):
    return Eager(copy.deepcopy(block))


def weights(out):
    """A fixed gradient for this output, no two values alike."""
    return torch.linspace(-1, 1.5, out.numel()).sin().view(out.shape).to(out)


def step(module, x, dout=weights, call=None):
    """One forward and backward: output, gradients (None where none came) and buffers by name."""
    module.zero_grad()
    x = x.detach().requires_grad_(x.is_floating_point())
    out = (module if call is None else call)(x)
    torch.autograd.backward(out, dout(out))
    found = {"out": out.detach().clone(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def assert_same(got, expected, rtol=1e-9, atol=1e-10):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch):
    monkeypatch.setattr("fused_res.modules._warned", set())


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the reference backend's convolutions."""
    count = dict.fromkeys(("conv_fprop", "conv_dgrad", "conv_wgrad"), 0)
    for name in count:
        module = importlib.import_module(f"fused_res.primitives.{name}")

        def counting(*args, name=name, plain=module.plain):
            count[name] += 1
            return plain(*args)

        monkeypatch.setattr(module, "plain", counting)
    with use_backend("reference", level="bn_act"):
        yield count


# Compilation and export


def recorder(graphs):
    """The aot_eager backend, noting for each graph that it gets how many of our operators are in it."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, inputs):
        graphs.append(sum("block_forward" in str(node.target) for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    return backend


@pytest.mark.parametrize("kind", ["projection", "bottleneck", "as it is"])
def test_compiled_in_one_graph_gives_eagers_step_without_recompiling(dynamo, kind):
    block, graphs = make(kind), []
    peer, x = eager(block), image(block)
    compiled = torch.compile(block, backend=recorder(graphs), fullgraph=True)
    assert_same(step(block, x, call=compiled), step(peer, x))
    with dynamo.config.patch(error_on_recompile=True):
        assert_same(step(block, x + 1, call=compiled), step(peer, x + 1))
    assert graphs == [1]


def test_compiled_evaluation_gives_eagers_output(dynamo):
    block = make("pooled").eval()
    x = image(block)
    with torch.no_grad():
        got = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(got, eager(block)(x), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_inductor_gives_eagers_step(dynamo):
    block = make("projection", torch.float32)
    peer, x = eager(block), image(block, dtype=torch.float32)
    assert_same(step(block, x, call=torch.compile(block, fullgraph=True)), step(peer, x), rtol=1e-4, atol=1e-5)


def test_use_backend_around_a_compiled_block_takes_effect_and_ends(dynamo):
    block, graphs = make("identity"), []
    peer, x = eager(block), image(block)
    compiled = torch.compile(block, backend=recorder(graphs), fullgraph=True)

    def run():
        assert_same(step(block, x, call=compiled), step(peer, x))
        with use_backend("eager"):
            assert_same(step(block, x, call=compiled), step(peer, x))
        assert graphs == [1, 0]
        with dynamo.config.patch(error_on_recompile=True):
            assert_same(step(block, x, call=compiled), step(peer, x))

    # In a thread that has never entered use_backend.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def test_freezing_a_bn_after_compilation_takes_effect(dynamo):
    block = make("identity")
    x = image(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    step(block, x, call=compiled)
    block.bn1.eval()
    peer = eager(block)
    assert_same(step(block, x, call=compiled), step(peer, x))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["pooled", "as it is"])
def test_exported_program_gives_the_blocks_output_and_buffers(kind, training, decomposed):
    block = make(kind).train(training)
    peer, x = eager(block), image(block)
    program = torch.export.export(block, (x,))
    if decomposed:
        program = program.run_decompositions()
        statistics = {n for n, _ in block.named_buffers()} if training else set()
        assert set(program.graph_signature.buffers_to_mutate.values()) == statistics
    module = program.module()
    for k in range(2):
        torch.testing.assert_close(module(x + k), peer(x + k), rtol=1e-10, atol=1e-12)
    assert_same(dict(module.named_buffers()), dict(peer.named_buffers()))


# Copies and wrappers


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
def test_activation_checkpointing_gives_eagers_gradients_and_counts_the_batch_no_more_often(kind, use_reentrant):
    block = make(kind)
    peer, x = eager(block), image(block)
    expected = step(peer, x, call=lambda t: checkpoint(peer, t, use_reentrant=use_reentrant))
    got = step(block, x, call=lambda t: checkpoint(block, t, use_reentrant=use_reentrant))
    # Without reentry the recomputation stops once everything is saved again, which for the last block in a checkpoint is before
    # its buffers are updated a second time; eager's have been by then.
    assert peer.bn1.num_batches_tracked == 2
    assert block.bn1.num_batches_tracked == (2 if use_reentrant else 1)
    if not use_reentrant:
        once = eager(make(kind))
        once(x)
        expected |= dict(once.named_buffers())
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


# Differentiation


def gradient_penalty(module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    (dx,) = torch.autograd.grad(out, x, weights(out), create_graph=True)
    (dx.square().sum() + out.square().sum()).backward()
    return {"dx": x.grad} | {f"d{n}": p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize("frozen", [None, "bn1", "all"])
@every_block
def test_gradient_penalty_has_eagers_gradients(kind, frozen):
    block = make(kind)
    add_biases(block)
    if frozen is not None:
        (block.bn1 if frozen == "bn1" else block).eval()
    peer, x = eager(block), image(block)
    got, expected = gradient_penalty(block, x), gradient_penalty(peer, x)
    # Where the second derivative is zero, eager may leave None.
    assert_same({k: v for k, v in got.items() if v is not None}, {k: v for k, v in expected.items() if got[k] is not None})
    assert all(v is not None or not expected[k].any() for k, v in got.items())


FROZEN = {
    "weights": lambda name: "conv" in name or name == "downsample.0.weight" or name == "downsample.1.weight",
    "conv1": lambda name: name.startswith("conv1"),
    "affine": lambda name: "bn" in name,
    "all but the last bn": lambda name: not name.startswith(("bn3", "bn2")),
    "all": lambda name: True,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x_wants", [True, False])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", ["identity", "pooled"])
def test_frozen_parameters_get_no_gradient_and_the_others_eagers(kind, frozen, x_wants, training):
    block = make(kind).train(training)
    for name, p in block.named_parameters():
        p.requires_grad_(not FROZEN[frozen](name))
    peer, x, results = eager(block), image(block), []
    for module in (block, peer):
        leaf = x.clone().requires_grad_(x_wants)
        out = module(leaf)
        if out.requires_grad:
            out.backward(weights(out))
        grads = {f"d{n}": p.grad for n, p in module.named_parameters()}
        results.append({"out": out.detach(), "dx": leaf.grad, **grads, **dict(module.named_buffers())})
        assert out.requires_grad == (x_wants or frozen != "all")
    assert_same(*results)


@pytest.mark.parametrize(
    ("wanted", "x_wants", "dgrads", "wgrads"),
    [
        ("everything", True, 4, 4),
        ("everything", False, 2, 4),
        ("nothing", True, 4, 0),
        ("nothing", False, 0, 0),
        ("conv3.weight", False, 0, 1),
        ("bn3.weight", False, 0, 0),
        ("conv2.weight", False, 1, 1),
        ("bn1.bias", False, 2, 0),
        ("downsample.1.weight", False, 0, 1),
    ],
)
def test_only_the_convolution_gradients_asked_for_are_computed(calls, wanted, x_wants, dgrads, wgrads):
    block = make("pooled")
    x = image(block)
    for name, p in block.named_parameters():
        p.requires_grad_(wanted in ("everything", name))
    out = block(x.requires_grad_(x_wants))
    assert calls == {"conv_fprop": 4, "conv_dgrad": 0, "conv_wgrad": 0}
    if out.requires_grad:
        out.sum().backward()
    assert calls == {"conv_fprop": 4, "conv_dgrad": dgrads, "conv_wgrad": wgrads}


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_forward_mode_derivatives_are_eagers_or_refused(wants_gradients):
    block = make("identity").eval().requires_grad_(wants_gradients)
    x = image(block)
    tangent = weights(x)
    expected = torch.func.jvp(eager(block), (x,), (tangent,))[1]
    try:
        got = torch.func.jvp(block, (x,), (tangent,))[1]
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_two_forwards_before_one_backward_give_eagers_gradients():
    block = make("projection")
    peer, x = eager(block), image(block)
    assert_same(step(block, x, call=lambda t: block(t) - 2 * block(t * 3)), step(peer, x, call=lambda t: peer(t) - 2 * peer(t * 3)))


@every_block
def test_running_statistics_written_between_forward_and_backward_do_not_reach_the_gradients(kind):
    block = make(kind).eval()
    peer, x = eager(block), image(block)

    def forward_then_write(t):
        out = block(t)
        with torch.no_grad():
            for buffer in block.buffers():
                buffer.copy_(torch.full_like(buffer, 7))
        return out

    got, expected = step(block, x, call=forward_then_write), step(peer, x)
    buffers = dict(block.named_buffers())
    assert_same({k: v for k, v in got.items() if k not in buffers}, {k: v for k, v in expected.items() if k not in buffers})


@pytest.mark.parametrize("name", ["conv1.weight", "bn2.weight", "residual_scale"])
def test_a_parameter_written_between_forward_and_backward_is_an_error(name):
    block = make("bottleneck")
    out = block(image(block))
    with torch.no_grad():
        block.get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice_needs_retain_graph_and_then_adds_the_same_gradients():
    block = make("projection")
    out = block(image(block))
    out.backward(weights(out), retain_graph=True)
    first = {n: p.grad.clone() for n, p in block.named_parameters()}
    out.backward(weights(out))
    assert_same({n: p.grad for n, p in block.named_parameters()}, {n: 2 * g for n, g in first.items()})
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def kept_bytes(module, x):
    """Tensors that autograd keeps for one forward, parameters and the module's buffers apart, and their bytes."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = module(x)
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values()), out


@every_block
def test_saved_are_x_convolution_outputs_vectors_and_sign_bits_alone(kind):
    block = make(kind, torch.float32)
    peer, x = eager(block), image(block, n=4, size=16, dtype=torch.float32).requires_grad_()
    with use_backend("reference", level="bn_act"):
        ours, out = kept_bytes(block, x)
    units = [getattr(block, f"conv{i}") for i in range(1, block.depth + 1)]
    outer = out.shape[2] * out.shape[3]
    pixels = [16 * 16 if kind == "pooled" else outer, *[outer] * (len(units) - 1)]
    if kind in ("projection", "pooled"):
        units, pixels = [*units, block.downsample[-2]], [*pixels, outer]
    of_ys = sum(4 * p * u.out_channels for u, p in zip(units, pixels, strict=True)) * x.itemsize
    of_vectors = sum(5 * u.out_channels for u in units) * 4
    of_signs = 4 * outer * -(-out.shape[1] // 8)
    expected = x.nbytes + of_ys + of_vectors + of_signs
    assert ours == expected
    # Less than eager even without the output, which eager keeps for its last ReLU.
    assert ours < kept_bytes(peer, x)[0]


def test_output_is_not_kept_by_the_graph():
    block, held = make("identity", torch.float32), []
    with saved_tensors_hooks(lambda t: held.append(t.untyped_storage().data_ptr()) or t, lambda t: t):
        out = block(image(block, dtype=torch.float32))
    assert held
    assert out.untyped_storage().data_ptr() not in held


# Options of the normalisation


def each_bn(block, change):
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            change(m)


def set_all(**values):
    def change(bn):
        for name, value in values.items():
            setattr(bn, name, value)

    return lambda block: each_bn(block, change)


def add_biases(block):
    torch.manual_seed(3)
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.randn(m.out_channels, dtype=m.weight.dtype))


OPTIONS = {
    "momentum None": ({"momentum": None}, lambda block: None),
    "momentum 0": ({"momentum": 0.0}, lambda block: None),
    "momentum 1": ({"momentum": 1.0}, lambda block: None),
    "eps": ({"eps": 0.1}, lambda block: None),
    "no affine": ({"affine": False}, lambda block: None),
    "no beta": ({}, set_all(bias=None)),
    "no gamma": ({}, set_all(weight=None)),
    "no tracking": ({"track_running_stats": False}, lambda block: None),
    "tracking ended": ({}, set_all(track_running_stats=False)),
    "no running statistics": ({}, set_all(running_mean=None, running_var=None)),
    "no counter": ({}, set_all(num_batches_tracked=None)),
    "momentum None without a counter": ({"momentum": None}, set_all(num_batches_tracked=None)),
    "biases": ({}, add_biases),
    "bn1 frozen": ({}, lambda block: block.bn1.eval()),
    "bn2 frozen": ({}, lambda block: block.bn2.eval()),
    "bn3 frozen": ({}, lambda block: block.bn3.eval()),
    "shortcut frozen": ({}, lambda block: block.downsample.eval()),
    "all frozen, tracking ended": ({}, lambda block: set_all(track_running_stats=False)(block.eval())),
    "biases, bn2 frozen": ({}, lambda block: (add_biases(block), block.bn2.eval())),
    "negative momentum": ({"momentum": -0.1}, lambda block: None),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_three_steps_with_bn_options_give_eagers_gradients_and_buffers(option, training):
    options, change = OPTIONS[option]
    block = make("pooled", norm_layer=partial(nn.BatchNorm2d, **options)).train(training)
    for name, value in options.items():
        setattr(block.downsample[-1], name, value) if name in ("momentum", "eps") else None
    change(block)
    peer, x = eager(block), image(block)
    for k in range(3):
        got, expected = step(block, x + k), step(peer, x + k)
        for name in [n for n in expected if n.endswith("bias") and "conv" in n and training and option == "biases"]:
            assert not got[name].any()
            assert expected[name].abs().max() < 1e-12
            expected[name] = got[name]
        assert_same(got, expected)


def test_bias_under_a_live_bn_has_an_exactly_zero_gradient_and_moves_the_running_mean():
    block = make("projection", torch.float32)
    add_biases(block)
    without = copy.deepcopy(block)
    for m in without.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = None
    x = image(block, dtype=torch.float32)
    got, other = step(block, x), step(without, x)
    for name in ("conv1", "conv2", "downsample.0"):
        assert torch.equal(got[f"d{name}.bias"], torch.zeros_like(got[f"d{name}.bias"]))
    torch.testing.assert_close(got["bn1.running_mean"], other["bn1.running_mean"] + 0.1 * block.conv1.bias)


POOLS = {
    "padding counted": nn.AvgPool2d(3, 2, 1),
    "padding left out": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ceil": nn.AvgPool2d((2, 3), 2, (0, 1), ceil_mode=True),
    "stride of the kernel": nn.AvgPool2d((2, 2)),
    "divisor": nn.AvgPool2d(3, 2, 1, divisor_override=4),
}


@pytest.mark.parametrize("pool", POOLS)
def test_every_option_of_the_shortcuts_pooling_is_obeyed(pool):
    block = make("pooled")
    block.downsample[0] = POOLS[pool]
    peer, x = eager(block), image(block, size=7 if pool == "ceil" else 8)
    assert fused_res.explain(block, x).rows[0].shortcut == ("as it is" if pool == "divisor" else "pooled projection")
    assert_same(step(block, x), step(peer, x))


@pytest.mark.parametrize("training", [True, False])
@every_block
def test_an_empty_batch_does_what_eager_does(kind, training):
    block = make(kind).train(training)
    peer, x = eager(block), image(block)[:0]
    assert_same(step(block, x), step(peer, x))


# Strides, layouts, aliasing

INPUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded over the batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded over channels": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    "expanded scalar": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "cropped": lambda x: nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "permuted batch": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
}


@pytest.mark.parametrize("layout", INPUTS)
@every_block
def test_input_of_any_strides_gives_eagers_step_and_is_not_written(kind, layout):
    block = make(kind)
    peer, x = eager(block), INPUTS[layout](image(block))
    before, version = x.clone(), x._version
    got = step(block, x)
    assert torch.equal(x, before)
    assert x._version == version
    assert_same(got, step(peer, before))


@pytest.mark.parametrize("layout", INPUTS)
@every_block
def test_incoming_gradient_of_any_strides_gives_eagers_gradients_and_is_not_written(kind, layout):
    block = make(kind)
    peer, x = eager(block), image(block)
    with torch.no_grad():
        dout = INPUTS[layout](weights(eager(block)(x)))
    before, version = dout.clone(), dout._version
    got = step(block, x, lambda out: dout)
    assert torch.equal(dout, before)
    assert dout._version == version
    assert_same(got, step(peer, x, lambda out: before))


@pytest.mark.parametrize(
    "use", [torch.Tensor.sum, lambda out: torch.cat((out, out * 2, out.flip(1)), 1)[:, 3:19].square().sum()], ids=["sum", "cat"]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_block
def test_gradients_through_a_sum_or_slices_of_a_concatenation_are_eagers(kind, memory_format, use):
    block = make(kind)
    peer, x = eager(block), image(block).contiguous(memory_format=memory_format)
    one = lambda out: torch.ones((), dtype=out.dtype)  # noqa: E731
    assert_same(step(block, x, one, lambda t: use(block(t))), step(peer, x, one, lambda t: use(peer(t))))


def test_output_shares_no_memory_with_x_and_may_be_written_in_place():
    block = make("identity")
    nn.init.zeros_(block.bn2.weight)
    peer, x = eager(block), image(block).abs()
    for training in (True, False):
        for module in (block, peer):
            module.train(training)
        assert_same(step(block, x, call=lambda t: block(t).mul_(2)), step(peer, x, call=lambda t: peer(t) * 2))


def layout(tensor):
    """Strides, but for dimensions of size 1, where they mean nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "of_weights", [torch.contiguous_format, torch.channels_last], ids=["NCHW weights", "channels_last weights"]
)
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last], ids=["NCHW x", "channels_last x"])
@pytest.mark.parametrize("shape", [{}, {"n": 1}, {"n": 4, "size": 1}], ids=["plain", "one image", "one pixel"])
@pytest.mark.parametrize("kind", ["identity", "projection", "bottleneck"])
def test_output_has_eagers_layout_and_gradients_that_of_their_tensors(kind, shape, of_x, of_weights, training):
    block = make(kind, torch.float32).to(memory_format=of_weights).train(training)
    peer, x = eager(block), image(block, dtype=torch.float32, **shape).contiguous(memory_format=of_x)
    between = x.clone().requires_grad_() * 1
    out = block(between)
    assert layout(out) == layout(peer(between))
    (dx,) = torch.autograd.grad(out, between, weights(out), retain_graph=True)
    assert layout(dx) == layout(x)
    out.backward(weights(out))
    # Exactly, since DistributedDataParallel compares them so.
    assert {n: p.grad.stride() for n, p in block.named_parameters()} == {n: p.stride() for n, p in block.named_parameters()}


@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last], ids=["NCHW x", "channels_last x"])
def test_output_of_one_pixel_has_eagers_strides(of_x):
    block = make("identity")
    peer, x = eager(block), image(block, n=4, size=1).contiguous(memory_format=of_x)
    assert block(x).stride() == peer(x).stride()


# Children that the operator cannot stand for


class Twice(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class FrozenNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1))

    def forward(self, x):
        return x * self.scale


def _hook(register):
    def change(block, seen):
        getattr(block.conv2, register)(lambda *args: seen.append(register))

    return change


def _override(block, seen):
    original = block.conv2.forward

    def forward(x):
        seen.append("forward")
        return original(x) * 2

    block.conv2.forward = forward


def _scaling_hook(block, seen):
    block.conv2.register_forward_hook(lambda module, args, out: seen.append("out") or out * 3)


def _parametrize(name, tensor_name, function):
    return lambda block, seen: function(getattr(block, name), tensor_name)


def _prune(module, name):
    from torch.nn.utils import prune

    prune.l1_unstructured(module, name, amount=0.5)


def _old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)


def _replace(name, new):
    return lambda block, seen: setattr(block, name, new(block).double())


CHANGES = {
    "forward pre-hook": (_hook("register_forward_pre_hook"), "conv2 has a forward pre-hook"),
    "forward hook": (_hook("register_forward_hook"), "conv2 has a forward hook"),
    "hook that changes the output": (_scaling_hook, "conv2 has a forward hook"),
    "full backward hook": (_hook("register_full_backward_hook"), "conv2 has a backward hook"),
    "full backward pre-hook": (_hook("register_full_backward_pre_hook"), "conv2 has a backward pre-hook"),
    "overridden forward": (_override, "conv2.forward is overridden"),
    "weight_norm": (_parametrize("conv1", "weight", nn.utils.parametrizations.weight_norm), "conv1 is a ParametrizedConv2d"),
    "spectral_norm": (_parametrize("conv1", "weight", nn.utils.parametrizations.spectral_norm), "conv1 is a ParametrizedConv2d"),
    "old weight_norm": (_parametrize("conv1", "weight", _old_weight_norm), "conv1 has a forward pre-hook"),
    "prune": (_parametrize("conv2", "weight", _prune), "conv2 has a forward pre-hook"),
    "pruned gamma": (_parametrize("bn1", "weight", _prune), "bn1 has a forward pre-hook"),
    "SyncBatchNorm": (_replace("bn2", lambda b: nn.SyncBatchNorm(8)), "bn2 is a SyncBatchNorm"),
    "frozen norm": (_replace("bn1", lambda b: FrozenNorm(8)), "bn1 is a FrozenNorm"),
    "subclassed norm": (_replace("bn1", lambda b: Twice(8)), "bn1 is a Twice"),
    "group norm": (_replace("bn2", lambda b: nn.GroupNorm(2, 8)), "bn2 is a GroupNorm"),
    "instance norm": (_replace("bn2", lambda b: nn.InstanceNorm2d(8)), "bn2 is a InstanceNorm2d"),
    "identity for a norm": (_replace("bn1", lambda b: nn.Identity()), "bn1 is a Identity"),
    "GELU": (_replace("relu", lambda b: nn.GELU()), "relu is a GELU"),
    "ReLU6": (_replace("relu", lambda b: nn.ReLU6()), "relu is a ReLU6"),
    "reflecting convolution": (
        _replace("conv2", lambda b: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        "conv2 has padding_mode='reflect'",
    ),
    "circular convolution": (
        _replace("conv2", lambda b: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))),
        "conv2 is a Sequential",
    ),
    "uneven padding": (_replace("conv2", lambda b: nn.Conv2d(8, 8, 2, padding="same")), "conv2 pads unevenly"),
}


def changed(name):
    """The block with a change applied, and the list that its hooks write to."""
    block, seen = make("projection"), []
    torch.manual_seed(4)
    CHANGES[name][0](block, seen)
    return block, seen


@pytest.mark.parametrize("name", CHANGES)
def test_a_foreign_or_observed_child_runs_itself_with_one_warning_and_a_reason(name):
    reason = CHANGES[name][1]
    block, seen = changed(name)
    twin, seen_by_hand = changed(name)
    x = image(block)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_same(step(block, x), step(Eager(twin), x))
    assert seen == seen_by_hand
    assert bool(seen) == ("hook" in name or "forward" in name)
    ours = [str(w.message) for w in caught if "fused_res" in str(w.message)]
    assert len(ours) == 1
    assert reason in ours[0]
    row = fused_res.explain(block, x).rows[0]
    assert row.backend == "eager"
    assert reason in row.reason
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(RuntimeError) as error:
            block(x)
        assert reason in str(error.value)
        assert backend in str(error.value)
    with use_backend("eager"):
        torch.testing.assert_close(block(x), twin_output(twin, x), rtol=1e-10, atol=1e-12)


def twin_output(twin, x):
    return Eager(twin)(x)


def test_removing_the_hook_returns_to_the_operator():
    block = make("identity")
    x = image(block)
    handle = block.bn1.register_forward_hook(lambda *args: None)
    assert block.unfused_reason(x) == "bn1 has a forward hook"
    handle.remove()
    assert block.unfused_reason(x) is None


def test_even_same_padding_runs_in_the_operator():
    block = make("projection")
    block.conv2 = nn.Conv2d(8, 8, 3, padding="same", dilation=2).double()
    peer, x = eager(block), image(block)
    assert block.unfused_reason(x) is None
    got, expected = step(block, x), step(peer, x)
    expected["dconv2.bias"] = torch.zeros_like(expected["dconv2.bias"])
    assert_same(got, expected)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("child", ["downsample", "downsample.0", "downsample.1"])
def test_a_hook_on_the_shortcut_is_called_and_the_main_branch_stays_fused(child, register):
    block, seen = make("projection"), []
    peer, x = eager(block), image(block)
    getattr(block.get_submodule(child), register)(lambda *args: seen.append(1))
    assert block.unfused_reason(x) is None
    assert_same(step(block, x), step(peer, x))
    assert seen == [1]
    row = fused_res.explain(block, x).rows[0]
    assert row.shortcut == "as it is"
    assert row.backend != "eager"
    assert row.reason.startswith(f"{child} has a ")


def test_a_shortcut_hook_that_changes_the_output_has_its_effect():
    block = make("projection")
    block.downsample[1].register_forward_hook(lambda module, args, out: out * 3)
    peer, x = eager(block), image(block)
    assert_same(step(block, x), step(peer, x))


@pytest.mark.parametrize(
    "register", ["register_module_forward_hook", "register_module_forward_pre_hook", "register_module_full_backward_hook"]
)
def test_a_global_module_hook_sees_every_child(register):
    block = make("projection")
    block.relu.inplace = False  # under backward hooks an in-place ReLU is an error, in eager too
    peer, x, seen = eager(block), image(block), []
    handle = getattr(torch.nn.modules.module, register)(lambda module, *args: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="a global module hook is registered"):
            got = step(block, x)
        called = {id(m) for m in seen}
        seen.clear()
    finally:
        handle.remove()
    assert_same(got, step(peer, x))
    assert called == {id(m) for m in block.modules()}
    assert block.unfused_reason(x) is None
    assert not seen


def test_hooks_on_the_block_itself_are_called_and_leave_it_fused():
    block, seen = make("identity"), []
    peer, x = eager(block), image(block)
    block.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    block.register_forward_hook(lambda module, args, out: seen.append("post") or out * 2)
    block.register_full_backward_hook(lambda module, dx, dout: seen.append("backward"))
    assert block.unfused_reason(x) is None
    assert_same(step(block, x), step(peer, x, call=lambda t: peer(t) * 2))
    assert seen == ["pre", "post", "backward"]


def test_hooks_on_parameters_are_called():
    block, seen = make("identity"), []
    x = image(block)
    block.conv1.weight.register_hook(lambda g: seen.append("grad") or g * 2)
    block.conv1.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    expected = step(eager(make("identity")), x)["dconv1.weight"] * 2
    torch.testing.assert_close(step(block, x)["dconv1.weight"], expected)
    assert seen == ["grad", "accumulated"]
