"""What is recorded of a call and replayed at the next one: the same to the last bit, and only where nothing else has changed."""

import copy
import gc
import threading
import weakref

import pytest
import torch

from blocks import BLOCKS, eager, image, make, step
from fused_res import backends, folds, plans, use_backend
from fused_res.block import op, program
from fused_res.planner import LEVELS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*torch.export keeps")]


@pytest.fixture
def runs(request):
    """A backend that runs float32 blocks on CPU tensors here."""
    if request.param == "triton":
        pytest.importorskip("triton")
        request.getfixturevalue("proven_interpreter")
    reason = backends.supports(request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def sampled(*cases):
    """Backends with all of these cases; but few for Triton's, whose interpreter is slow."""
    few = {
        ("projection", "bn_act"),
        ("projection", "moment"),
        *(("pooled", level) for level in LEVELS),
        ("pooled",),
        ("bottleneck",),
    }
    found = [(name, *case) for name in ("reference", "native", "triton") for case in cases if name != "triton" or case in few]
    return pytest.mark.parametrize(("runs", "kind", "level")[: len(found[0])], found, indirect=["runs"])


def recorded():
    """All programs of this test's calls, None for those that cannot be."""
    kept = [found if isinstance(found, dict) else found.programs for found in plans._derived.values()]
    found = [p for programs in kept for p in programs.values()]
    return [None if p is program._NEVER else p for p in found]


def by_schedule(monkeypatch):
    monkeypatch.setattr(program, "run", lambda programs, key, schedule, inputs, backend: schedule(*inputs))


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] is None and value is None) or torch.equal(got[name], value), name
        assert value is None or got[name].stride() == value.stride(), name


@sampled(*((kind, level) for kind in BLOCKS for level in LEVELS))
def test_a_replay_has_every_bit_and_stride_of_its_schedule(runs, kind, level, monkeypatch):
    block = make(kind, torch.float32)
    x, fresh = image(block, n=2, size=7, dtype=torch.float32), copy.deepcopy(block)
    with use_backend(runs, level):
        step(block, x)
        block.load_state_dict(fresh.state_dict())
        replayed = step(block, x)
        # Plain formulas put numbers into tensors where the recorder does not see it; and natively the moment form decides by values
        # whether channels need another pass.
        able = runs == "triton" or not (level == "moment" and kind in ("bottleneck", "pooled"))
        assert runs == "reference" or [p is not None for p in recorded()] == [able] * 2
        by_schedule(monkeypatch)
        expected = step(fresh, x)
    assert_equal(replayed, expected)


@pytest.mark.parametrize("training", [True, False])
@sampled(("pooled", "bn_act"), ("projection", "prologue"))
def test_what_a_graph_calls_is_replayed_too(runs, kind, level, training, monkeypatch):
    block = make(kind, torch.float32).train(training)
    x, fresh = image(block, n=2, size=7, dtype=torch.float32), copy.deepcopy(block)
    schedules = []
    for name in ("forward", "backward"):
        original = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *args, original=original: schedules.append(original) or original(*args))
    with use_backend(runs, level):
        module = torch.export.export(block, (x,)).module()
        step(module, x)
        module.load_state_dict(fresh.state_dict())
        replayed = step(module, x)
        assert runs == "reference" or len(schedules) == 2
        by_schedule(monkeypatch)
        module.load_state_dict(fresh.state_dict())
        expected = step(module, x)
        assert runs == "reference" or len(schedules) == 4
    assert_equal(replayed, expected)


@sampled(*((kind,) for kind in BLOCKS))
def test_evaluation_is_recorded_too(runs, kind, monkeypatch):
    block, outs = make(kind, torch.float32).eval(), []
    x = image(block, dtype=torch.float32)
    # Natively evaluation from `epilogue` on has its weights prepared, and programs of its own: see below.
    with use_backend(runs, "bn_act" if runs == "native" else "prologue"), torch.no_grad():
        for _ in range(2):
            outs.append(block(x))
        assert [p is not None for p in recorded()] == [runs != "reference"]
        by_schedule(monkeypatch)
        assert torch.equal(block(x), outs[0])
    assert torch.equal(outs[0], outs[1])


