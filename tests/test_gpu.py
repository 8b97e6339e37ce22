"""What only an NVIDIA GPU can show: CUDA graphs, streams, synchronisation, repeatability, and the Triton kernels at size."""

import copy
import json

import pytest
import torch
from compare import same
from torch import nn

from fused_res import BasicBlock, Bottleneck, accuracy, backends, explain, plans, use_backend
from fused_res.block import lowered, program
from fused_res.planner import LEVELS
from fused_res.primitives.bn_act import bn_act, unpack_signs
from fused_res.primitives.bn_act_backward import bn_act_backward_apply, bn_act_backward_finalize, bn_act_backward_reduce
from fused_res.primitives.bn_finalize import Vectors, bn_finalize
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.run import of
from fused_res.tuning import tuner


def _missing():
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    return backends.supports("triton", torch.device("cuda"), torch.float32)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_missing() is not None, reason=str(_missing()))]


def _projection(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def network(device="cuda", momentum=0.1):
    """Every kind of block once, with parameters and buffers that all differ."""
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128))
    model = nn.Sequential(
        BasicBlock(32, 32),
        BasicBlock(32, 64, 2, _projection(32, 64, 2)),
        Bottleneck(64, 32, 2, pooled, residual_scale=0.5),
        Bottleneck(128, 32),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
            m.momentum = momentum
    return model.to(device)


def images(device="cuda", n=8):
    return torch.randn(n, 32, 28, 28, generator=torch.Generator().manual_seed(1)).to(device, memory_format=torch.channels_last)


def loss_of(out):
    return (out * torch.linspace(-1, 1.5, out.numel(), device=out.device).sin().view(out.shape)).sum() / out.numel()


def step_from(state, model, x):
    """Output, gradients and buffers of a step."""
    model.load_state_dict(state)
    out = model(x)
    return [out, *torch.autograd.grad(loss_of(out), [x, *model.parameters()]), *(b.clone() for b in model.buffers())]


def relative(got, expected):
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_near(got, expected, limit):
    """Relative L2 error of every named tensor; integers exactly."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert relative(got[name], value) <= limit, (name, relative(got[name], value))
        else:
            same(got[name], value, name)


@pytest.fixture
def exact():
    """float32 convolutions in float32, by deterministic algorithms."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(params=LEVELS)
def level(request):
    """Every level of fusion, in force."""
    with use_backend("triton", request.param):
        yield request.param


@pytest.fixture
def deterministic(exact):
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(enabled)


def test_the_automatic_choice_here_is_triton():
    rows = explain(network(), images()).rows
    assert {row.backend for row in rows} == {"triton"}
    assert len(rows) == 4


# Tuning


def test_tuned_blocks_are_right_and_what_stands_was_measured_no_slower(exact, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CACHE", str(tmp_path / "cache"))
    model, x = network(), images()
    twin, found = copy.deepcopy(model), []
    with plans.afresh():
        loss_of(twin(x)).backward()
    monkeypatch.setenv("FUSED_RES_TUNE", "1")
    with plans.afresh():
        loss_of(model(x)).backward()
        assert {row.measured for row in explain(model, x).rows} == {True}
    assert_near({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in twin.named_parameters()}, 1e-3)
    for path in (tmp_path / "cache").rglob("*.json"):
        kept = json.loads(path.read_text())
        if kept["seconds"]:
            incumbent = "bn_act" if "bn_act" in kept["seconds"] else "library"
            found.append(kept["seconds"][kept["winner"]] <= kept["seconds"][incumbent])
    assert len(found) > 10
    assert all(found)


def test_nothing_is_measured_in_a_capture(exact, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RES_CACHE", str(tmp_path / "cache"))
    model, x = network().eval(), images()
    with torch.no_grad(), plans.afresh():
        model(x)
    monkeypatch.setenv("FUSED_RES_TUNE", "1")
    monkeypatch.setattr(tuner, "measure", None)
    with torch.no_grad(), plans.afresh():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        assert relative(out, model(x)) < 1e-6
        assert {row.measured for row in explain(model, x).rows} == {False}
    assert not list((tmp_path / "cache").rglob("*.json"))


# CUDA graphs and compilation


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_captured_training_step_replays_as_eager_steps_would(exact, level, momentum):
    model, x = network(momentum=momentum), images()
    twin = copy.deepcopy(model)
    optimizer, optimizer2 = (torch.optim.SGD(m.parameters(), lr=0.05, foreach=True) for m in (model, twin))

    def step(m, o):
        o.zero_grad(set_to_none=True)
        loss = loss_of(m(x))
        loss.backward()
        o.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured = step(model, optimizer)
    losses = []
    for k in range(4):
        x.copy_(images() * (k + 1))
        graph.replay()
        losses.append(captured.clone())
    expected = []
    for k in range(-3, 4):
        x.copy_(images() * max(k + 1, 1))
        expected.append(step(twin, optimizer2).detach())
    assert all(b == 7 for name, b in model.named_buffers() if name.endswith("num_batches_tracked"))
    assert_near(model.state_dict(), twin.state_dict(), 1e-5)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected[3:]), rtol=1e-4, atol=1e-6)


def test_a_captured_evaluation_reads_the_parameters_of_the_replay(exact, level):
    model, x = network().eval(), images()
    with torch.no_grad():
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.add_(0.3)
                m.weight.mul_(0.7)
        graph.replay()
        assert relative(out, model(x)) < 1e-6


@pytest.mark.slow
def test_compiled_for_reduced_overhead_trains_as_eager_blocks_do(exact):
    model, x = network(), images()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for m, call in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss_of(call(x)).backward()
            optimizer.step()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert_near(model.state_dict(), twin.state_dict(), 1e-4)
    assert model[0].bn1.num_batches_tracked == 6
    torch._dynamo.reset()


def test_graphed_callables_train_as_eager_blocks_do(exact, level):
    model, x = network(), images()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    graphed = torch.cuda.make_graphed_callables(model, (x.clone().requires_grad_(),))
    model.load_state_dict(before)  # warming up moves running statistics
    for m, call in ((model, graphed), (twin, twin)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for k in range(4):
            optimizer.zero_grad()
            loss_of(call((images() * (k + 1)).requires_grad_())).backward()
            optimizer.step()
    assert_near(model.state_dict(), twin.state_dict(), 1e-5)
    assert model[0].bn1.num_batches_tracked == 4


# Streams, devices, synchronisation, repeatability


def test_kernels_run_on_the_current_stream(exact, level):
    model, x = network(), images()
    expected = {
        n: g
        for (n, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss_of(model(x)), list(model.parameters())), strict=True
        )
    }
    out_expected = copy.deepcopy(model).eval()(x).detach()
    late, stream = torch.full_like(x, 7), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        out = model.eval()(late).detach()
        model.train()
        torch.cuda._sleep(50_000_000)
        grads = torch.autograd.grad(loss_of(model(late)), list(model.parameters()))
    torch.cuda.synchronize()
    assert_near({"out": out}, {"out": out_expected}, 1e-6)
    assert_near(dict(zip(expected, grads, strict=True)), expected, 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_block_on_another_than_the_current_device_runs_there(exact):
    first, second = network("cuda:0"), network("cuda:1")
    torch.cuda.set_device(0)
    loss_of(first(images("cuda:0"))).backward()
    out = second(images("cuda:1"))
    assert out.device == torch.device("cuda:1")
    loss_of(out).backward()
    grads = [{n: p.grad.cpu() for n, p in m.named_parameters()} for m in (second, first)]
    assert_near(*grads, 1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_does_not_wait_for_the_device(level, dtype, momentum):
    model, x = network(momentum=momentum), images().requires_grad_()
    frozen = copy.deepcopy(model)
    frozen[0].bn1.eval()
    frozen[1].downsample.eval()

    def step():
        for m in (model, frozen):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = m(x)
            out.backward(torch.ones_like(out))
        with torch.no_grad():
            model.eval()(x)
        model.train()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twenty_steps_from_one_state_are_bitwise_alike(deterministic, level, dtype):
    model, x = network().to(dtype), images(n=16).to(dtype).requires_grad_()
    initial, first = copy.deepcopy(model.state_dict()), None
    for k in range(20):
        found = step_from(initial, model, x)
        first = first or found
        for name, (a, b) in enumerate(zip(found, first, strict=True)):
            same(a, b, (k, name))
        # Other memory, other blocks in flight.
        torch.empty(k * 1_000_003, device="cuda").fill_(float("nan"))


def test_what_the_library_launches_computes_what_triton_does(deterministic, level, monkeypatch):
    """A step as it was recorded, as the compiled library makes it, and as Python does, for who wants to be told of launches."""
    if not backends.compiled("triton"):
        pytest.skip("the compiled library is not there")
    made, lower = [], lowered.lowered
    monkeypatch.setattr(program, "lowered", lambda *args: made.append(lower(*args)) or made[-1])
    model, x = network(), images().requires_grad_()
    initial, first = copy.deepcopy(model.state_dict()), None
    for hooked in (False, False, True):
        monkeypatch.setattr("fused_res.kernels.launching.is_hooked", lambda hooked=hooked: hooked)
        found = step_from(initial, model, x)
        first = first or found
        for name, (a, b) in enumerate(zip(found, first, strict=True)):
            same(a, b, (hooked, name))
    # At `moment` the pooled shortcut's gradient joins x's by an operator that takes a Scalar, and so its backward is Python's.
    assert len(made) == 8
    assert made.count(None) == (level == "moment")


# The Triton kernels against float64 and the plain formulas

STAGES = {
    "stage 1 basic": lambda: (BasicBlock(64, 64), 56),
    "stage 1 bottleneck": lambda: (Bottleneck(256, 64), 56),
    "stage 1 first": lambda: (Bottleneck(64, 64, 1, _projection(64, 256, 1)), 56),
    "stage 2 first": lambda: (Bottleneck(256, 128, 2, _projection(256, 512, 2)), 56),
    "stage 3": lambda: (Bottleneck(1024, 256, residual_scale=0.5), 14),
    "stage 4": lambda: (Bottleneck(2048, 512), 7),
    "stage 4 first basic": lambda: (BasicBlock(256, 512, 2, _projection(256, 512, 2)), 14),
    "odd sizes": lambda: (Bottleneck(52, 13), 17),
    "given shortcut": lambda: (BasicBlock(24, 40, 2, nn.Sequential(nn.Conv2d(24, 40, 3, 2, 1))), 19),
}


CASES = [(stage, None) for stage in STAGES]
CASES += [(stage, level) for stage in ("stage 2 first", "odd sizes", "given shortcut") for level in LEVELS]


SEEDS = 2
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def problem(stage, seed, device="cuda"):
    """A block in float64, its input and the gradient of its output, drawn on the CPU."""
    block, size = STAGES[stage]()
    block, generator = accuracy.random_block(block, seed), torch.Generator().manual_seed(seed)
    x = torch.randn(8, block.conv1.in_channels, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        shape = copy.deepcopy(block).float().eval()(x[:1].float()).shape
    dout = torch.randn(8, *shape[1:], generator=generator, dtype=torch.float64)
    return block.to(device), x.to(device), dout.to(device)


@every_dtype
@pytest.mark.parametrize(("stage", "level"), CASES)
def test_triton_is_as_accurate_as_eager(exact, stage, level, dtype):
    """By the rule of accuracy, the truth of the gradients under the ReLU signs that the candidate itself took."""
    block, x, _ = problem(stage, 0)
    with use_backend("triton", level):
        (row,) = explain(block.to(dtype), x.to(dtype)).rows
    assert row.backend == "triton"
    verdicts = accuracy.judge(lambda seed: problem(stage, seed), dtype, "triton", row.level, range(SEEDS), pure=True)
    assert [v for v in verdicts if not v.passed] == []


@every_dtype
@pytest.mark.parametrize(("stage", "level"), CASES)
def test_triton_gives_the_reference_backends_evaluation(exact, stage, level, dtype):
    block, x, dout = (t.to(dtype) for t in problem(stage, 0))
    block, x = block.eval().to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("triton", "reference"):
        module, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        with use_backend(backend, level):
            out = module(leaf)
            out.backward(dout)
        gradients = {"dx": leaf.grad, **{f"d{n}": p.grad for n, p in module.named_parameters()}}
        results.append(({"out": out.detach()} | dict(module.named_buffers()), gradients))
    (got, dgot), (expected, dexpected) = results
    eps = torch.finfo(dtype).eps
    assert_near(got, expected, 1e-5 if dtype == torch.float32 else eps)
    # A ReLU sign that flips within rounding moves a gradient; the library rounds what the kernels do not store.
    assert_near(dgot, dexpected, 3e-3 if dtype == torch.float32 else eps**0.5)


@pytest.mark.slow
@pytest.mark.skipif(_missing() is None and torch.cuda.get_device_properties(0).total_memory < 30e9, reason="needs 30 GB of memory")
def test_more_than_two_to_the_31_elements_are_all_normalised():
    channels, step = 64, 1 << 20
    rows = (1 << 31) // channels + 4 * step + 5
    torch.manual_seed(0)
    y = torch.empty(rows, channels, device="cuda", dtype=torch.bfloat16)
    for start in range(0, rows, step):
        # Rows far apart differ in mean, so that an index that wraps around reads wrong values.
        y[start : start + step].normal_(start / rows, 1.0)
    sums = torch.zeros(2, channels, device="cuda", dtype=torch.float64)
    for start in range(0, rows, step):
        part = y[start : start + step].double()
        sums += torch.stack((part.sum(0), part.square().sum(0)))
    mean = sums[0] / rows
    var = sums[1] / rows - mean.square()
    gamma = torch.linspace(0.5, 1.5, channels, device="cuda")
    beta = torch.linspace(-0.5, 0.5, channels, device="cuda")
    partials, tile = bn_stats(y, run=of("triton"))
    vectors = bn_finalize(partials, tile, rows, gamma, beta, 1e-5, run=of("triton"))
    torch.testing.assert_close(Vectors(*vectors).mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Vectors(*vectors).var.double(), var, rtol=1e-5, atol=1e-6)

    out, signs = bn_act(y, vectors, keep_signs=True, run=of("triton"))
    reduced = bn_act_backward_reduce(y, y, vectors, signs=signs, run=of("triton"))
    coefficients = bn_act_backward_finalize(reduced, 1, rows, vectors, gamma, beta, training=True, run=of("triton"))
    dy, _, _ = bn_act_backward_apply(y, y, vectors, coefficients, training=True, signs=signs, run=of("triton"))
    for start in (0, rows // 2, (1 << 31) // channels - 8, (1 << 31) // channels, rows - 16):
        part = slice(start, start + 16)
        want, want_signs = bn_act(y[part], vectors, keep_signs=True, run=of("reference"))
        torch.testing.assert_close(out[part], want, rtol=1e-2, atol=1e-2)
        same(unpack_signs(signs[part], channels), unpack_signs(want_signs, channels))
        want_dy, _, _ = bn_act_backward_apply(
            y[part], y[part], vectors, coefficients, training=True, signs=want_signs, run=of("reference")
        )
        torch.testing.assert_close(dy[part], want_dy, rtol=1e-2, atol=1e-2)
    total = torch.zeros(channels, device="cuda", dtype=torch.float64)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        total += torch.where(unpack_signs(signs[part], channels), y[part].double(), 0).sum(0)
    torch.testing.assert_close(reduced[:, 0].double().sum(0), total, rtol=1e-4, atol=1.0)


# Mixed precision


def test_grad_scaler_skips_a_step_whose_gradient_overflows_and_takes_the_next():
    model, x = network(), images()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=2.0**8)

    def step(factor):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            out = model(x)
        assert out.dtype == torch.float16
        scaler.scale(out.mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]

    assert step(1e9) == []
    assert scaler.get_scale() == 2.0**7
    assert "0.conv1.weight" in step(1.0)
    assert scaler.get_scale() == 2.0**7
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_nonfinite_incoming_gradient_reaches_what_it_reaches_in_eager(exact, level, dtype, value):
    model, x = network().to(dtype), images().to(dtype)
    with torch.no_grad():
        open_at = (model(x) > 0).nonzero()[0]
    results = []
    for backend, its in (("triton", level), ("eager", None)):
        leaf = x.clone().requires_grad_()
        with use_backend(backend, its):
            out = model(leaf)
            dout = torch.ones_like(out)
            dout[tuple(open_at)] = value
            results.append(torch.autograd.grad(out, [leaf, *model.parameters()], dout))
    for ours, eager in zip(*results, strict=True):
        same(ours.isfinite().all(), eager.isfinite().all())
    assert not results[0][0].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_nonfinite_pixel_spreads_as_in_eager(exact, level, value):
    model, x = network(), images()
    x[0, 0, 3, 3] = value
    with torch.no_grad():
        results = []
        for backend, its in (("triton", level), ("eager", None)):
            module = copy.deepcopy(model)
            with use_backend(backend, its):
                results.append((module(x), *module.buffers()))
    (ours, *buffers), (eager, *its_buffers) = results
    same(ours.isnan(), eager.isnan())
    for buffer, its in zip(buffers, its_buffers, strict=True):
        same(buffer.isfinite(), its.isfinite())
