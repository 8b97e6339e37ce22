"""`Chain` and `Residual`: sequences of convolution, BN and ReLU as one operator, with and without a residual connection."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from compare import same
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocks import assert_same, step
from fused_res import Anatomy, BasicBlock, Chain, Residual, accuracy, explain, fuse, unfuse, use_backend
from fused_res.functional import residual_block
from fused_res.planner import LEVELS
from fused_res.spec import CHAIN, LINEAR, LINEAR_CHAIN, ConvBN

pytestmark = pytest.mark.usefixtures("one_thread")


def layers(*channels, relu=True, stride=1, kernel=3):
    """conv, BN, ReLU from each number of channels to the next, the first with the stride; without the last ReLU unless `relu`."""
    found = []
    for into, out in itertools.pairwise(channels):
        found += [nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        stride = 1
    return found if relu else found[:-1]


def pre(*channels):
    found = []
    for into, out in itertools.pairwise(channels):
        found += [nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, out, 3, padding=1)]
    return found


def randomised(module, dtype=torch.float64):
    return accuracy.random_block(module, 0).to(dtype)


def image(channels=4, size=(5, 6), dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(3, channels, *size, dtype=dtype)


class Peer(nn.Module):
    """The formula of `Residual` as one would write it."""

    def __init__(self, residual):
        super().__init__()
        self.block, self.shortcut = copy.deepcopy(residual.block), copy.deepcopy(residual.shortcut)
        if type(self.block) is Chain:
            self.block = nn.Sequential(*self.block)
        scale = residual.residual_scale
        self.residual_scale = None if scale is None else nn.Parameter(scale.detach().clone())

    def forward(self, x):
        out = self.block(x)
        out = out if self.residual_scale is None else self.residual_scale * out
        return out + (x if self.shortcut is None else self.shortcut(x))


RESIDUALS = {
    "linear": lambda **kw: Residual(nn.Sequential(*layers(4, 5, 4, relu=False)), **kw),
    "relu": lambda **kw: Residual(nn.Sequential(*layers(4, 5, 4)), **kw),
    "chain": lambda **kw: Residual(Chain(*layers(4, 3, 5, 4, relu=False)), **kw),
    "pre-activation": lambda **kw: Residual(nn.Sequential(*pre(4, 5, 4)), **kw),
    "nested": lambda **kw: Residual(
        nn.Sequential(nn.Sequential(*layers(4, 6)), nn.Identity(), nn.Sequential(*layers(6, 4, relu=False, kernel=1))), **kw
    ),
    "projection": lambda **kw: Residual(nn.Sequential(*layers(4, 6, 5, relu=False, stride=2)), shortcut="projection", **kw),
    "relu, projection": lambda **kw: Residual(nn.Sequential(*layers(4, 6, stride=2)), shortcut="projection", **kw),
    "a shortcut of its own": lambda **kw: Residual(
        nn.Sequential(*layers(4, 6, relu=False, stride=2)), shortcut=nn.Conv2d(4, 6, 3, 2, 1), **kw
    ),
}


@pytest.mark.parametrize("scale", [None, 0.5], ids=["", "scaled"])
@pytest.mark.parametrize("level", ["bn_act", "moment"])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_residual_runs_fused_and_a_step_is_eagers(kind, level, scale, cpu_backend):
    residual = randomised(RESIDUALS[kind](residual_scale=scale))
    peer, x = Peer(residual), image()
    with use_backend(cpu_backend, level):
        (row,) = explain(residual, x).rows
        assert row.backend == cpu_backend
        for training in (True, False):
            assert_same(step(residual.train(training), x), step(peer.train(training), x))
            with torch.no_grad():
                torch.testing.assert_close(residual(x), peer(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_chain_is_a_sequential_in_one_operator(depth, level, relu, cpu_backend):
    parts = layers(*(4, 6, 5, 3)[: depth + 1], relu=relu, stride=2)
    chain = randomised(Chain(*parts))
    peer, x = copy.deepcopy(nn.Sequential(*chain)), image()
    with use_backend(cpu_backend, level):
        (row,) = explain(chain, x).rows
        assert (row.backend, row.shortcut, len(row.units)) == (cpu_backend, "none", depth)
        for training in (True, False):
            assert_same(step(chain.train(training), x), step(peer.train(training), x))
            with torch.no_grad():
                torch.testing.assert_close(chain(x), peer(x), rtol=1e-9, atol=1e-10)
    assert list(chain.state_dict()) == list(peer.state_dict())


def as_function(module):
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *values: torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)


@pytest.mark.parametrize("level", LEVELS[:3])
@pytest.mark.parametrize("kind", ["linear", "projection", "a shortcut of its own"])
def test_gradcheck_and_gradgradcheck(kind, level):
    residual = randomised(RESIDUALS[kind](residual_scale=0.5))
    chain = randomised(Chain(*layers(4, 3, 2, relu=kind == "linear")))
    x = image(size=(3, 3))[:2].requires_grad_()
    with use_backend("reference", level):
        for module in (residual, chain):
            inputs = x, *module.parameters()
            assert torch.autograd.gradcheck(as_function(module), inputs, fast_mode=True)
            if level == "bn_act":
                assert torch.autograd.gradgradcheck(as_function(module), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [LINEAR, CHAIN, LINEAR_CHAIN])
@pytest.mark.parametrize("level", ["bn_act", "prologue"])
def test_forms_on_triton_are_those_of_the_formulas(form, level, dtype, device, proven_interpreter):
    """Whole forms of one convolution, in float32 to the last bits, in 16 bits to a rounding or two of what is stored."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    wide = {"dtype": torch.float64, "requires_grad": True, "device": device}
    unit = ConvBN(torch.randn(20, 20, 1, 1, **wide), None, torch.rand(20, **wide), torch.randn(20, **wide))
    x = torch.randn(2, 20, 5, 6, **wide)
    results = []
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        statistics = torch.float64 if kind == torch.float64 else torch.float32
        tensors = ((x, kind), (unit.weight, kind), (unit.gamma, statistics), (unit.beta, statistics))
        narrow = [t.detach().to(dtype_).requires_grad_() for t, dtype_ in tensors]
        with use_backend(backend, level):
            out = residual_block(narrow[0], [ConvBN(narrow[1], None, *narrow[2:])], form=form)
        dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, narrow, dout.to(out.dtype))])
    for i, (got, expected) in enumerate(zip(results[1], results[0], strict=True)):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 16 * torch.finfo(dtype).eps, (i, error)


