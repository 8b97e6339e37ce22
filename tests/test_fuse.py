"""`fuse` and `unfuse`: in place, the same objects, only where nothing changes, and back again."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_res
from blocks import assert_same, image, make, step
from fused_res import Anatomy, explain, fuse, unfuse, use_backend
from fused_res.benchmarks.memory import saved_bytes
from users import Functional, Network, Scaled, Unsaid

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")]

USERS = [Functional, Scaled]
users = pytest.mark.parametrize("block", USERS, ids=lambda block: block.__name__)


def network(block=Functional, **options):
    torch.manual_seed(0)
    net = Network(block, **options).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.running_mean, std=0.2)
    return net


def images(n=2, size=9):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def reasons(model, x=None):
    return [row.reason for row in explain(model, images() if x is None else x).rows]


def is_fused(model, x=None):
    return {row.backend for row in explain(model, images() if x is None else x).rows} == {"native"}


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@users
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model_computes_what_it_did(block, training):
    net = network(block).train(training)
    expected = step(copy.deepcopy(net), images())
    assert fuse(net, strict=True) is net
    assert is_fused(net)
    assert_same(step(net, images()), expected)


@users
def test_every_object_stays_and_the_class_alone_changes_and_returns(block):
    net = network(block)
    modules, tensors = list(net.modules()), [*net.parameters(), *net.buffers()]
    classes, state, attributes = [type(m) for m in modules], net.state_dict(), [set(vars(m)) for m in modules]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fuse(fuse(net, level="prologue"), level="bn_act")
    assert all(isinstance(m, c) for m, c in zip(net.modules(), classes, strict=True))
    assert [type(m) is c for m, c in zip(modules, classes, strict=True)].count(False) == 3
    for _ in range(2):
        assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
        assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], tensors, strict=True))
        assert list(net.state_dict()) == list(state)
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}
        assert unfuse(net) is net
        assert [type(m) for m in modules] == classes
        assert [set(vars(m)) for m in modules] == attributes


def test_the_model_may_be_a_block_itself_and_blocks_of_ours_take_a_level():
    block = Functional(4, 4)
    assert type(fuse(block)).__name__ == "FusedFunctional"
    assert type(unfuse(block)) is Functional
    ours = make("bottleneck", torch.float32)
    fuse(ours, level="moment", strict=True)
    assert explain(ours, image(ours, dtype=torch.float32)).rows[0].level == "moment"
    assert unfuse(ours)._fused_res_level is None


def test_filter_sees_blocks_with_their_names_and_chooses():
    net, seen = network(), []
    fuse(net, filter=lambda module, name: seen.append((module, name)) or name.endswith("1"))
    assert seen == [(block, f"blocks.{i}") for i, block in enumerate(net.blocks)]
    assert [type(block) is Functional for block in net.blocks] == [True, False, True]
    assert reasons(net) == ["not fused: fused_res.fuse(model) would", None, "not fused: fused_res.fuse(model) would"]


def test_strict_names_every_block_that_stays_and_changes_nothing():
    net = network()
    net.blocks[0].bn2 = nn.GroupNorm(2, 8).double()
    net.blocks[2].conv1.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"blocks\.0: bn2 is a GroupNorm.*; blocks\.2: conv1 has a forward hook"):
        fuse(net, strict=True)
    assert all(type(block) is Functional for block in net.blocks)
    fuse(net)
    assert [reason is None for reason in reasons(net)] == [False, True, False]
    with pytest.raises(ValueError, match="no residual block that is known was found"):
        fuse(network(Unsaid), strict=True)
    fuse(net, filter=lambda module, name: name == "blocks.1", strict=True)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": 1}, TypeError, "model: expected an nn.Module, got int"),
        ({"filter": 1}, TypeError, "filter: expected a callable or None, got int"),
        ({"level": "most"}, ValueError, "level: expected one of bn_act, .*, got 'most'"),
    ],
)
def test_errors_name_the_argument_what_it_got_and_what_it_takes(arguments, error, words):
    arguments = {"model": network(), **arguments}
    with pytest.raises(error, match=words):
        fuse(**arguments)
    if arguments["model"] == 1:
        with pytest.raises(error, match=words):
            unfuse(1)


def test_levels_stand_with_the_model_and_use_backend_goes_before_them():
    net = network(Scaled)
    fuse(net, level="moment")
    assert {row.level for row in explain(net, images()).rows} == {"moment"}
    for model in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert {row.level for row in explain(model, images()).rows} == {"moment"}
    with use_backend("reference"):
        assert {(row.backend, row.level) for row in explain(net, images()).rows} == {("reference", "moment")}
    with use_backend("native", "epilogue"):
        assert {row.level for row in explain(net, images()).rows} == {"epilogue"}
    expected = step(unfuse(copy.deepcopy(net)), images())
    for reentrant in (False, True):

        def call(x, reentrant=reentrant):
            return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)

        got = step(net, images(), call=call)
        assert_same(
            {k: v for k, v in got.items() if "running" not in k and "num" not in k},
            {k: expected[k] for k in got if "running" not in k and "num" not in k},
        )
        net.load_state_dict(network(Scaled).state_dict())
    assert {row.level for row in explain(fuse(net), images()).rows} == {"bn_act"}


@pytest.mark.parametrize("level", fused_res.planner.LEVELS)
@pytest.mark.parametrize("kind", ["identity", "projection", "bottleneck", "pooled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_explain_says_what_a_block_keeps_for_backward_beside_eager(kind, level, dtype):
    block = fuse(make(kind, dtype), level=level)
    x = image(block, n=2, size=12, dtype=dtype).contiguous(memory_format=torch.channels_last)
    row = explain(block, x).rows[0]
    for backend, said in ((row.backend, row.saved_bytes), ("eager", row.eager_saved_bytes)):
        with use_backend(backend):
            kept = saved_bytes(lambda: block(x.detach().requires_grad_()), block)
        assert kept == said, backend
    assert explain(block.eval(), x).rows[0].saved_bytes is None


@pytest.mark.parametrize("projected", [False, True])
def test_explain_knows_that_frozen_bns_keep_no_images(libraries, projected):
    frozen = libraries("torchvision", "torchvision.ops").FrozenBatchNorm2d
    shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), frozen(16)) if projected else None
    block = fused_res.Bottleneck(16, 4, downsample=shortcut, norm_layer=frozen)
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    row = explain(block, x).rows[0]
    for backend, said in ((row.backend, row.saved_bytes), ("eager", row.eager_saved_bytes)):
        with use_backend(backend):
            assert saved_bytes(lambda: block(x.detach().requires_grad_()), block) == said, backend


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "pickle, protocol 0": lambda net: pickle.loads(pickle.dumps(net, 0)),
    "torch.save": lambda net: torch.load(_saved(net), weights_only=False),
    "copy of a copy": lambda net: copy.deepcopy(pickle.loads(pickle.dumps(net))),
}


def _saved(found):
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    return file


@users
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_fused_and_their_own(block, way):
    net = fuse(network(block))
    twin = COPIES[way](net)
    assert [type(b) for b in twin.blocks] == [type(b) for b in net.blocks]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    expected = step(unfuse(copy.deepcopy(net)), images())
    assert_same(step(twin, images()), expected)
    assert [type(b) for b in unfuse(twin).blocks] == [block] * 3


def test_a_pickle_from_a_process_with_another_forward_comes_back_unfused_and_says_so(monkeypatch):
    net, x = fuse(network()), images()
    kept, original = pickle.dumps(net), Functional.forward
    monkeypatch.setattr(Functional, "forward", lambda self, x: original(self, x) * 3)
    with pytest.warns(UserWarning, match="was fused when it was pickled, and is not here: its forward has .*mul"):
        found = pickle.loads(kept)
    assert [type(block) for block in found.blocks] == [Functional] * 3
    assert not torch.allclose(found(x), unfuse(copy.deepcopy(net)).eval()(x))
    # One that computes the same may be another.
    monkeypatch.setattr(Functional, "forward", lambda self, x: original(self, x))
    assert is_fused(pickle.loads(kept))


def test_state_dicts_load_both_ways_with_weights_only_and_by_assignment():
    net, other = fuse(network()), network()
    file = _saved(net.state_dict())
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with torch.device("meta"):
        empty = fuse(Network(Functional), strict=True)
    empty.load_state_dict(other.state_dict(), strict=True, assign=True)
    assert is_fused(empty)
    assert_same(step(copy.deepcopy(empty), images()), step(other, images()))


def change_hook(block):
    block.bn1.register_forward_hook(lambda module, args, out: out * 2)


def change_norm(block):
    block.bn2 = nn.GroupNorm(2, 8).double()


def change_forward(block):
    block.forward = lambda x: torch.cat([x, x[:, :2]], 1) * 2


def change_sync(block):
    block.bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(block.bn1).eval()


def change_parametrization(block):
    nn.utils.parametrizations.weight_norm(block.conv1)


@pytest.mark.filterwarnings("ignore:fused_res")
@pytest.mark.parametrize("change", [change_hook, change_norm, change_forward, change_sync, change_parametrization])
def test_what_changes_inside_a_fused_block_takes_part_at_the_next_call(change):
    net, twin = fuse(network()), network()
    for model in (net, twin):
        change(model.blocks[1] if change is not change_forward else model.blocks[0])
    if change is not change_forward:
        assert reasons(net)[1] is not None
    assert_same(step(net, images()), step(twin, images()))


@pytest.mark.usefixtures("quiet")
def test_modes_dtypes_and_gradients_that_change_after_fusing_are_honoured():
    net, twin = fuse(network()), network()
    for model in (net, twin):
        model.blocks[0].bn1.eval()
        model.blocks[1].conv2.requires_grad_(False)
        model.blocks[2].bn2.momentum = None
        model.blocks[2].bn2.reset_running_stats()
    assert_same(step(net, images()), step(twin, images()))
    assert is_fused(net)
    out = net.float().to(memory_format=torch.channels_last)(images().float())
    torch.testing.assert_close(out, twin.float()(images().float()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fused_res")
def test_a_sum_of_two_dtypes_is_of_the_wider_one_where_it_was():
    x = torch.randn(2, 8, 5, 5)
    for block, wider in ((Scaled(8, 8), True), (Scaled(8, 4), False), (Functional(8, 8), False)):
        twin = copy.deepcopy(block)
        fuse(block, strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            reason = explain(block, x).rows[0].reason
            assert block(x).dtype == twin(x).dtype
            assert explain(block, x.bfloat16()).rows[0].reason is None
            assert block(x.bfloat16()).dtype == twin(x.bfloat16()).dtype
        assert reason == ("the sum of torch.bfloat16 and a shortcut of another dtype is of the wider one" if wider else None)


@pytest.mark.filterwarnings("ignore:fused_res")
def test_a_class_forward_that_is_replaced_after_fusing_runs():
    class Local(Functional):
        def forward(self, x):
            return super().forward(x)

    Local.forward = Functional.forward
    net, original = fuse(network(Local)), Functional.forward
    assert is_fused(net)
    try:
        Local.forward = lambda self, x: original(self, x) * 3
        assert set(reasons(net)) == {"Local.forward has been replaced"}
        with pytest.raises(ValueError, match=r"its forward has .*mul.* where a ReLU was expected"):
            fuse(network(Local), strict=True)
        twin = unfuse(copy.copy(net.blocks[1]))
        x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
        assert torch.equal(net.blocks[1](x), twin(x))
        assert net.blocks[1](x).sum() > 2 * original(twin, x).sum()
    finally:
        Local.forward = original


def test_called_by_keyword_with_too_much_or_too_little_a_block_answers_as_it_did():
    block, twin = fuse(Functional(4, 4)), Functional(4, 4)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x=x), twin(x))
    for arguments in ((), (x, x)):
        with pytest.raises(TypeError) as expected:
            twin(*arguments)
        with pytest.raises(TypeError) as got:
            block(*arguments)
        assert str(got.value) == str(expected.value)
    for bad in (x[0], x[0, 0], x.flatten(1)):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            twin(bad)
        with pytest.raises(type(expected.value)):
            block(bad)


class Attentive(Functional):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))).sigmoid() + self.shortcut(x))


class Twice(Functional):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn1(self.conv1(out))) if self.conv1.in_channels == self.conv1.out_channels else out
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Gelu(Functional):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.gelu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class InPlace(Functional):
    def forward(self, x):
        skip = self.shortcut(x)
        skip += self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(skip)


class Branching(Functional):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


class Besides(Functional):
    def forward(self, x):
        self.bn1(self.conv1(x))
        return super().forward(x)


class Weighted(Functional):
    def forward(self, x):
        return F.relu(torch.add(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))), self.shortcut(x), alpha=2))


class Linear(Functional):
    def forward(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)


class Two(Functional):
    def forward(self, x, y=None):
        return super().forward(x)


class Unshortcut(Functional):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + (self.shortcut(x) if len(self.shortcut) else x))


OTHERS = {
    Attentive: "its forward has sigmoid where bn2 was expected",
    Twice: "its forward has <.*relu.* where the input was expected",
    Gelu: "its forward has <.*gelu.* where a ReLU was expected",
    InPlace: "its forward adds to its shortcut in place",
    Branching: "its forward cannot be traced, to see what it computes: TraceError",
    Besides: "its forward also calls conv1",
    Weighted: "its forward has <.*add.* where a sum of two was expected",
    Linear: "its forward has <.*add.* where a ReLU was expected",
    Two: "its forward takes 2 tensors",
}


def test_a_shortcut_that_is_the_identity_need_not_be_called():
    assert is_fused(fuse(network(Unshortcut), strict=True))


@pytest.mark.parametrize("block", OTHERS, ids=lambda block: block.__name__)
def test_a_forward_that_is_not_what_the_anatomy_says_is_refused(block):
    with pytest.raises(ValueError, match=OTHERS[block]):
        fuse(block(4, 4), strict=True)


def test_an_anatomy_is_checked_and_may_come_after_the_class():
    class Later(Unsaid):
        pass

    with pytest.raises(ValueError, match="no residual block"):
        fuse(Later(4, 4), strict=True)
    Later.fused_res_anatomy = Anatomy((("conv1", "bn1"),), "skip")
    fuse(Later(4, 4), strict=True)
    Later.fused_res_anatomy = Anatomy((("conv1", "bn1"),), "shortcut")
    with pytest.raises(ValueError, match=r"its forward has .* where the shortcut was expected"):
        fuse(Later(4, 4), strict=True)
    Later.fused_res_anatomy = ["conv1", "bn1"]
    with pytest.raises(ValueError, match=r"fused_res_anatomy is a list, not a fused_res\.Anatomy"):
        fuse(Later(4, 4), strict=True)
    block = Unsaid(4, 4)
    assert explain(block, torch.randn(1, 4, 5, 5)).rows == ()


def test_a_block_with_a_forward_of_its_own_on_the_instance_is_left_alone():
    block = Functional(4, 4)
    block.forward = lambda x: x
    with pytest.raises(ValueError, match="its forward is overridden on the instance"):
        fuse(block, strict=True)
    assert fuse(block)(3) == 3


@users
def test_scripting_a_fused_model_compiles_the_original_and_leaves_the_model_as_it_was(block):
    net = fuse(network(block)).eval()
    scripted, kinds = torch.jit.script(net), [type(m) for m in net.modules()]
    assert [type(m) for m in net.modules()] == kinds
    assert is_fused(net)
    torch.testing.assert_close(scripted(images()), net(images()))
    assert list(scripted.state_dict()) == list(net.state_dict())


def test_scripting_a_model_of_our_blocks_leaves_them_where_they_are():
    net = nn.Sequential(make("pooled", torch.float32), nn.ReLU())
    torch.jit.script(net)
    assert isinstance(net[0], fused_res.Bottleneck)


@users
@pytest.mark.filterwarnings("ignore:fused_res")
def test_tracers_see_the_original_forward(block):
    net, twin = fuse(network(block)).eval(), network(block).eval()
    graphs = [torch.fx.symbolic_trace(model) for model in (net, twin)]
    assert [(n.op, str(n.target)) for n in graphs[0].graph.nodes] == [(n.op, str(n.target)) for n in graphs[1].graph.nodes]
    torch.testing.assert_close(graphs[0](images()), twin(images()))
    torch.testing.assert_close(torch.jit.trace(net, (images(),))(images()), twin(images()))


@users
def test_a_fused_model_compiles_into_one_graph_and_exports_as_operators(block, dynamo):
    net, twin = fuse(network(block)), network(block)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same(step(net, images(), call=compiled), step(twin, images()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net.eval(), (images(),))
    assert sum(str(n.target) == "fused_res.block.default" for n in program.graph.nodes) == 3
    torch.testing.assert_close(program.module()(images()), twin.eval()(images()))


def test_fusing_and_unfusing_what_is_compiled_already_takes_effect(dynamo):
    net = network()
    compiled = torch.compile(net, backend="aot_eager")
    expected = compiled(images())
    fuse(compiled)
    assert all(type(block) is not Functional for block in net.blocks)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(images()), expected)
    net.blocks[1].compile(backend="aot_eager")
    torch.testing.assert_close(net(images()), expected)
    unfuse(net)
    torch.testing.assert_close(compiled(images()), expected)


def test_functional_call_and_function_transforms_follow_the_parameters():
    net, twin = fuse(network()).eval(), network().eval()
    parameters = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    got = torch.func.functional_call(net, parameters, (images(),))
    torch.testing.assert_close(got, torch.func.functional_call(twin, parameters, (images(),)))
    gradients = [
        torch.func.grad(lambda p, m=model: torch.func.functional_call(m, p, (images(),)).sum())(parameters) for model in (net, twin)
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
