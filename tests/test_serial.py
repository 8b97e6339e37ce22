"""A network in evaluation as one call: that there is one, with the numbers of its modules one by one, in whatever circumstances."""

import copy
import io
import pickle

import pytest
import torch
from compare import same, within
from serial_networks import (
    DTYPES,
    Apart,
    combine,
    drawn,
    images,
    is_combined,
    marks,
    networks,
    one_by_one,
    served,
)
from torch.utils.flop_counter import FlopCounterMode

from fused_res import folds, fuse, network, serial, unfuse, use_backend
from fused_res.block import lowered

pytestmark = marks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@networks
def test_from_the_fifth_call_on_it_is_one_call_of_the_same_numbers(make, dtype, runs):
    net, x = served(make, dtype), images(dtype)
    expected = one_by_one(net, x)
    with torch.no_grad():
        truth = drawn(make, dtype).double()(x.double())
        for i in range(6):
            same(net(x), expected)
            assert len(runs) == max(0, i - 3)
        kept = x.clone()
        first, second = net(x), net(x)
    same(x, kept, "the image is left as it was")
    assert first.data_ptr() != second.data_ptr()
    within(first.double(), truth, 1e-4 if dtype == torch.float32 else 0.1)


@networks
def test_images_are_told_apart_by_their_values(make, runs):
    net, x = served(make), images()
    combine(net, x, runs)
    with torch.no_grad():
        same(net(-x), one_by_one(net, -x))
        assert not torch.equal(net(x), net(-x))


