"""PyTorch's harness for modules, `ModuleInfo` and `@modules`, over our blocks and fused ones of others.

What torch's own `test/test_modules.py` asks of every `nn.Module`: forward, first and second derivatives, memory formats, inputs and
gradients that are not contiguous, pickles, repr, moves, and parameters that are swapped.
"""

# ruff: noqa: PT009, the harness compares tensors with methods of unittest's
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fused_res
from blocks import Eager, projection
from users import Functional, Scaled

pytest.importorskip("expecttest")
with pytest.MonkeyPatch.context() as patch:
    # It would forbid every later test of this process to set torch's flags.
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, ModuleInput, modules
    from torch.testing._internal.common_utils import TestCase, freeze_rng_state


class FusedFunctional(Functional):
    def __init__(self, *args):
        super().__init__(*args)
        fused_res.fuse(self, strict=True)


class FusedScaled(Scaled):
    def __init__(self, *args):
        super().__init__(*args)
        fused_res.fuse(self, level="moment", strict=True)


def reference(module, parameters, x):
    module = copy.deepcopy(module)
    return (Eager(module) if isinstance(module, fused_res.BasicBlock | fused_res.Bottleneck) else fused_res.unfuse(module))(x)


def inputs_of(*constructors):
    def inputs(module_info, device, dtype, requires_grad, training, **kwargs):
        found = []
        for args, options in constructors:
            x = torch.randn(3, args[0], 5, 4, device=device, dtype=dtype).requires_grad_(requires_grad)
            found.append(ModuleInput(FunctionInput(*args, **options), FunctionInput(x), reference_fn=reference))
        return found

    return inputs


def info(kind, *constructors):
    options = {"dtypes": (torch.float64,), "train_and_eval_differ": True, "module_memformat_affects_out": True}
    return ModuleInfo(kind, module_inputs_func=inputs_of(*constructors), **options)


BLOCKS = [
    info(fused_res.BasicBlock, ((4, 4), {}), ((3, 4, 2, projection(3, 4, 2)), {"residual_scale": 0.5})),
    info(fused_res.Bottleneck, ((8, 2), {}), ((3, 2, 2, projection(3, 8, 2)), {})),
    info(FusedFunctional, ((4, 4), {}), ((3, 4, 2), {})),
    info(FusedScaled, ((4, 4), {}), ((3, 4, 2), {})),
]


class TestBlocks(TestCase):
    precision = 1e-9
    rel_tol = 1e-9

    def cases(self, module_info, device, dtype, training, requires_grad=False):
        with freeze_rng_state():
            torch.manual_seed(0)
            options = {"device": device, "dtype": dtype, "requires_grad": requires_grad, "training": training}
            for found in module_info.module_inputs_func(module_info, **options):
                made = found.constructor_input
                module = module_info.module_cls(*copy.deepcopy(made.args), **made.kwargs).to(device, dtype).train(training)
                for m in module.modules():
                    if isinstance(m, nn.BatchNorm2d):  # with a bias of 0, channels that are dead lie on the ReLU's kink
                        nn.init.uniform_(m.bias, 0.1, 0.5)
                yield module, found.forward_input.args[0], found.reference_fn

    @modules(BLOCKS)
    def test_forward_and_repr(self, device, dtype, module_info, training):
        for module, x, expected in self.cases(module_info, device, dtype, training):
            self.assertEqual(expected(module, x), module(x))
            self.assertIn(module_info.name.rpartition(".")[2], repr(module))

    @modules(BLOCKS)
    def test_first_and_second_derivatives(self, device, dtype, module_info, training):
        for module, x, _ in self.cases(module_info, device, dtype, training, requires_grad=True):
            names, parameters = zip(*module.named_parameters(), strict=True)

            def call(x, *parameters, module=module, names=names):
                return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

            gradcheck(call, (x, *parameters), fast_mode=True)
            gradgradcheck(call, (x, *parameters), fast_mode=True)

    @modules(BLOCKS)
    def test_memory_formats(self, device, dtype, module_info, training):
        for module, x, expected in self.cases(module_info, device, dtype, training):
            wanted = expected(module, x)
            for of_x in (torch.contiguous_format, torch.channels_last):
                for of_module in (torch.contiguous_format, torch.channels_last):
                    twin = copy.deepcopy(module).to(memory_format=of_module)
                    out = twin(x.contiguous(memory_format=of_x))
                    self.assertEqual(wanted, out)
                    last = torch.channels_last in (of_x, of_module)
                    self.assertTrue(out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))

    @modules(BLOCKS)
    def test_inputs_and_gradients_that_are_not_contiguous(self, device, dtype, module_info, training):
        for module, x, _ in self.cases(module_info, device, dtype, training):
            found = []
            for spread in (False, True):
                twin = copy.deepcopy(module)
                given = x.repeat_interleave(2, dim=-1)[..., ::2] if spread else x.clone()
                given = given.detach().requires_grad_()
                out = twin(given)
                dout = torch.linspace(-1, 1, out.numel(), device=device, dtype=dtype).view(out.shape)
                out.backward(dout.repeat_interleave(2, dim=-1)[..., ::2] if spread else dout)
                found.append([out, given.grad, *(p.grad for p in twin.parameters())])
            self.assertEqual(found[0], found[1])

    @modules(BLOCKS)
    def test_pickles(self, device, dtype, module_info, training):
        for module, x, _ in self.cases(module_info, device, dtype, training):
            twin = pickle.loads(pickle.dumps(module))
            self.assertEqual(module(x), twin(x))
            self.assertEqual(module.state_dict(), twin.state_dict())

    @modules(BLOCKS)
    def test_moves_and_swapped_parameters(self, device, dtype, module_info, training):
        for module, x, expected in self.cases(module_info, device, dtype, training):
            module.to("meta").to_empty(device=device)
            for tensor in (*module.parameters(), *module.buffers()):
                nn.init.constant_(tensor, 0.25) if tensor.is_floating_point() else tensor.zero_()
            parameters = [id(p) for p in module.parameters()]
            module.to(torch.float32).to(dtype)
            self.assertEqual([id(p) for p in module.parameters()], parameters)
            self.assertEqual(expected(module, x), module(x))
            for name, parameter in list(module.named_parameters()):
                owner, _, last = name.rpartition(".")
                setattr(module.get_submodule(owner), last, nn.Parameter(parameter.detach() * 2))
            self.assertEqual(expected(module, x), module(x))


instantiate_device_type_tests(TestBlocks, globals(), only_for="cpu")
