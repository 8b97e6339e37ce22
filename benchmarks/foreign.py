"""Peers that need other packages (extra `peers`): ONNX Runtime and OpenVINO for evaluation on a CPU, inplace_abn for training.

Where the package is missing the peer says so. Registered by being imported.
"""

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_res.benchmarks.agreement import quantities, relative_error, tolerance, unit_roundoff
from fused_res.benchmarks.cases import ResNet
from fused_res.benchmarks.peers import CannotRunError, Peer, Setup, block_peer, eager, register
from fused_res.modules import ResidualBlock


def needed(module: str, package: str | None = None) -> ModuleType:
    """Import a package of the extra `peers`, or say that it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise CannotRunError(f"{package or module} is not installed (pip install 'fused-res[peers]')") from error


class _Graph:
    """An ONNX graph under construction. `casts` puts BN, whose parameters are in fp32, between two casts."""

    def __init__(self, element: int, casts: bool) -> None:
        self.onnx, self.element, self.casts = needed("onnx"), element, casts
        self.nodes, self.initializers = [], []

    def constant(self, tensor: Tensor) -> str:
        name = f"c{len(self.initializers)}"
        tensor = tensor.detach().cpu().contiguous()
        raw = tensor.view(torch.uint8).numpy().tobytes()
        element = element_type(tensor.dtype)
        self.initializers.append(self.onnx.helper.make_tensor(name, element, tensor.shape, raw, raw=True))
        return name

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def layer(self, module: nn.Module, x: str) -> str:
        """The nodes of a layer or a block."""
        if isinstance(module, ResidualBlock):
            return self.block(module, x)
        if isinstance(module, nn.Sequential | ResNet):  # whose children are called in their order
            for child in module.children():
                x = self.layer(child, x)
            return x
        if isinstance(module, nn.Conv2d):
            weights = [self.constant(t) for t in (module.weight, module.bias) if t is not None]
            attributes = {"strides": module.stride, "dilations": module.dilation, "group": module.groups}
            return self.node("Conv", x, *weights, pads=(*module.padding, *module.padding), **attributes)
        if isinstance(module, nn.BatchNorm2d):
            tensors = (module.weight, module.bias, module.running_mean, module.running_var)
            x = self.node("Cast", x, to=element_type(module.weight.dtype)) if self.casts else x
            x = self.node("BatchNormalization", x, *map(self.constant, tensors), epsilon=module.eps)
            return self.node("Cast", x, to=self.element) if self.casts else x
        if isinstance(module, nn.MaxPool2d):
            size, stride, padding = (2 * (value,) for value in (module.kernel_size, module.stride, module.padding))
            return self.node("MaxPool", x, kernel_shape=size, strides=stride, pads=2 * padding)
        if isinstance(module, nn.Linear):
            return self.node("Gemm", x, self.constant(module.weight), self.constant(module.bias), transB=1)
        kinds = {nn.ReLU: "Relu", nn.AdaptiveAvgPool2d: "GlobalAveragePool", nn.Flatten: "Flatten"}
        return self.node(kinds[type(module)], x)

    def block(self, block: ResidualBlock, x: str) -> str:
        skip = x if block.downsample is None else self.layer(block.downsample, x)
        layers = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, block.depth + 1)]
        for i, (conv, bn) in enumerate(layers):
            x = self.layer(bn, self.layer(conv, x))
            if i < len(layers) - 1:
                x = self.node("Relu", x)
        return self.node("Relu", self.node("Add", x, skip))


def element_type(dtype: torch.dtype) -> int:
    """ONNX's number of a dtype."""
    names = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    return needed("onnx").TensorProto.DataType.Value(names[dtype])


