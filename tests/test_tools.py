"""Tools that look into a model find what they find in the original, or are told what to do."""

import copy
import importlib.util
import io
import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fused_res
from blocks import BLOCKS, Eager, add_biases, assert_same, eager, every_block, image, make, step, weights
from fused_res import use_backend

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:fused_res"),
]


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_on_the_meta_device_shapes_dtypes_and_strides_are_eagers_without_a_warning(kind, training):
    with torch.device("meta"):
        block = BLOCKS[kind]().train(training)
    peer, x = Eager(block), torch.empty(2, block.conv1.in_channels, 9, 8, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, expected = block(x), peer(x)
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert fused_res.explain(block, x).rows[0].reason == "x is on the meta device, without data"


def test_fake_tensors_run_in_the_operator():
    from torch._subclasses import FakeTensorMode

    block = make("pooled")
    x, mode = image(block), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        out = block(mode.from_tensor(x))
    assert out.shape == block(x).shape


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace_records_the_child_modules_checks_itself_and_warns_once(kind, training):
    block = make(kind).train(training)
    peer, x = eager(block), image(block)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(block, (x,), check_trace=not training)
    tracers = [w for w in caught if issubclass(w.category, torch.jit.TracerWarning)]
    assert all(w.filename == nn.functional.__file__ for w in tracers)  # batch_norm's own, in training
    said = [str(w.message) for w in caught if "fused_res" in str(w.message)]
    assert len(said) == 1
    assert "torch.jit.trace is tracing" in said[0]
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    assert "fused_res::" not in str(traced.inlined_graph)
    fresh = make(kind).train(training)
    for loaded in (traced, torch.jit.load(io.BytesIO(stored.getvalue()))):
        loaded.load_state_dict(fresh.state_dict())
        assert_same(step(loaded, x), step(copy.deepcopy(peer), x))


@every_block
def test_jit_script_compiles_the_child_modules(kind):
    block = make(kind)
    peer, x = eager(block), image(block)
    scripted, stored = torch.jit.script(block), io.BytesIO()
    torch.jit.save(scripted, stored)
    assert list(scripted.state_dict()) == list(block.state_dict())
    expected = step(peer, x)
    assert_same(step(torch.jit.load(io.BytesIO(stored.getvalue())), x), expected)


def test_jit_script_compiles_a_forward_of_the_users_own():
    class Doubling(fused_res.BasicBlock):
        def forward(self, x):
            return self.bn1(self.conv1(x)) * 2

    block = Doubling(4, 4).double().eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))


@every_block
def test_fx_takes_a_block_apart_and_the_leaf_stays_fused(kind):
    block = make(kind)
    peer, x = eager(block), image(block)
    with pytest.warns(UserWarning, match="torch.fx is tracing"):
        traced = torch.fx.symbolic_trace(block)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"conv1", "bn1", "relu"} <= called
    assert_same(step(traced, x), step(peer, x))

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, fused_res.BasicBlock | fused_res.Bottleneck)

    net = nn.Sequential(make(kind))
    assert [n.target for n in Leaf().trace(net).nodes if n.op == "call_module"] == ["0"]


def test_fx_graph_of_a_block_is_that_of_torchvisions(torchvision_resnet):
    theirs = torchvision_resnet.Bottleneck(16, 4)
    graphs = [torch.fx.symbolic_trace(module).graph for module in (fused_res.Bottleneck(16, 4), theirs)]
    ours, expected = ([(node.op, node.target) for node in graph.nodes] for graph in graphs)
    assert ours == expected


