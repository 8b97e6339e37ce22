"""What every primitive needs: argument checks, and the precision its statistics are kept in."""

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 activations, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless the tensor is contiguous and has this shape, dtype and device."""
    if tensor.shape == shape and tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous():
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    _check_contiguous(name, tensor)


def dense(vector: Tensor | None) -> Tensor | None:
    """A BN's parameter as kernels read it. Eager takes any strides, those of an expanded or a sliced vector say."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor is a contiguous floating-point matrix [P, C]."""
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected a matrix [P, C], got shape {tuple(tensor.shape)}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    _check_contiguous(name, tensor)