def test_shapes_that_differ_are_named_before_anything_runs_where_they_are_known():
    for relu in (True, False):
        residual = Residual(nn.Sequential(*layers(4, 8, relu=relu, stride=2)))
        with pytest.raises(RuntimeError, match=r"block\(x\) has the shape \(3, 8, 3, 3\), and x the shape \(3, 4, 5, 6\)"):
            residual(image(dtype=torch.float32))
        assert residual.block[1].num_batches_tracked == 0
    ran = []
    linear = nn.Linear(3, 4)
    linear.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(RuntimeError, match=r"block\(x\) has the shape \(2, 4\), and x the shape \(2, 3\)"):
        Residual(linear)(torch.randn(2, 3))
    assert ran == [1]
    with pytest.raises(RuntimeError, match=r"\(2, 1\), and x the shape \(2, 3\)"):  # which would broadcast
        Residual(nn.Linear(3, 1))(torch.randn(2, 3))
    wrong = Residual(nn.Sequential(*layers(4, 8, relu=False)), shortcut=nn.Conv2d(4, 8, 1, 2))
    with pytest.raises(RuntimeError, match=r"shape \(3, 8, 5, 6\), and shortcut\(x\) the shape \(3, 8, 3, 3\)"):
        wrong(image(dtype=torch.float32))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_output_that_is_known_beforehand_is_the_blocks(padding):
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=padding, dilation=2), nn.BatchNorm2d(4))
    x, residual = image(dtype=torch.float32), Residual(block)
    if padding == "same":
        assert residual(x).shape == x.shape
    else:
        with pytest.raises(RuntimeError, match=rf"\({', '.join(map(str, block(x).shape))}\)"):
            residual(x)


def test_any_module_that_keeps_the_shape_may_be_inside_and_says_why_it_is_not_fused(recwarn):
    x = image(dtype=torch.float32)
    for block, reason in (
        (nn.Conv2d(4, 4, 3, padding=1), "block does not end in a BN or a ReLU"),
        (BasicBlock(4, 4), "block is a BasicBlock, not nn.Conv2d"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()), "block.1 is a GroupNorm, not nn.BatchNorm2d"),
        (nn.Sequential(*layers(4, 4), nn.Dropout(0.0)), "block.3 is a Dropout, not nn.Conv2d"),
    ):
        residual = Residual(block, residual_scale=0.5)
        same(residual(x), Peer(residual)(x))
        assert explain(residual, x).rows[0].reason == reason
        with use_backend("reference"):
            residual(x)
    assert not recwarn.list
    assert Residual(nn.Identity())(torch.ones(3)).tolist() == [2, 2, 2]


def test_what_a_chain_cannot_stand_for_warns_once_and_is_refused_where_a_backend_is_forced():
    chain = Chain(nn.Conv2d(4, 4, 1), nn.SiLU())
    with pytest.warns(UserWarning, match="1 is a SiLU, not nn.BatchNorm2d"):
        same(chain(image(dtype=torch.float32)), nn.Sequential(*chain)(image(dtype=torch.float32)))
    with use_backend("reference"), pytest.raises(RuntimeError, match="cannot run this block: 1 is a SiLU"):
        chain(image(dtype=torch.float32))
    assert Chain(*pre(4, 4))._known()[1] == "0 is a BN in front of a convolution, and there is no shortcut"