def test_feature_extractors_of_torchvision_give_its_features(torchvision_resnet):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    theirs = torchvision_resnet.ResNet(torchvision_resnet.Bottleneck, [1, 1, 1, 1]).double().eval()
    ours = torchvision_resnet.ResNet(fused_res.Bottleneck, [1, 1, 1, 1]).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    nodes = {"layer1": "a", "layer3.0.bn2": "b", "layer4.0.add": "c"}
    expected = create_feature_extractor(theirs, nodes)(x)
    found = create_feature_extractor(ours, nodes)(x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_quantisation_by_fx_quantises_the_convolutions_inside(torchvision_resnet):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no x86 quantisation engine")
    theirs = torchvision_resnet.BasicBlock(8, 8).eval()
    ours = fused_res.BasicBlock(8, 8).eval()
    ours.load_state_dict(theirs.state_dict())
    x, results = torch.randn(2, 8, 6, 6), []
    for module in (ours, theirs):
        prepared = prepare_fx(copy.deepcopy(module), get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        quantised = convert_fx(prepared)
        assert sum("quantized" in type(m).__module__ for m in quantised.modules()) >= 2
        results.append(quantised(x))
    assert torch.equal(*results)


def test_make_fx_keeps_the_operator():
    block = make("projection").eval()
    graph = make_fx(block)(image(block)).graph
    assert "fused_res.block_forward.default" in [str(node.target) for node in graph.nodes]


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_one_operator_and_says_once_what_to_do_for_quantisers(strict):
    block = make("projection").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            program = torch.export.export(block, (image(block),), strict=strict)
    said = [w for w in caught if "fused_res" in str(w.message)]
    assert ["keeps a block as one operator" in str(w.message) for w in said] == [True]
    assert 'use_backend("eager")' in str(said[0].message)
    assert [str(n.target) for n in program.graph.nodes].count("fused_res.block.default") == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export_under_use_backend_eager_has_the_originals_operators(strict):
    block = make("projection").eval()
    peer, x = eager(block), image(block)
    with use_backend("eager"):
        program = torch.export.export(block, (x,), strict=strict)
    kept = ("aten.conv2d.default", "aten.batch_norm.default")
    programs = (program, torch.export.export(peer, (x,), strict=strict))
    called, expected = ([str(n.target) for n in p.graph.nodes if str(n.target) in kept] for p in programs)
    assert called == expected
    assert len(called) == 6
    torch.testing.assert_close(program.module()(x), peer(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_made_without_gradients_can_be_trained(strict):
    block = make("identity")
    peer, x = eager(block), image(block)
    with torch.no_grad():
        module = torch.export.export(block, (x,), strict=strict).module()
    assert_same(step(module, x), step(peer, x))


def test_a_graph_of_make_fx_made_without_gradients_says_so_when_it_is_trained():
    block = make("identity").eval()
    x = image(block)
    with torch.no_grad():
        graph = make_fx(block)(x)
    out = graph(x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"under torch.no_grad\(\); to train it, make it with gradients enabled"):
        out.backward(weights(out))


@pytest.mark.parametrize(("kind", "strict"), [("pooled", True), *((kind, False) for kind in BLOCKS)], ids=lambda value: str(value))
def test_decomposed_programs_have_the_originals_operators(kind, strict):
    block = make(kind).eval()
    peer, x = eager(block), image(block)
    programs = [torch.export.export(module, (x,), strict=strict).run_decompositions() for module in (block, peer)]
    called, expected = ([str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs)
    # What runs by hand also converts the shortcut's dtype, to what it is already; the operator takes one of the output's shape.
    assert sorted(set(called) - {"aten.expand.default"}) == sorted(set(expected) - {"aten._assert_tensor_metadata.default"})
    assert called.count("aten.convolution.default") == expected.count("aten.convolution.default")
    assert {name.split(".")[0] for name in called} <= {"aten", "<built-in function getitem>"}
    torch.testing.assert_close(programs[0].module()(x), peer(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_decomposed_in_training_mode_a_program_is_plain_aten_and_moves_statistics(strict):
    block = make("pooled")
    add_biases(block)
    peer, x = eager(block), image(block)
    program = torch.export.export(block, (x,), strict=strict).run_decompositions()
    assert not [n for n in program.graph.nodes if n.op == "call_function" and "fused_res" in str(n.target)]
    module = program.module()
    for k in range(2):
        torch.testing.assert_close(module(x + k), peer(x + k), rtol=1e-10, atol=1e-12)
    assert_same(dict(module.named_buffers()), dict(peer.named_buffers()))


def test_a_compiled_program_has_the_fused_operator(dynamo):
    block = make("projection")
    peer, x = eager(block), image(block)
    module, seen = torch.export.export(block, (x,)).module(), []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "fused_res" in str(node.target))
        return graph.forward

    compiler = torch._dynamo.backends.common.aot_autograd(fw_compiler=note)
    assert_same(step(module, x, call=torch.compile(module, backend=compiler)), step(peer, x))
    if torch.__version__ >= "2.13":  # older ones do not say that they compile when they take a graph apart
        assert "fused_res.block_forward.default" in seen


def test_a_trace_made_without_gradients_can_be_trained():
    block = make("identity").eval()
    peer, x = eager(block), image(block)
    with torch.no_grad():
        traced = torch.jit.trace(block, (x,))
    assert_same(step(traced, x), step(peer, x))


def onnx_graph(module, x, dynamo):
    import onnx

    if dynamo:
        return torch.onnx.export(module, (x,), dynamo=True, verbose=False).model_proto
    stored = io.BytesIO()
    torch.onnx.export(module, (x,), stored, dynamo=False)
    return onnx.load_from_string(stored.getvalue())


@needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("kind", ["pooled", "bottleneck"])
def test_onnx_export_has_the_originals_operators_and_its_output(kind, dynamo):
    import onnxruntime

    block = make(kind, torch.float32).eval()
    peer, x = eager(block), image(block, dtype=torch.float32)
    truth = peer(x)  # first: without dynamo the export folds BNs into the weights of its model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [onnx_graph(module, x, dynamo) for module in (block, peer)]
    assert [str(w.message) for w in caught if "torch.export keeps" in str(w.message)] == []
    called, expected = ([node.op_type for node in model.graph.node] for model in models)
    assert called.count("Conv") == expected.count("Conv") == sum(isinstance(module, nn.Conv2d) for module in block.modules())
    if dynamo:
        assert sorted(called) == sorted(expected)
    assert {node.domain for node in models[0].graph.node} == {""}
    session = onnxruntime.InferenceSession(models[0].SerializeToString())
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), truth, rtol=1e-5, atol=1e-5)


@needs("torchao")
def test_pt2e_quantisation_under_use_backend_eager_quantises_as_in_the_original():
    from torchao.quantization.pt2e import HistogramObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    spec = QuantizationSpec(torch.uint8, HistogramObserver, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)

    class OfConvolutions(Quantizer):
        def annotate(self, model):
            for node in model.graph.nodes:
                if node.target is torch.ops.aten.conv2d.default:
                    operands = dict.fromkeys(node.args[:2], spec)
                    node.meta["quantization_annotation"] = QuantizationAnnotation(operands, spec, _annotated=True)
            return model

        def validate(self, model):
            pass

    block = make("identity", torch.float32).eval()
    x, counts = image(block, dtype=torch.float32), []
    for module in (block, eager(block)):
        with use_backend("eager"):
            exported = torch.export.export(module, (x,)).module()
        prepared = prepare_pt2e(exported, OfConvolutions())
        prepared(x)
        graph = convert_pt2e(prepared).graph
        counts.append(sum("quantize_per" in str(node.target) for node in graph.nodes))
    assert counts[0] == counts[1] > 0


@needs("tensorboard")
def test_tensorboards_graph_shows_the_child_modules(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    block = make("identity").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with SummaryWriter(str(tmp_path)) as writer:
            writer.add_graph(block, image(block))
    assert not any(issubclass(w.category, torch.jit.TracerWarning) for w in caught)
    assert any(b"conv2" in file.read_bytes() for file in tmp_path.iterdir())
