"""What the child modules of a block hold, read anew at every call: they may have been replaced, or edited."""

from typing import TypeVar

from torch import nn

from fused_res import known
from fused_res.originals import BatchNorm2d
from fused_res.spec import ConvBN, pair

T = TypeVar("T")


def lookup(registered: dict[str, T], module: nn.Module, name: str) -> T:
    """`getattr(module, name)`, at once where it is registered."""
    try:
        return registered[name]
    except KeyError:
        return getattr(module, name)


def child(block: nn.Module, name: str) -> nn.Module | None:
    """A child of a block by its name, or by a path such as "layer.0.conv"; None where there is none."""
    found = block._modules.get(name)
    if found is not None or name in block._modules:
        return found
    for part in name.split("."):
        block = getattr(block, part, None)
    return block


def same_padding(conv: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """padding, dilation and kernel under padding='same', for the weight that is there now."""
    dilation, kernel = pair(conv.dilation, "dilation"), tuple(conv.weight.shape[2:])
    return tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)), dilation, kernel


def _steps(conv: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """stride, padding and dilation, in whatever form `torch.nn.functional.conv2d` takes them."""
    stride, padding, dilation = pair(conv.stride, "stride"), conv.padding, pair(conv.dilation, "dilation")
    if padding == "same":
        if stride != (1, 1):
            raise RuntimeError("padding='same' is not supported for strided convolutions")
        return stride, same_padding(conv)[0], dilation
    return stride, (0, 0) if padding == "valid" else pair(padding, "padding"), dilation


def convolution_of(conv: nn.Conv2d) -> ConvBN:
    """Tensors and numbers of a convolution that has no BN."""
    return ConvBN(conv.weight, conv.bias, None, None, None, None, None, *_steps(conv), conv.groups, False)


def unit_of(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvBN:
    """Tensors and numbers of a convolution and its BN, with the BN's own `training` flag, as `nn.BatchNorm2d.forward` reads it."""
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    usual = type(stride) is type(padding) is type(dilation) is tuple and len(stride) == len(padding) == len(dilation) == 2
    if not usual:
        stride, padding, dilation = _steps(conv)
    weights, parameters, buffers = conv._parameters, bn._parameters, bn._buffers
    if type(bn) is not BatchNorm2d and known.FROZEN in (known.about(type(bn), "norms") or ()):
        weight, bias = lookup(weights, conv, "weight"), lookup(weights, conv, "bias")
        statistics = [lookup(buffers, bn, name) for name in ("weight", "bias", "running_mean", "running_var")]
        return ConvBN(weight, bias, *statistics, None, stride, padding, dilation, conv.groups, False, None, bn.eps)
    try:
        weight, bias, gamma, beta = weights["weight"], weights["bias"], parameters["weight"], parameters["bias"]
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    except KeyError:  # tensors that are not registered
        weight, bias, gamma, beta = conv.weight, conv.bias, bn.weight, bn.bias
        running_mean, running_var = bn.running_mean, bn.running_var
    training, counted = bn.training, None
    live = training or running_mean is None
    if training and bn.track_running_stats:
        counted = lookup(buffers, bn, "num_batches_tracked")
    elif training:
        running_mean = running_var = None
    # By position, in the order of the fields: by name takes twice as long.
    numbers = stride, padding, dilation, conv.groups, live, bn.momentum, bn.eps
    return ConvBN(weight, bias, gamma, beta, running_mean, running_var, counted, *numbers)
