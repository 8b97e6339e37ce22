"""The peer that runs cuDNN's own fused graphs through its Python front end (extra `peers`, package nvidia-cudnn-frontend).

Evaluation: one graph for each convolution, with scale, shift, shortcut and ReLU behind it. Forward in training: the preceding
BN and ReLU in front of the convolution and the statistics behind it, then one graph for the block's end. The front end has no
node for the fused backward (it lacks BN's finalisation and weight gradients), so there is no training step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_res.benchmarks.foreign import needed
from fused_res.benchmarks.peers import CannotRunError, Peer, Setup, register


def data_types() -> dict[torch.dtype, object]:
    """cuDNN's names of PyTorch's dtypes. uint8 is a byte an element; cuDNN's boolean, which `torch.bool` maps to, is a bit."""
    cudnn = needed("cudnn", "nvidia-cudnn-frontend")
    kinds = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.uint8: "UINT8"}
    return {dtype: getattr(cudnn.data_type, name) for dtype, name in kinds.items()}


class Graph:
    """A built cuDNN graph. `wire(graph, nodes)` makes its nodes from those of the inputs, and returns the outputs by name.

    `inputs` and `outputs` are tensors of the shapes, layouts and dtypes to be, the first input's dtype that of the data; the
    outputs are written to by every call. On the device `meta` they are patterns of what `run` takes.

    Of the plans that cuDNN proposes, those it then cannot compile are passed over (`failures` says which and why), and up to `most`
    are built, of different engines as far as there are any; `plans` has their indices and names, cuDNN's first choice first.

    Raises:
        CannotRunError: cuDNN proposes no plan for the graph, or can build none of them.
    """

    def __init__(
        self, handle: object, inputs: dict[str, Tensor], outputs: dict[str, Tensor], wire: Callable, most: int = 1
    ) -> None:
        cudnn, types = needed("cudnn", "nvidia-cudnn-frontend"), data_types()
        single, data = types[torch.float32], types[next(iter(inputs.values())).dtype]
        graph = cudnn.pygraph(io_data_type=data, intermediate_data_type=single, compute_data_type=single, handle=handle)
        self.nodes = {
            name: graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=types[t.dtype])
            for name, t in inputs.items()
        }
        results = wire(graph, self.nodes)
        for name, node in results.items():
            like = outputs[name]
            node.set_output(True).set_data_type(types[like.dtype]).set_dim(list(like.shape)).set_stride(list(like.stride()))
        self.nodes |= results
        self.graph, self.handle, self.outputs, self.workspace = graph, handle, outputs, None
        self.plans: dict[int, str] = {}
        self.failures: dict[str, str] = {}
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            raise CannotRunError(f"cuDNN has no plan: {_brief(error)}") from error
        for index, name in self._proposed():
            if len(self.plans) == most:
                break
            try:
                graph.build_plan_at_index(index)
                self.plans[index] = name
            except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
                self.failures[name] = _brief(error)
        if not self.plans:
            raise CannotRunError(f"cuDNN proposes plans and can build none: {self.failures}")

    def _proposed(self) -> list[tuple[int, str]]:
        """Index and name of the plans: of each engine the first, in cuDNN's order, then the others."""
        names = [self.graph.get_plan_name_at_index(i) for i in range(self.graph.get_execution_plan_count())]
        engines = [name.split("_")[0] for name in names]
        return sorted(enumerate(names), key=lambda plan: (engines.index(engines[plan[0]]) != plan[0], plan[0]))

    def workspace_size(self, plan: int) -> int:
        """Bytes that a plan of `plans` needs."""
        return self.graph.get_workspace_size_plan_at_index(plan)

    def run(self, tensors: dict[str, Tensor], plan: int) -> None:
        """Run one of `plans` on all inputs and outputs, by name."""
        if self.workspace is None:
            size = max(1, *map(self.workspace_size, self.plans))
            self.workspace = torch.empty(size, device=next(iter(tensors.values())).device, dtype=torch.uint8)
        named = {self.nodes[name]: tensor for name, tensor in tensors.items()}
        self.graph.execute_plan_at_index(named, self.workspace, plan, handle=self.handle)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the first plan, from these inputs to `outputs`."""
        self.run(inputs | self.outputs, next(iter(self.plans)))
        return self.outputs


def _brief(error: Exception) -> str:
    """The innermost reason that cuDNN gives, without the places in its sources."""
    return " ".join(str(error).split(" at: ")[0].split())[:300]


def _vector(values: Tensor) -> Tensor:
    """Per-channel values as cuDNN takes them, [1, C, 1, 1]."""
    return values.detach().reshape(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)


def _geometry(conv: nn.Conv2d) -> dict:
    return {"padding": list(conv.padding), "stride": list(conv.stride), "dilation": list(conv.dilation)}


def _affine(graph: object, nodes: dict, x: object, scale: str, shift: str) -> object:
    return graph.bias(input=graph.scale(input=x, scale=nodes[scale]), bias=nodes[shift])


def _output_of(conv: nn.Conv2d, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.empty_like(conv(x), memory_format=torch.channels_last)


def _layers(block: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    return [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, block.depth + 1)]


class _Evaluation:
    """`relu(s (W z) + t + shortcut)` in one graph a convolution; s and t come from the running statistics, once."""

    def __init__(self, block: nn.Module, x: Tensor, handle: object) -> None:
        self.steps, z = [], x
        self.projection = None if block.downsample is None else self._unit(*block.downsample, x, handle, False, None)
        layers = _layers(block)
        for i, (conv, bn) in enumerate(layers):
            last = i == len(layers) - 1
            skip = (x if self.projection is None else self.projection[0].outputs["out"]) if last else None
            self.steps.append(self._unit(conv, bn, z, handle, True, skip))
            z = self.steps[-1][0].outputs["out"]

    @staticmethod
    def _unit(conv: nn.Conv2d, bn: nn.BatchNorm2d, z: Tensor, handle: object, relu: bool, skip: Tensor | None) -> tuple:
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        fixed = {"w": conv.weight.detach(), "s": _vector(scale), "t": _vector(bn.bias - bn.running_mean * scale)}

        def wire(graph: object, nodes: dict) -> dict:
            out = _affine(graph, nodes, graph.conv_fprop(image=nodes["z"], weight=nodes["w"], **_geometry(conv)), "s", "t")
            out = out if skip is None else graph.add(a=out, b=nodes["skip"])
            return {"out": graph.relu(input=out) if relu else out}

        inputs = {"z": z} | fixed | ({} if skip is None else {"skip": skip})
        return Graph(handle, inputs, {"out": _output_of(conv, z)}, wire), fixed

    def __call__(self, x: Tensor) -> Tensor:
        skip = x
        if self.projection is not None:
            graph, fixed = self.projection
            skip = graph(z=x, **fixed)["out"]
        z = x
        for n, (graph, fixed) in enumerate(self.steps):
            more = {"skip": skip} if n == len(self.steps) - 1 else {}
            z = graph(z=z, **fixed, **more)["out"]
        return z


class _Unit:
    """A convolution with its statistics behind it and, where `prologue`, the preceding BN and ReLU in front of it."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, z: Tensor, handle: object, prologue: bool) -> None:
        self.conv, self.bn, self.prologue = conv, bn, prologue
        sums = [torch.empty(1, conv.out_channels, 1, 1, device=z.device) for _ in range(2)]
        outputs = {"y": _output_of(conv, z), "sum": sums[0], "squares": sums[1]}
        inputs = {"z": z, "w": conv.weight.detach()}
        if prologue:
            inputs |= dict.fromkeys(("s", "t"), _vector(z[0, :, 0, 0].float()))
        data, add = data_types()[z.dtype], needed("cudnn").reduction_mode.ADD

        # cuDNN's own operation for the statistics, genstats, takes fp16 alone.
        def wire(graph: object, nodes: dict) -> dict:
            image = nodes["z"]
            if prologue:
                image = graph.relu(graph.add(graph.mul(image, nodes["s"]), nodes["t"])).set_data_type(data)
            y = graph.conv_fprop(image=image, weight=nodes["w"], **_geometry(conv)).set_data_type(data)
            return {"y": y, "sum": graph.reduction(y, mode=add), "squares": graph.reduction(graph.mul(y, y), mode=add)}

        self.graph = Graph(handle, inputs, outputs, wire)

    def __call__(self, z: Tensor, before: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """y, and scale and shift of the BN behind it, whose running statistics are updated."""
        vectors = dict(zip(("s", "t"), before, strict=True)) if self.prologue else {}
        found = self.graph(z=z, w=self.conv.weight.detach(), **vectors)
        y, bn = found["y"], self.bn
        count = y.numel() // y.shape[1]
        mean = found["sum"].flatten() / count
        var = (found["squares"].flatten() / count - mean.square()).clamp_min(0)
        bn.num_batches_tracked.add_(1)
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(var * (count / (count - 1)), bn.momentum)
        scale = bn.weight.detach() * torch.rsqrt(var + bn.eps)
        return y, (_vector(scale), _vector(bn.bias.detach() - mean * scale))


class _TrainingForward:
    def __init__(self, block: nn.Module, x: Tensor, handle: object) -> None:
        self.units, z = [], x
        for i, (conv, bn) in enumerate(_layers(block)):
            self.units.append(_Unit(conv, bn, z, handle, i > 0))
            z = self.units[-1].graph.outputs["y"]
        self.projection = None if block.downsample is None else _Unit(*block.downsample, x, handle, False)
        vector = _vector(torch.zeros(z.shape[1], device=z.device))
        inputs = {"y": z, "skip": x if self.projection is None else self.projection.graph.outputs["y"]}
        inputs |= dict.fromkeys(("s", "t") if self.projection is None else ("s", "t", "s2", "t2"), vector)

        def wire(graph: object, nodes: dict) -> dict:
            skip = nodes["skip"] if self.projection is None else _affine(graph, nodes, nodes["skip"], "s2", "t2")
            return {"out": graph.relu(input=graph.add(a=_affine(graph, nodes, nodes["y"], "s", "t"), b=skip))}

        self.tail = Graph(handle, inputs, {"out": torch.empty_like(z)}, wire)

    def __call__(self, x: Tensor) -> Tensor:
        z, vectors = x, None
        for unit in self.units:
            z, vectors = unit(z, vectors)
        named, skip = dict(zip(("s", "t"), vectors, strict=True)), x
        if self.projection is not None:
            skip, vectors = self.projection(x)
            named |= dict(zip(("s2", "t2"), vectors, strict=True))
        return self.tail(y=z, skip=skip, **named)["out"]


@register("cuDNN graphs", devices=("cuda",), modes=("forward", "eval"))
def cudnn_graphs(setup: Setup) -> Peer:
    """The block in cuDNN's fused graphs, channels_last, statistics from its convolutions' epilogues."""
    cudnn = needed("cudnn", "nvidia-cudnn-frontend")
    if setup.mode == "train":
        raise CannotRunError("cuDNN's Python front end has no nodes for the fused backward")
    if setup.case.is_network:
        raise CannotRunError("it is timed for single blocks only")
    module, handle = setup.module("channels_last"), cudnn.create_handle()
    inputs = [x.detach() for x, _ in setup.inputs("channels_last")]
    block = (_Evaluation if setup.mode == "eval" else _TrainingForward)(module, inputs[0], handle)

    def step(i: int) -> dict[str, Tensor]:
        if setup.device.type == "cuda":
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        with torch.no_grad():
            return {"out": block(inputs[i])}

    return Peer(step, "channels_last", module, backend=f"cudnn-frontend {cudnn.__version__}")