@sampled(("pooled",), ("bottleneck",))
def test_units_that_share_a_bn_move_it_one_after_the_other(runs, kind):
    """Although a block that is alike, but shares none, has been recorded."""
    apart, shared, peer = make(kind, torch.float32), make(kind, torch.float32), eager(make(kind, torch.float32))
    x = image(apart, dtype=torch.float32)
    for model in (shared, peer):
        model.bn2 = model.bn1
    with use_backend(runs, "bn_act"):
        for _ in range(2):
            step(apart, x)
            step(shared, x)
            step(peer, x)
    for name, buffer in peer.named_buffers():
        torch.testing.assert_close(shared.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("kind", BLOCKS)
def test_evaluation_on_prepared_weights_has_programs_for_every_shape_and_layout(kind, size, monkeypatch):
    reason = backends.supports("native", torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    block = make(kind, torch.float32).eval()
    x = image(block, n=3, size=size, dtype=torch.float32)
    inputs = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:1], x[:1].expand_as(x)]
    with torch.no_grad():
        outs = [[block(given) for given in inputs] for _ in range(2)]
        programs = [p for _, found in folds._folds[id(block)].calls.values() for p in found.programs.values()]
        assert len({id(p) for p in programs}) >= 4
        assert program._NEVER not in programs
        by_schedule(monkeypatch)
        outs.append([block(given) for given in inputs])
    for first, replayed, scheduled in zip(*outs, strict=True):
        for out in (replayed, scheduled):
            assert torch.equal(out, first)
            assert out.stride() == first.stride()


def test_momenta_that_change_are_followed_and_do_not_fill_memory(monkeypatch):
    block, peer = make("projection", torch.float32), eager(make("projection", torch.float32))
    peer.load_state_dict(block.state_dict())
    x = image(block, dtype=torch.float32)
    versions = [block.bn1.running_mean._version]
    for i in range(12):
        for model in (block, peer):
            model.bn1.momentum = None if i % 5 == 3 else 0.1 + 0.05 * i
            model(x)
        versions.append(block.bn1.running_mean._version)
    for name, buffer in peer.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)
    assert versions == sorted(set(versions))
    assert len(recorded()) == 1 + op._MOST_MOMENTA  # and one for all others


@pytest.mark.parametrize("kind", BLOCKS)
def test_other_strides_modes_and_gradients_have_programs_of_their_own(kind):
    block, peer = make(kind), eager(make(kind))
    x = image(block, size=8)
    inputs = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:1].expand_as(x), x.flip(0)]
    gradients = [torch.ones_like, lambda out: out.new_ones(()).expand_as(out), lambda out: torch.ones_like(out).transpose(2, 3)]
    for _ in range(2):
        for given in inputs:
            for dout in gradients:
                got, expected = step(block, given, dout), step(peer, given, dout)
                for name, value in expected.items():
                    torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for model in (block, peer):
        model.conv2.weight.requires_grad_(False)
        model.bn1.eval()
    for _ in range(2):
        got, expected = step(block, x), step(peer, x)
        for name, value in expected.items():
            assert value is None or torch.allclose(got[name], value, rtol=1e-9, atol=1e-10), name


def test_a_switch_that_decides_who_convolves_is_asked_at_every_call(monkeypatch):
    block = make("bottleneck", torch.float32)
    x = image(block, dtype=torch.float32)
    with use_backend("native", "prologue"):
        step(block, x)
        monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "own")
        step(block, x)
        assert len(recorded()) == 4
        monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", "all")
        with pytest.raises(ValueError, match="FUSED_RES_CONVOLUTIONS"):
            block(x)


