"""Checks of a block's arguments, before anything is computed or written: eager's errors, with the name of the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_res.spec import FORMS, AvgPool, Block, ConvBN

_FIELDS = ConvBN._fields[:6]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes this operand: autocast's where it is on; it leaves float64 alone, and meta tensors."""
    if tensor.is_meta:
        return tensor.dtype
    if torch.is_autocast_enabled(tensor.device.type) and tensor.dtype.is_floating_point and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def check_arguments(
    x: Tensor, block: Block, skip: Tensor | None, residual_scale: Tensor | None, names: Sequence[str] | None
) -> list[str]:
    """Types, ranks, dtypes, devices, and the shapes of the parameters. Returns the units' names.

    Raises TypeError, ValueError or RuntimeError as `fused_res.functional.residual_block` documents.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if not block.main or not all(isinstance(unit, ConvBN) for unit in block.main):
        raise TypeError("main: expected a non-empty sequence of ConvBN")
    if block.projection is not None and not isinstance(block.projection, ConvBN):
        raise TypeError(f"shortcut: expected a ConvBN, a Tensor or None, got {type(block.projection).__name__}")
    if block.pool is not None and (block.projection is None or not isinstance(block.pool, AvgPool)):
        raise TypeError("pool: expected an AvgPool, in front of a ConvBN shortcut")
    form = FORMS[block.form]
    if not form.skip:
        for name, value in (("shortcut", block.projection), ("shortcut", skip), ("residual_scale", residual_scale)):
            if value is not None:
                raise ValueError(f"{name}: expected None for the form {block.form!r}, which has no shortcut")
    if names is None:
        names = [f"main[{i}]" for i in range(len(block.main))] + ["shortcut"]
    if not x.dtype.is_floating_point:
        raise RuntimeError(f"x: expected a floating-point dtype, got {x.dtype}")
    channels = x.shape[1]
    for name, unit in zip(names, block.main, strict=False):
        channels = _check_unit(name, unit, x, channels, form.preactivated)
    if block.projection is not None:
        out = _check_unit(names[len(block.main)], block.projection, x, x.shape[1], bare=form.preactivated)
        if out != channels:
            raise RuntimeError(f"{names[-1]}: expected {channels} output channels, as the main branch has, got {out}")
    if skip is not None:
        _check_device("shortcut", skip, x)
        if not skip.dtype.is_floating_point:
            raise RuntimeError(f"shortcut: expected a floating-point dtype, got {skip.dtype}")
    if residual_scale is not None:
        if not isinstance(residual_scale, Tensor):
            raise TypeError(f"residual_scale: expected a Tensor, got {type(residual_scale).__name__}")
        if residual_scale.dim() != 0 or not residual_scale.dtype.is_floating_point:
            got = f"{residual_scale.dtype} of shape {tuple(residual_scale.shape)}"
            raise RuntimeError(f"residual_scale: expected a floating-point scalar, got {got}")
        _check_device("residual_scale", residual_scale, x)
    return list(names)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"{name}: expected all tensors to be on the device of x, {x.device}, got {tensor.device}")


def _check_unit(name: str, unit: ConvBN, x: Tensor, channels: int, in_front: bool = False, bare: bool = False) -> int:
    """Checks one unit for an input of this many channels; returns its number of output channels.

    in_front: whether its BN normalises the input; bare: whether it is to have none.
    """
    weight = unit.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}.weight: expected a Tensor, got {type(weight).__name__}")
    if weight.dim() != 4:
        raise RuntimeError(f"{name}.weight: expected 4 dimensions [K, C/groups, R, S], got shape {tuple(weight.shape)}")
    out, per_group = weight.shape[:2]
    if unit.groups < 1 or out % unit.groups:
        raise RuntimeError(f"{name}: {out} output channels cannot be split into groups={unit.groups}")
    if channels != per_group * unit.groups:
        raise RuntimeError(
            f"{name}: given groups={unit.groups} and weight of size {list(weight.shape)}, expected input to have "
            f"{per_group * unit.groups} channels, but got {channels} channels instead"
        )
    if min(unit.stride) < 1 or min(unit.dilation) < 1 or min(unit.padding) < 0:
        raise RuntimeError(
            f"{name}: expected stride and dilation of at least 1 and padding of at least 0, got stride={unit.stride}, "
            f"dilation={unit.dilation}, padding={unit.padding}"
        )
    if bare:
        found = [field for field in ConvBN._fields[2:7] if getattr(unit, field) is not None] + ["training"] * unit.training
        if found:
            raise ValueError(f"{name}: a pre-activation block's projection is a convolution without a BN, got {found[0]}")
    if unit.eps < 0 or (unit.training and unit.eps == 0):
        raise ValueError(f"{name}.eps: batch normalisation needs a positive eps, got {unit.eps}")
    dtype, device = compute_dtype(x), x.device
    allowed = (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)
    for field, tensor in zip(_FIELDS, unit, strict=False):
        if tensor is None:
            continue
        if tensor.device != device:
            _check_device(f"{name}.{field}", tensor, x)
        if field in ("weight", "bias") and tensor.dtype != dtype and compute_dtype(tensor) != dtype:
            raise RuntimeError(f"{name}.{field}: expected {dtype}, as x has, got {tensor.dtype}")
        count = channels if in_front and field != "bias" else out
        if field != "weight" and tensor.shape != (count,):
            raise RuntimeError(f"{name}.{field} should contain {count} elements, got shape {tuple(tensor.shape)}")
        if field != "bias" and tensor.dtype not in allowed:
            raise RuntimeError(f"{name}.{field}: expected {' or '.join(map(str, allowed))} for x of {dtype}, got {tensor.dtype}")
    if bare:
        return out
    if not unit.training and (unit.running_mean is None or unit.running_var is None):
        raise RuntimeError(f"{name}: running_mean and running_var must be defined in evaluation mode")
    if unit.training and (unit.running_mean is None) != (unit.running_var is None):
        raise RuntimeError(f"{name}: running_mean and running_var must be given together")
    return out


def check_batch(x: Tensor, block: Block, names: Sequence[str]) -> list[tuple[int, int]]:
    """Heights and widths: that every kernel fits, every batch statistic has more than one value, and the branches meet.

    Returns the output size of every unit.

    Raises:
        RuntimeError: a kernel larger than its padded input; branches of different size.
        ValueError: one value per channel under batch statistics. As in eager, that BN has then counted the batch.
    """
    sizes = []
    size = tuple(x.shape[2:])
    for name, unit in zip(names, block.main, strict=False):
        size = _unit_size(name, unit, size)
        sizes.append(size)
    if block.projection is not None:
        size = tuple(x.shape[2:])
        if block.pool is not None:
            size = block.pool.output_size(*size)
        sizes.append(_unit_size(names[len(block.main)], block.projection, size))
        if sizes[-1] != sizes[-2]:
            raise RuntimeError(f"{names[len(block.main)]}: its output size {sizes[-1]} is not the main branch's {sizes[-2]}")
    normalised, channels = sizes, [unit.weight.shape[0] for unit in block.units()]
    if FORMS[block.form].preactivated:
        normalised, channels = [tuple(x.shape[2:]), *sizes[: len(block.main) - 1]], [x.shape[1], *channels]
    for unit, (height, width), count in zip(block.norms(), normalised, channels, strict=False):
        if unit.training and x.shape[0] * height * width == 1:
            if unit.num_batches_tracked is not None:
                unit.num_batches_tracked.add_(1)
            got = torch.Size((x.shape[0], count, height, width))
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {got}")
    return sizes


def _unit_size(name: str, unit: ConvBN, size: tuple[int, int]) -> tuple[int, int]:
    (height, width), (_, _, r, s), (top, left), (dr, ds) = size, unit.weight.shape, unit.padding, unit.dilation
    padded, reach = (height + 2 * top, width + 2 * left), (dr * (r - 1) + 1, ds * (s - 1) + 1)
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(
            f"{name}: calculated padded input size per channel: {padded}. Kernel size: {reach}. "
            "Kernel size can't be greater than actual input size"
        )
    return unit.output_size(height, width)
