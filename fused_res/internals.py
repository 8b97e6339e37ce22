"""All that the package uses of torch beyond what torch documents: a new torch is checked against this one file.

`tests/test_imports.py` sees to it that no other file names such a thing. `kernels/` has none, and what `fused_res/originals.py`
looks after are methods of torch's that anybody may replace.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import guards as _guards
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context inside which operators are called as under their own autograd formula: no graph is recorded."""
disable_modes = _disable_current_modes
"""A context inside which no `TorchDispatchMode` sees what is called."""
tree_leaves = _pytree.tree_leaves
"""What lies in nested containers, as torch's own transforms look into them."""
dict_version = _guards.dict_version
"""A number that is another one after every change of a dictionary."""
_BATCHED = torch._C._dispatch_key_parse("Batched")
_precision = torch._C._get_fp32_precision_getter
_function_mode, _dispatch_modes = torch._C._is_torch_function_mode_enabled, torch._C._len_torch_dispatch_stack
_transformed, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_alive = torch._C._functorch.unwrap_if_dead
is_profiled = torch._C._autograd._profiler_enabled
"""Whether one of torch's profilers runs. torch.compile cannot follow the question."""


def constant_result(function: Callable[..., T]) -> Callable[..., T]:
    """Have torch.compile ask this function while it traces, and take the answer for a constant.

    `torch.compiler.assume_constant_result` does the same, and imports all of torch._dynamo, and Triton with it.
    """
    function._dynamo_marked_constant = True
    return function


@constant_result
def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which torch 2.10 takes for true while torch.compile traces, too."""
    return torch.compiler.is_exporting()


def is_traced() -> bool:
    """Whether torch.jit.trace records what is called. torch.compile cannot follow the question."""
    return _tracing() is not None


def has_modes() -> bool:
    """Whether a `TorchFunctionMode` or a `TorchDispatchMode` is active. torch.compile cannot follow the question."""
    return _function_mode() or has_dispatch_modes()


def has_dispatch_modes() -> bool:
    """Whether a `TorchDispatchMode` is active."""
    return _dispatch_modes() > 0


def modes() -> Iterator[object]:
    """Those that are active."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    yield from _get_current_function_mode_stack()
    yield from _get_current_dispatch_mode_stack()


def is_dual() -> bool:
    """Whether forward-mode AD is active."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a `torch.func` transform is active."""
    return _transformed()


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor is inside a vmap: `torch.autograd.grad(is_grads_batched=True)` has one of its own."""
    return _transformed() or torch._C._dispatch_keys(tensor).has(_BATCHED)


def has_global_hooks() -> bool:
    """Whether a hook for all modules is registered."""
    return bool(
        nn_module._global_forward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_backward_pre_hooks
        or nn_module._global_backward_hooks
    )


def pack_hook() -> Callable | None:
    """What autograd hands the tensors to that it saves, or None, as usual, where it keeps them itself."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


class Function(torch.autograd.function._SingleLevelFunction):
    """`torch.autograd.Function` where no transform is active, without the questions that its `apply` asks at each call."""

    @classmethod
    def call(cls, others: Sequence, tensors: Sequence[Tensor | None]) -> object:
        """`apply` to both; of tensors that outlived a transform to what is inside, as `torch.autograd.Function` does."""
        return cls.apply(*others, *[None if tensor is None else _alive(tensor) for tensor in tensors])


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Asks of as many tensors whether they look like these.

    That is: whether they are of the same classes, dtypes, devices, shapes and strides, require gradients where these do, and
    whether torch would do the same as now around an operator that is called with them (autograd, autocast, transforms).
    """
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    return _guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def float32_precisions(device_type: str) -> tuple[str, str]:
    """How a device's library multiplies float32 in convolutions and in matrix products: "ieee", "tf32", "bf16" or "none"."""
    library = "cuda" if device_type == "cuda" else "mkldnn"
    return _precision(library, "conv"), _precision(library, "matmul")


def has_mkldnn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of bfloat16 or float16 for this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def fused_convolution() -> tuple[Callable, Callable, Callable, Callable] | None:
    """oneDNN's convolution as torch.compile calls it; None where this build or the user's switch has none.

    What orders the weight; then the convolution with a bias, one that adds an image to that, and one that adds onto the image.
    """
    mkldnn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and hasattr(mkldnn, "_convolution_pointwise")):
        return None
    pointwise = mkldnn._convolution_pointwise
    return mkldnn._reorder_convolution_weight.default, pointwise.default, pointwise.binary, mkldnn._convolution_pointwise_.binary


def is_freezing() -> bool:
    """Whether Inductor takes weights for constants where gradients are off (`torch._inductor.config.freezing`)."""
    config = sys.modules.get("torch._inductor.config")
    return config is not None and config.freezing


def freezing() -> AbstractContextManager:
    """Inside, what torch.compile compiles where gradients are off has the weights as constants: BNs folded in, and packed ahead.

    As an option of `torch.compile` the switch comes after the trace, which has made inputs of the weights by then.
    """
    from torch._inductor import config

    return config.patch(freezing=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP, either one, gathers the tensor's values, for which it writes past the tensor's version."""
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor._base, "_is_flat_param", False):
        return True
    states = sys.modules.get("torch.distributed._composable_state")
    for state in [] if states is None else [found() for found in states._module_state_mapping.values()]:
        # Older torch has one group to a state.
        for group in getattr(state, "_fsdp_param_groups", None) or (getattr(state, "_fsdp_param_group", None),):
            if any(getattr(held, "_unsharded_param", None) is tensor for held in getattr(group, "fsdp_params", ())):
                return True
    return False


def any_expired(storages: Sequence[object]) -> bool:
    """Whether the memory is gone of any of these `torch.multiprocessing.reductions.StorageWeakRef`."""
    expired = torch.UntypedStorage._expired
    return any(map(expired, [storage.cdata for storage in storages]))


def gpu_sleep(cycles: int) -> None:
    """Have the current stream wait so many of the GPU's cycles."""
    torch.cuda._sleep(cycles)


def storage(tensor: Tensor) -> int:
    """A number that tensors of one storage have in common."""
    return tensor.untyped_storage()._cdata