def test_one_tensor_in_two_places_is_not_taken_for_two():
    block, peer = make("identity"), eager(make("identity"))
    x = image(block)
    for tied in (True, True, False, False):
        for model in (block, peer):
            second = model.conv1.weight if tied else torch.nn.Parameter(model.conv1.weight.detach() * 2)
            model.conv2.weight = second
        got, expected = step(block, x), step(peer, x)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_threads_record_each_their_own():
    """Two blocks of other sizes at once, over Triton's launches, which are noted outside of torch."""
    pytest.importorskip("triton")
    from fused_res.kernels.launching import watching

    inside, seen = threading.Event(), []

    def other():
        inside.wait(10)
        with use_backend("triton", "bn_act"), torch.no_grad():
            block = make("identity", torch.float32)
            seen.append(block(image(block, n=1, size=2, dtype=torch.float32)))

    thread = threading.Thread(target=other)
    thread.start()
    with watching(lambda *_, **__: pytest.fail("another thread's launch was noted here")):
        inside.set()
        thread.join()
    assert len(seen) == 1


def test_what_depends_on_values_is_not_recorded():
    def schedule(x):
        return x * 2 if x.sum().item() > 0 else x * 3

    programs = {}
    for _ in range(2):
        for sign, factor in ((1, 2), (-1, 3)):
            x = torch.full((4,), float(sign))
            assert torch.equal(program.run(programs, ("key",), schedule, (x,), "reference"), x * factor)
    assert programs == {("key",): program._NEVER}


def test_a_tensor_that_is_no_input_is_not_recorded():
    elsewhere = torch.ones(4)
    programs = {}
    program.run(programs, ("key",), lambda x: x + elsewhere, (torch.ones(4),), "reference")
    assert programs == {("key",): program._NEVER}


def test_results_in_place_views_lists_and_none_come_out_as_they_went_in():
    def schedule(x, y):
        first, second = x.unbind(0)
        z = x.t().contiguous()
        z.add_(1)
        rows = x.as_strided((4,), (1,))
        return (z, [first, second + 1, None], rows.view(2, 2).view(4), x, y)

    programs = {}
    x = torch.arange(4.0).view(2, 2)
    for _ in range(3):
        z, (first, second, nothing), rows, same, given = program.run(programs, ("key",), schedule, (x, None), "reference")
        assert torch.equal(z, x.t() + 1)
        assert torch.equal(first, x[0])
        assert torch.equal(second, x[1] + 1)
        assert torch.equal(rows, x.flatten())
        assert nothing is None
        assert given is None
        assert same is x


def test_neither_recording_nor_replaying_holds_a_tensor_longer_than_its_schedule():
    """A chain of images of which two are alive at a time."""
    most, shape = [], (1000, 1000)

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            found = operator(*args, **(kwargs or {}))
            alive = sum(type(t) is torch.Tensor and t.shape == shape for t in gc.get_objects())
            most[-1] = max(most[-1], alive)
            return found

    def schedule(x):
        for _ in range(6):
            x = x * 2
        return x

    programs, x = {}, torch.ones(shape)
    for _ in range(3):
        most.append(0)
        with Counting():
            program.run(programs, ("key",), schedule, (x,), "reference")
    # x itself, what is read and what is made; the mode sees the next before the last is let go
    assert most[0] <= most[2] + 1 <= 5


def test_the_number_of_programs_of_a_plan_is_bounded():
    programs = {}
    for i in range(200):
        program.run(programs, (i,), lambda x: x + 1, (torch.ones(2),), "reference")
    assert 0 < len(programs) <= program._MOST


def test_a_program_is_freed_with_its_plan():
    programs, x = {}, torch.ones(3)
    program.run(programs, ("key",), lambda x: x * 2, (x,), "reference")
    freed = []
    weakref.finalize(programs["key",], freed.append, True)
    gc.disable()
    try:
        programs.clear()
        assert freed == [True]
    finally:
        gc.enable()