@pytest.mark.filterwarnings("ignore:fused_res")
def test_hooks_and_edits_inside_count_from_the_next_call_on():
    residual, x = randomised(Residual(Chain(*layers(4, 4, relu=False)))), image()
    assert residual.unfused_reason(x) is None
    handle = residual.block.register_forward_hook(lambda *_: None)
    assert residual.unfused_reason(x) == "block has a forward hook"
    handle.remove()
    residual.block.append(nn.ReLU())
    peer = Peer(residual)
    assert_same(step(residual, x), step(peer, x))
    assert residual._anatomy.form == CHAIN
    residual.block[1] = nn.GroupNorm(2, 4).double()
    peer = Peer(residual)
    assert explain(residual, x).rows[0].reason == "block.1 is a GroupNorm, not nn.BatchNorm2d"
    assert_same(step(residual, x), step(peer, x))


def test_under_autocast_the_sum_is_of_the_wider_dtype_as_it_is_written():
    residual = randomised(RESIDUALS["linear"](), torch.float32)
    x = image(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="of the wider one"):
        assert residual(x).dtype == Peer(residual)(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert residual(x.bfloat16()).dtype == Peer(residual)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_move_the_statistics_in_both_passes(use_reentrant):
    residual = randomised(RESIDUALS["chain"](residual_scale=0.5))
    peer, x = Peer(residual), image()
    got, expected = (step(m, x, call=lambda t, m=m: checkpoint(m, t, use_reentrant=use_reentrant)) for m in (residual, peer))
    assert_same(got, expected)


def test_copies_pickles_scripts_and_levels():
    for module in (RESIDUALS["chain"](residual_scale=0.5), RESIDUALS["relu"](), Chain(*layers(4, 4, 4))):
        module, x = randomised(module, torch.float32).eval(), image(dtype=torch.float32)
        expected = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            same(twin(x), expected)
            assert twin.unfused_reason(x) is None
        stored = io.BytesIO()
        torch.jit.save(torch.jit.script(module), stored)
        torch.testing.assert_close(torch.jit.load(io.BytesIO(stored.getvalue()))(x), expected)
        fuse(module, level="prologue")
        assert {row.level for row in explain(module, x).rows} == {"prologue"}
        unfuse(module)
    assert type(Chain(*layers(4, 4))[:2]) is Chain


def test_torch_compile_follows_them_whole(dynamo):
    module = randomised(nn.Sequential(RESIDUALS["chain"](residual_scale=0.5), Chain(*layers(4, 6))), torch.float32)
    x = image(dtype=torch.float32)
    expected = step(copy.deepcopy(module), x)
    assert_same(step(module, x, call=torch.compile(module, backend="aot_eager", fullgraph=True)), expected, rtol=1e-5, atol=1e-5)


def test_the_residual_scale_survives_the_meta_device():
    with torch.device("meta"):
        residual = Residual(nn.Sequential(*layers(4, 4)), residual_scale=0.25)
    residual.to_empty(device="cpu").reset_parameters()
    assert residual.residual_scale.item() == 0.25


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "block: expected an nn.Module, got int"),
        ((nn.Identity(),), {"shortcut": 3}, TypeError, 'shortcut: expected an nn.Module, "projection" or None, got 3'),
        ((nn.Identity(),), {"shortcut": "project"}, TypeError, "shortcut: expected"),
        ((nn.Identity(),), {"residual_scale": True}, TypeError, "residual_scale: expected a number or None, got bool"),
        ((nn.Linear(2, 2),), {"shortcut": "projection"}, ValueError, "block is a Linear, not nn.Conv2d: give a module"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Residual(*arguments, **options)


class Plain(nn.Module):
    fused_res_anatomy = Anatomy((("conv1", "bn1"), ("conv2", "bn2")), shortcut=None, activations=("relu",), form=CHAIN)

    def __init__(self, last=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.last = nn.ReLU(), last

    def forward(self, x):
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x) if self.last else x


def test_fuse_takes_a_plain_block_whose_anatomy_says_its_form_and_refuses_what_is_not_the_truth():
    block = randomised(Plain())
    twin, x = copy.deepcopy(block), image()
    assert_same(step(fuse(block, strict=True), x), step(twin, x))
    assert explain(block, x).rows[0].shortcut == "none"
    with pytest.raises(ValueError, match="its forward has bn2 where a ReLU was expected"):
        fuse(Plain(last=False), strict=True)
    block = Plain(last=False)
    block.fused_res_anatomy = Plain.fused_res_anatomy._replace(form=LINEAR_CHAIN)
    assert fuse(block, strict=True).unfused_reason(x.float()) is None
    block.fused_res_anatomy = Plain.fused_res_anatomy._replace(form="nonsense")
    with pytest.raises(ValueError, match="has the form 'nonsense', not one of"):
        fuse(unfuse(block), strict=True)
