"""Programs that the compiled library runs: what Python would have done, to the last bit, and no longer than it would have."""

import gc
import itertools
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from blocks import BLOCKS, image, make, step
from fused_res import backends, internals, use_backend
from fused_res.block import lowered, program
from fused_res.block.noted import Kept, Name, Noted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def native():
    reason = backends.supports("native", torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return torch.ops.fused_res


@pytest.fixture
def attempts(monkeypatch):
    """What came of every try, one after the other: a function, or None."""
    found = []
    monkeypatch.setattr(program, "lowered", lambda *args: found.append(lowered.lowered(*args)) or found[-1])
    return found


def both(schedule, *inputs):
    """What a schedule returns by itself, and by the library."""
    expected, programs = schedule(*inputs), {}
    program.run(programs, ("key",), schedule, inputs, "native")
    made = programs["key",]
    assert torch.ops.fused_res.run_program.default in made.__globals__.values()
    return expected, made


def assert_equal(got, expected):
    if isinstance(expected, (list, tuple)):
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b)
    elif expected is None:
        assert got is None
    else:
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()
        assert got.dtype == expected.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", ["bn_act", "epilogue", "prologue"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_whole_steps_are_the_librarys(kind, level, dtype, attempts):
    block = make(kind, dtype)
    x = image(block, dtype=dtype)
    with use_backend("native", level):
        for _ in range(2):
            step(block, x)
    assert len(attempts) == 2
    assert None not in attempts


def test_evaluation_on_prepared_weights_of_our_own_kernels_is_the_librarys(attempts):
    block = make("identity", torch.float32).eval()
    with torch.no_grad():
        block(image(block, n=1, size=4, dtype=torch.float32))
    assert len(attempts) == 1
    assert None not in attempts


def test_views_lists_results_in_place_and_none_come_out_as_from_python():
    def schedule(x, nothing, y):
        rows = x.as_strided((4, 3), (3, 1))
        first, second = x.unbind(0)
        a = rows.clone(memory_format=torch.contiguous_format)
        a.mul_(y)
        b = torch.cat([first, second, first])
        c = a.t().contiguous().select(0, 1)
        return (a, [torch.mm(first, first.t()), b, None], c, x, (rows.mm(a.t()),), b.to(torch.float64))

    x, y = torch.arange(12.0).view(2, 2, 3), torch.tensor(3.0)
    expected, made = both(schedule, x, None, y)
    for _ in range(3):
        found = made(x, None, y)
        assert_equal(found, expected)
        assert found[3] is x


def test_inputs_that_start_within_a_memory_are_read_from_there():
    def schedule(x):
        return x.select(0, 1).as_strided((2, 2), (1, 2)) * x.as_strided((2, 2), (2, 1))

    memory = torch.arange(40.0)
    _, made = both(schedule, memory[:8].view(2, 4))
    for start in (0, 3, 17):
        x = memory[start : start + 8].view(2, 4)
        assert torch.equal(made(x), schedule(x))


def test_what_is_read_twice_by_one_operator_lives_as_long_and_no_longer(monkeypatch):
    def schedule(x):
        y = x.clone()
        return torch.mm(torch.mm(y, y), x)

    x = torch.randn(300, 300)
    expected, made = both(schedule, x)
    found, (sizes, most) = allocated(made, monkeypatch, x)
    assert_equal(found, expected)
    assert len(sizes) == 5
    assert most == 2 * x.nbytes


def test_results_are_inference_tensors_where_they_would_have_been():
    block = make("identity", torch.float32).eval()
    x, kinds = image(block, n=1, size=4, dtype=torch.float32), []
    for _ in range(3):
        with torch.inference_mode():
            kinds.append(block(x).is_inference())
    with torch.no_grad():
        kinds.append(not block(x).is_inference())
    assert kinds == [True] * 4