def onnx_model(module: nn.Module, x: Tensor, out: Tensor, casts: bool) -> bytes:
    """The module in evaluation mode as an ONNX model from `x` to `out`, of these shapes and dtypes."""
    element = element_type(x.dtype)
    graph = _Graph(element, casts)
    helper = graph.onnx.helper
    last = graph.layer(module, "x")
    graph.nodes.append(helper.make_node("Identity", [last], ["out"]))
    values = [helper.make_tensor_value_info(name, element, tensor.shape) for name, tensor in (("x", x), ("out", out))]
    made = helper.make_graph(graph.nodes, "block", values[:1], values[1:], graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def _exported(setup: Setup, casts: bool) -> tuple[bytes, list[Tensor], Tensor]:
    """The ONNX model, the inputs in NCHW, and where the output goes."""
    if setup.mode != "eval" or setup.device.type != "cpu":
        raise CannotRunError("it is timed for evaluation on a CPU only")
    module, inputs = setup.module("NCHW"), [x for x, _ in setup.inputs("NCHW")]
    with eager(), torch.no_grad():
        out = torch.empty_like(module(inputs[0]), memory_format=torch.contiguous_format)
    return onnx_model(module, inputs[0], out, casts), inputs, out


@register("ONNX Runtime", devices=("cpu",), modes=("eval",))
def onnx_runtime(setup: Setup) -> Peer:
    """ONNX Runtime's CPU provider, all graph optimisations, as many threads as torch, inputs and output bound without a copy.

    Its threads stop spinning when a run ends, so as not to disturb the next peer.
    """
    runtime = needed("onnxruntime")
    model, inputs, out = _exported(setup, casts=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    element, bindings = element_type(setup.dtype), []
    for x in inputs:
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, element, tuple(x.shape), x.data_ptr())
        binding.bind_output("out", "cpu", 0, element, tuple(out.shape), out.data_ptr())
        bindings.append(binding)

    def step(i: int) -> dict[str, Tensor]:
        session.run_with_iobinding(bindings[i])
        return {"out": out}

    return Peer(step, "NCHW", backend=f"onnxruntime {runtime.__version__}")


@register("OpenVINO", devices=("cpu",), modes=("eval",))
def openvino(setup: Setup) -> Peer:
    """OpenVINO's CPU plugin, latency hint, computing in the case's dtype, as many threads as torch, no copies."""
    vino = needed("openvino")
    model, inputs, out = _exported(setup, casts=setup.dtype != torch.float32)
    kind = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[setup.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": kind,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = vino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    if compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() != kind:
        raise CannotRunError(f"its CPU plugin does not compute in {kind} here")
    request = compiled.create_infer_request()

    def shared(tensor: Tensor) -> object:
        flat = tensor.detach().flatten()
        array = (flat if setup.dtype == torch.float32 else flat.view(torch.uint16)).numpy()
        return vino.Tensor(array, tuple(tensor.shape), getattr(vino.Type, kind))

    tensors = [shared(x) for x in inputs]
    request.set_output_tensor(shared(out))

    def step(i: int) -> dict[str, Tensor]:
        request.set_input_tensor(tensors[i])
        request.infer()
        return {"out": out}

    return Peer(step, "NCHW", backend=f"openvino {vino.__version__.split('-')[0]}")


LEAK = 0.01


class _InPlace(nn.Module):
    """A block of `InPlaceABN` layers; a leaky ReLU stands for the ReLU, which they cannot invert.

    With `abn` None the same block in plain PyTorch, for comparison.
    """

    def __init__(self, block: ResidualBlock, abn: type[nn.Module] | None) -> None:
        super().__init__()
        self.block, self.inplace = block, abn is not None
        if abn is None:
            return
        for name, bn in [(name, child) for name, child in block.named_modules() if isinstance(child, nn.BatchNorm2d)]:
            outer = name == f"bn{block.depth}" or name.startswith("downsample")
            activation = {"activation": "identity"} if outer else {"activation": "leaky_relu", "activation_param": LEAK}
            layer = abn(bn.num_features, eps=bn.eps, momentum=bn.momentum, **activation)
            layer.load_state_dict(bn.state_dict(), strict=False)
            block.set_submodule(name, layer.to(bn.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for i in range(1, self.block.depth + 1):
            z = getattr(self.block, f"bn{i}")(getattr(self.block, f"conv{i}")(z))
            if not self.inplace and i < self.block.depth:
                z = F.leaky_relu(z, LEAK)
        skip = x if self.block.downsample is None else self.block.downsample(x)
        return F.leaky_relu(z + skip, LEAK)


@register("inplace_abn", devices=("cuda",), modes=("train", "forward"))
def inplace_abn(setup: Setup) -> Peer:
    """The block of in-place activated BNs in channels_last, which keeps one tensor less for every BN and ReLU.

    It computes another function, with a leaky ReLU; its results are compared with plain PyTorch's for that function here.
    """
    package = needed("inplace_abn")
    if setup.case.is_network:
        raise CannotRunError("it is timed for single blocks only")
    ours = block_peer(setup, _InPlace(setup.module("channels_last"), package.InPlaceABN), "channels_last")
    plain = block_peer(setup, _InPlace(setup.module("channels_last"), None), "channels_last")
    unit, got, wanted = unit_roundoff(setup.dtype, setup.device), quantities(ours, 0, {}), quantities(plain, 0, {})
    wrong = [n for n in ("out", "d x") if n in wanted and not relative_error(got[n], wanted[n]) <= tolerance(n, unit)]
    if wrong:
        raise CannotRunError(f"differs from plain PyTorch with a leaky ReLU in {', '.join(wrong)}")
    ours.comparable, ours.backend = False, f"inplace_abn {getattr(package, '__version__', '')}".strip()
    return ours
