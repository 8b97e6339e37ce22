"""Stands for the package `cudnn`, cuDNN's front end: the same calls, executed with torch on the CPU in the compute type, float32.

A graph has as many plans as PLANS, which all do the same. What is to go wrong is read from the environment, for the processes that
find this file under the name of the package: CUDNN_STAND_IN is `abort NUMBER`, `hang NUMBER` or `refuse NUMBER` (planning a graph
with a tensor of so many channels), `accumulate` (sums are added to what is there) or `drop NaN` (ReLU makes 0 of it).
"""

import os
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

__version__ = "0"
PLANS = ("eng1_k1", "eng1_k2", "eng2")
data_type = SimpleNamespace(FLOAT=torch.float32, HALF=torch.float16, BFLOAT16=torch.bfloat16, UINT8=torch.uint8)
heur_mode = SimpleNamespace(A=0, FALLBACK=1)
reduction_mode = SimpleNamespace(ADD="add")
create_handle = object


class cudnnGraphNotSupportedError(Exception):  # noqa: N801 - the package's name
    pass


def backend_version():
    return 0


def set_stream(handle, stream):
    pass


def _fault(name):
    found, _, number = os.environ.get("CUDNN_STAND_IN", "").partition(" ")
    return found == name and (number or True)


class Node:
    """A tensor of the graph: how it is computed from others, and rounded to its dtype."""

    def __init__(self, compute, *inputs):
        self.compute, self.inputs, self.output, self.dtype, self.dim, self.stride = compute, inputs, False, None, None, None

    def set_output(self, output):
        self.output = output
        return self

    def set_data_type(self, dtype):
        self.dtype = dtype
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def get_dim(self):
        return self.dim

    def get_stride(self):
        return self.stride

    def value(self, known):
        if self not in known:
            found = self.compute(self, *(node.value(known) for node in self.inputs))
            known[self] = found if self.dtype is None else found.to(self.dtype)
        return known[self]


def _relu(node, x):
    return torch.where(x > 0, x, 0) if _fault("drop") else torch.relu(x)


def _sum(node, x):
    return x.float().sum([i for i, n in enumerate(node.dim) if n < x.shape[i]], keepdim=True)


class pygraph:  # noqa: N801 - the package's name
    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert compute_data_type == torch.float32
        self.tensors, self.built = [], set()

    def tensor(self, name, dim, stride, data_type):
        self.tensors.append(Node(None).set_dim(dim).set_stride(stride))
        return self.tensors[-1]

    def conv_fprop(self, image, weight, padding, stride, dilation):
        def conv(node, x, w):
            return F.conv2d(x.float(), w.float(), None, stride, padding, dilation, x.shape[1] // w.shape[1])

        return Node(conv, image, weight)

    def conv_dgrad(self, loss, filter, padding, stride, dilation):
        assert stride == dilation == [1, 1]
        return Node(lambda node, dy, w: F.conv_transpose2d(dy.float(), w.float(), None, stride, padding), loss, filter)

    def matmul(self, a, b):
        return Node(lambda node, x, y: x.float() @ y.float(), a, b)

    def scale(self, input, scale):
        return self.mul(input, scale)

    def bias(self, input, bias):
        return self.add(input, bias)

    def add(self, a, b):
        return Node(lambda node, x, y: x.float() + y.float(), a, b)

    def sub(self, a, b):
        return Node(lambda node, x, y: x.float() - y.float(), a, b)

    def mul(self, a, b):
        return Node(lambda node, x, y: x.float() * y.float(), a, b)

    def relu(self, input):
        return Node(_relu, input)

    def relu_backward(self, loss, input):
        return Node(lambda node, dx, x: dx.masked_fill(x <= 0, 0), loss, input)

    def cmp_gt(self, a, b):
        return Node(lambda node, x, y: x > y, a, b)

    def binary_select(self, a, b, mask):
        return Node(lambda node, x, y, m: torch.where(m.bool(), x, y.to(x.dtype)), a, b, mask)

    def reduction(self, input, mode):
        assert mode == "add"
        return Node(_sum, input)

    def validate(self):
        pass

    build_operation_graph = validate

    def create_execution_plans(self, modes):
        assert modes

        def planned(fault):
            number = _fault(fault)
            return number and any(tensor.dim[1] == int(number) for tensor in self.tensors)

        if planned("abort"):
            os.abort()
        if planned("hang"):
            time.sleep(600)
        if planned("refuse"):
            raise cudnnGraphNotSupportedError("no engine for this at: somewhere in the sources")

    def get_execution_plan_count(self):
        return len(PLANS)

    def get_plan_name_at_index(self, index):
        return PLANS[index]

    def build_plan_at_index(self, index):
        if _fault("uncompiled") and index == 0:
            raise RuntimeError("runtime kernel compilation failure at: somewhere in the sources")
        self.built.add(index)

    def get_workspace_size_plan_at_index(self, index):
        return 0

    def execute_plan_at_index(self, tensors, workspace, index, handle):
        assert index in self.built
        known = {node: tensor for node, tensor in tensors.items() if not node.output}
        for node, tensor in tensors.items():
            if node.output:
                value = node.value(known)
                assert list(tensor.shape) == node.dim == list(value.shape)
                assert list(tensor.stride()) == node.stride
                tensor.copy_(tensor + value if _fault("accumulate") and node.compute is _sum else value)