def test_kinds_of_images_are_kept_beside_each_other_within_bounds(runs):
    net = served()
    kinds = [images(), images(size=40), images(n=3)]
    expected = [combine(net, x, runs) for x in kinds]
    for x, out in zip(kinds, expected, strict=True):
        same(out, one_by_one(net, x))
        assert is_combined(net, x, runs)
    with torch.no_grad():
        for size in range(33, 33 + 2 * serial._MOST):
            for _ in range(5):
                net(images(size=size))
        assert len(vars(net)[network._MADE].stands_in["conv1"]._together) <= serial._MOST
        for x, out in zip(kinds, expected, strict=True):
            same(net(x), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_take_turns(dtype, runs):
    net, x = served(dtype=dtype), images(dtype)
    for _ in range(5):
        for each in (x, x.contiguous()):
            with torch.no_grad():
                found = net(each)
            same(found, one_by_one(net, each))
    assert is_combined(net, x, runs)


def test_dtypes_take_turns(runs):
    net, x = served(), images()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        net.to(dtype)
        expected = one_by_one(net, x.to(dtype))
        with torch.no_grad():
            for _ in range(4):
                same(net(x.to(dtype)), expected)


def test_images_that_are_views_empty_or_of_too_few_dimensions(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    wide = torch.zeros(4, 3, 32, 64).contiguous(memory_format=torch.channels_last)
    wide[::2, :, :, ::2] = x
    with torch.no_grad():
        for _ in range(5):
            within(net(wide[::2, :, :, ::2]), expected, 1e-5)
            assert net(x[:0]).shape == (0, 7)
        behind = torch.zeros(x.numel() + 5)[5:].view(2, 32, 32, 3).permute(0, 3, 1, 2)
        behind.copy_(x)
        same(net(behind), expected)
        for wrong in (x[0, 0], x[:, :2], x.double(), x.long()):
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                net(wrong)
        same(net(x), expected)


class Marked(torch.Tensor):
    pass


def test_a_tensor_of_another_class_is_seen(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    with torch.no_grad():
        found = net(x.as_subclass(Marked))
    assert len(runs) == before
    assert isinstance(found, Marked)
    within(found.as_subclass(torch.Tensor), expected, 1e-4)


def test_gradients_flow_where_they_are_asked_for(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    y = x.clone().requires_grad_()
    net(y).sum().backward()
    assert len(runs) == before
    want = x.clone().requires_grad_()
    unfuse(copy.deepcopy(net))(want).sum().backward()
    torch.testing.assert_close(y.grad, want.grad, rtol=1e-3, atol=1e-4)
    assert net.conv1.weight.grad is not None
    with torch.no_grad():
        same(net(y), expected)
        net.requires_grad_(False)
        same(net(x), expected)
        same(net(y), expected)


@pytest.mark.parametrize("inside", [lambda: torch.inference_mode(), lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_torchs_take_turns_with_none(inside, runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    twin = copy.deepcopy(net)
    with torch.no_grad(), Apart(), inside():
        within_it = twin(x)
    for _ in range(5):
        with torch.no_grad(), inside():
            found = net(x)
        same(found, within_it)
        assert found.is_inference() == within_it.is_inference()
        with torch.no_grad():
            plain = net(x)
        same(plain, expected)
        assert not plain.is_inference()
    with torch.inference_mode():
        made = images()
        for _ in range(5):
            same(net(made), expected)
    with torch.no_grad():
        same(net(x), expected)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_backend_that_is_asked_for_is_used(backend, runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    with torch.no_grad(), use_backend(backend):
        within(net(x), expected, 1e-3)
    assert len(runs) == before
    same(combine(net, x, runs), expected)


def test_who_is_to_run_the_convolutions_is_asked_at_every_call(runs, monkeypatch):
    net, x = served(), images()
    expected = combine(net, x, runs)
    for asked in ("library", "own"):
        monkeypatch.setenv("FUSED_RES_CONVOLUTIONS", asked)
        want = one_by_one(net, x)
        with torch.no_grad():
            for _ in range(5):
                same(net(x), want)
        within(want, expected, 1e-3)
    assert len({tuple(key[0]) for key in folds._folds[id(net.layer1[0])].made}) == 3


@pytest.mark.parametrize("level", ["bn_act", "epilogue"])
def test_a_level_that_is_asked_for_stands(level, runs):
    net, x = served(), images()
    combine(net, x, runs)
    fuse(net, level=level)
    expected = one_by_one(net, x)
    with torch.no_grad():
        for _ in range(5):
            same(net(x), expected)


@networks
def test_it_can_be_copied_pickled_saved_and_unfused(make, runs):
    net, x = served(make), images()
    expected = combine(net, x, runs)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    others = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)
    for other in others:
        assert not is_combined(other, x, runs)
        same(combine(other, x, runs), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
            assert not torch.equal(other(x), expected)
            same(net(x), expected)
    assert is_combined(net, x, runs)
    unfuse(net)
    assert not is_combined(net, x, runs)
    with torch.no_grad():
        same(net(x), drawn(make)(x))


def test_other_parameters_for_one_call_are_used(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    halves = {name: p.detach() * 0.5 for name, p in net.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(net, halves, (x,))
        assert not torch.equal(found, expected)
        same(net(x), expected)
        net.load_state_dict(halves, strict=False)
        same(net(x), found)


def test_a_profiler_sees_the_blocks_operators(runs):
    net, x = served(), images()
    combine(net, x, runs)
    before = len(runs)
    with torch.no_grad(), torch.profiler.profile() as profile:
        net(x)
    assert len(runs) == before
    names = [event.name for event in profile.events()]
    assert "fused_res::run_programs" not in names
    assert any("max_pool" in name for name in names)
    assert sum("bn_act" in name or "convolution" in name for name in names) >= 12
    assert is_combined(net, x, runs)


def test_tracers_and_modes_see_the_layers(runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    before = len(runs)
    with torch.no_grad():
        traced = torch.jit.trace(net, (x,), check_trace=False)
        with FlopCounterMode(display=False) as flops:
            net(x)
        mapped = torch.func.vmap(lambda image: net(image[None])[0])(x)
    assert len(runs) == before
    assert flops.get_total_flops() > 0
    within(traced(x), expected, 1e-4)
    within(mapped, expected, 1e-4)


def test_an_operator_that_fails_is_called_by_python_once_more(monkeypatch, runs):
    net, x = served(), images()
    expected = combine(net, x, runs)
    monkeypatch.setattr(lowered, "run_programs", lambda *_: None)
    with torch.no_grad():
        same(net(x), expected)


def test_the_blocks_by_themselves_and_the_package_know_nothing_of_it(runs):
    net, x = served(), images()
    names, attributes = list(net.state_dict()), set(vars(net))
    combine(net, x, runs)
    assert list(net.state_dict()) == names
    assert set(vars(net)) == attributes | {network._MADE}
    assert not any(isinstance(module, network.Stem | serial.Serial) for module in net.modules())
