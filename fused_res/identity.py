"""Residual blocks that start as their shortcuts: the last thing that a main branch is multiplied by becomes 0."""

from typing import TypeVar

from torch import Tensor, nn

from fused_res.anatomy import Anatomy, recognise
from fused_res.chains import Residual
from fused_res.fusible import Fusible
from fused_res.reading import child
from fused_res.spec import FORMS

M = TypeVar("M", bound=nn.Module)


def last_tensors(block: nn.Module, anatomy: Anatomy) -> list[Tensor]:
    """What has to be 0 for a main branch to be 0: the last BN's gamma, or of a pre-activation block the last convolution.

    Raises:
        RuntimeError: the last BN has no gamma.
    """
    name, conv, bn = anatomy.units[-1][1], *(child(block, part) for part in anatomy.units[-1])
    if FORMS[anatomy.form].preactivated:
        return list(conv.parameters(recurse=False))
    if getattr(bn, "weight", None) is None:
        raise RuntimeError(f"zero_init_last: {name} has no weight to set to 0")
    return [bn.weight]


def _anatomy(module: nn.Module) -> Anatomy | None:
    """That of a residual block, fused or not."""
    if isinstance(module, Fusible):
        anatomy = module._anatomy
        kept = anatomy is not None and (FORMS[anatomy.form].skip or isinstance(module, Residual))
    else:
        anatomy, reason = recognise(module)
        kept = anatomy is not None and reason is None and FORMS[anatomy.form].skip
    return anatomy if kept else None


def zero_init_residual(model: M) -> M:
    """Set what every residual block's main branch ends with to 0, so that each starts as its shortcut, or the ReLU of it
    (https://arxiv.org/abs/1706.02677): the last BN's gamma, or of a pre-activation block the last convolution.

    Of our blocks and `Residual`s, of blocks that `fuse` has fused, and of those that it would know by their classes: what
    `zero_init_residual=True` does in torchvision's `ResNet` for its own classes alone, and `zero_init_last=True` in timm's.

    Args:
        model: any module, a block itself included. A residual scale is left as it is.

    Returns:
        The model itself.

    Raises:
        TypeError: model is not an `nn.Module`.
        ValueError: there is no residual block in it.
        RuntimeError: a block's last BN has no gamma. Then nothing has changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    blocks = [(module, anatomy) for module in model.modules() if (anatomy := _anatomy(module)) is not None]
    if not blocks:
        raise ValueError("model: no residual block that is known was found")
    tensors = [tensor for block, anatomy in blocks for tensor in last_tensors(block, anatomy)]
    for tensor in tensors:
        nn.init.zeros_(tensor)
    return model