def allocated(made, monkeypatch, *inputs):
    """What the library makes of it, the bytes that were allocated and, below 0, freed, and the most that there were at a time."""
    asks = next(name for name, value in made.__globals__.items() if value is internals.is_profiled)
    monkeypatch.setitem(made.__globals__, asks, lambda: False)
    with torch.profiler.profile(profile_memory=True) as watched:
        found = made(*inputs)
    sizes = [event.nbytes() for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return found, (sizes, max(itertools.accumulate(sizes)))


def test_tensors_are_let_go_after_their_last_use(monkeypatch):
    """Of a chain of images two are alive at a time."""

    def schedule(x):
        for _ in range(8):
            x = x.clone()
        return x

    x = torch.randn(256, 1024)
    _, made = both(schedule, x)
    found, (sizes, most) = allocated(made, monkeypatch, x)
    assert len(sizes) == 15
    assert most == 2 * x.nbytes
    assert torch.equal(found, x)


def test_a_profiler_sees_every_operator():
    block = make("identity", torch.float32)
    x = image(block, dtype=torch.float32)
    with use_backend("native", "bn_act"):
        first = step(block, x)
        with torch.profiler.profile() as watched:
            again = step(block, x)
    assert_equal([again["out"], again["dx"]], [first["out"], first["dx"]])
    names = {event.name for event in watched.events()}
    assert {"fused_res::bn_stats_act", "fused_res::bn_act_backward", "fused_res::masked_add"} <= names
    assert "fused_res::run_program" not in names


def test_a_program_goes_with_its_function(native):
    _, made = both(lambda x: x.clone(), torch.ones(3))
    number = next(value for value in made.__code__.co_consts if type(value) is int)
    assert torch.equal(native.run_program(number, [torch.zeros(3)])[0], torch.zeros(3))
    gc.disable()
    try:
        del made
        with pytest.raises(RuntimeError, match=f"there is no number {number}"):
            native.run_program(number, [torch.zeros(3)])
    finally:
        gc.enable()


def test_a_program_that_goes_while_another_is_recorded_leaves_no_trace(attempts):
    """Whenever Python collects it; what frees it is no operator that somebody could see."""
    _, other = both(lambda x: x.clone(), torch.ones(3))
    holder = [other]
    del other

    def schedule(x):
        y = x.clone()
        holder.clear()
        return y.clone()

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(operator.name())
            return operator(*args, **(kwargs or {}))

    seen, x = [], torch.ones(3)
    with Watching():
        program.run({}, ("key",), schedule, (x,), "native")
    assert seen == ["aten::clone"] * 2
    assert attempts[-1] is not None


def test_threads_run_one_program_at_once():
    def schedule(x):
        y = x.clone()
        for _ in range(4):
            y = y.clone()
            y.mul_(x)
        return y

    _, made = both(schedule, torch.ones(100, 100))
    wrong = []

    def work(value):
        x = torch.full((100, 100), 0.5 * value)
        expected = schedule(x)
        wrong.extend(1 for _ in range(100) if not torch.equal(made(x), expected))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors_are_those_of_the_operators():
    """Of their types and with their words, ours and torch's. Then nothing of a run is left, and the next one is whole."""
    op = torch.ops.fused_res.bn_stats_finalize.default
    _, made = both(lambda y, gamma: op(y, gamma, None, 1e-5, None), torch.randn(4, 3), torch.ones(3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gamma: expected"):
            made(torch.randn(4, 3), torch.ones(5))
        assert made(torch.randn(4, 3), torch.ones(3)).shape == (5, 3)
    _, made = both(lambda x, i: torch.index_select(x, 0, i), torch.ones(3, 2), torch.tensor([2]))
    for _ in range(2):
        with pytest.raises(IndexError, match="out of range") as found:
            made(torch.ones(3, 2), torch.tensor([3]))
        assert found.value.__context__ is None
        assert torch.equal(made(torch.ones(3, 2), torch.tensor([0])), torch.ones(1, 2))


def test_nothing_that_may_fail_follows_a_write_to_an_input(attempts):
    """It would be written twice where Python makes the calls once more."""

    def first(x, y):
        x.t().mul_(y)
        return torch.mm(y, y)

    def last(x, y):
        z = torch.mm(y, y)
        x.mul_(y)
        return z

    for schedule in (first, last):
        program.run({}, ("key",), schedule, (torch.ones(2, 2), torch.ones(2, 2)), "native")
    assert attempts[0] is None
    assert attempts[1] is not None


@pytest.mark.parametrize("schedule", [lambda x: x.t(), lambda x: [x.clone(), x[0]], lambda x: x.view(torch.int32)])
def test_results_that_view_an_input_are_pythons(schedule, attempts):
    """Autograd and inference mode tell them from other tensors."""
    program.run({}, ("key",), schedule, (torch.ones(2, 2),), "native")
    assert attempts == [None]


def test_every_cpu_kernel_can_be_called_by_a_program():
    root = Path(__file__).parents[1] / "csrc" / "cpu"
    names = [name for path in root.glob("*.cpp") for name in re.findall(r'impl\w*\((?:m, )?"(\w+)"', path.read_text())]
    assert len(names) > 30
    assert all(map(backends.load("native").has_kernel, names))
    assert not backends.load("native").has_kernel("block_forward")


@pytest.mark.parametrize("runs", ["native", "triton"])
def test_running_statistics_move_when_all_else_is_done(runs, monkeypatch, request):
    """Where an operator of torch's fails before, Python may make all calls once more."""
    if runs == "triton":
        request.getfixturevalue("proven_interpreter")
    noted = []
    monkeypatch.setattr(program, "lowered", lambda steps, inputs, *_: noted.append((steps, inputs)))
    block = make("projection", torch.float32)
    with use_backend(runs, "bn_act"):
        block(image(block, n=1, size=4, dtype=torch.float32))
    (steps, inputs), buffers = noted[0], {id(buffer) for buffer in block.buffers()}
    moved = {f"i{i}" for i, tensor in enumerate(inputs) if id(tensor) in buffers}
    assert len(moved) == 9
    first = next(n for n, kept in enumerate(steps) if moved.intersection(kept.step.reads()))
    assert all(kept.step.views is not None for kept in steps[first + 1 :])


@pytest.mark.parametrize("function", [lambda x: x * 2, lambda x: x.add_(1), lambda x: torch.ops.aten.threshold(x, 0, 0)])
def test_calls_with_numbers_that_the_library_cannot_hand_on_are_pythons(function, attempts):
    """They are of type `Scalar`, or in a tensor's place."""
    programs, x = {}, torch.ones(3)
    for _ in range(2):
        found = program.run(programs, ("key",), lambda x: function(x.clone()), (x,), "native")
        assert torch.equal(found, function(x.clone()))
    assert attempts == [None]


def test_other_backends_are_pythons(attempts):
    program.run({}, ("key",), lambda x: x.clone(), (torch.ones(3),), "reference")
    assert not attempts


VIEW = [1, 2, 1, 0, 0, 0, 1, 1, 3, 1, 1, 0, 1, 1, 1]
"""One input, two places, one step: a view of place 0, which others read, too, in place 1, of 3 elements; place 1 comes out."""
CALL = [1, 2, 1, 1, 0, 1, 3, 0, 0, 0, 1, 1, 1, 1, 1, 1]
"""The same with a call of what has the name 0, with a tensor for its only argument and for its result."""


def test_the_two_programs_below_are_programs(native):
    x = torch.arange(5.0)
    assert torch.equal(native.run_program(native.make_program("", VIEW, []), [x])[0], x[:3])
    assert torch.equal(native.run_program(native.make_program("aten::neg.", CALL, []), [x])[0], -x)


@pytest.mark.parametrize("at", range(len(VIEW)))
def test_a_program_that_ends_early_is_refused(at, native):
    with pytest.raises(RuntimeError, match="program: "):
        native.make_program("", VIEW[:at], [])


@pytest.mark.parametrize(("code", "trusted"), [(VIEW, range(7, 12)), (CALL, (5, 6, 7, 10, 11))])
def test_no_place_is_beyond_a_program(code, trusted, native):
    """Every number, replaced by many: refused when it is made, or when it is run, or run on what is there. Trusted are the sizes of
    views, and that arguments and results are of their operator's types, as the recorder has found them."""
    x, refused = torch.arange(5.0), 0
    for at in set(range(len(code))).difference(trusted):
        for value in (-2, -1, 2, 3, 7, 70000, 2**62):
            try:
                native.run_program(native.make_program("aten::neg.", [*code[:at], value, *code[at + 1 :]], []), [x])
            except RuntimeError:
                refused += 1
    assert refused >= 6 * (len(code) - len(trusted))


def test_programs_are_given_as_many_tensors_as_they_take(native):
    made = native.make_program("", VIEW, [])
    with pytest.raises(RuntimeError, match="inputs: expected 1 tensors, got 2"):
        native.run_program(made, [torch.ones(3)] * 2)


def test_kernels_that_are_not_there_are_refused(native):
    with pytest.raises(RuntimeError, match="no kernel is called nothing"):
        native.make_program("nothing", CALL, [])


def test_an_operator_of_pythons_alone_is_not_lowered():
    steps = [Kept(Noted(len, (Name("i0"),), {}, None), frozenset())]
    assert lowered.lowered(steps, [torch.ones(3)], [], None, internals.is_profiled) is None


def test_launches_are_made_by_the_library():
    """Of kernels that lie in Triton's modules: with the tensors' addresses, numbers and stream of each run, and its errors."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("fake_launches.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
