"""Assertions about tensors that name the first element that is wrong."""

import torch
from torch import Tensor


def _failure(name: str, got: Tensor, expected: Tensor, bad: Tensor, limit: Tensor | None = None) -> str:
    index = tuple(bad.nonzero()[0].tolist())
    a, b = got[index].item(), expected[index].item()
    text = f"{name or 'tensor'}: at {index} got {a!r}, expected {b!r}"
    if not isinstance(a, bool):
        text += f", difference {abs(a - b):.3g}"
    if limit is not None:
        text += f", limit {limit[index].item():.3g}"
    return f"{text}; {int(bad.sum())} of {bad.numel()} elements are wrong, shape {tuple(bad.shape)}, {got.dtype}"


def _check_alike(name: str, got: Tensor, expected: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        a, b = getattr(got, what), getattr(expected, what)
        assert a == b, f"{name or 'tensor'}: got {what} {a}, expected {b}"


def same(got: Tensor, expected: Tensor, name: str = "", *, nan: bool = False) -> None:
    """The same shape, dtype and values. A NaN equals nothing, unless `nan`: then it equals another NaN."""
    _check_alike(name, got, expected)
    if not nan and torch.equal(got, expected):
        return
    bad = got != expected
    if nan:
        bad &= ~(got.isnan() & expected.isnan())
    assert not bad.any(), _failure(name, got, expected, bad)


def all_same(got, expected, name: str = "", **options) -> None:
    """`same` for two sequences of tensors, as long as each other; None beside None will do."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a is None or b is None:
            assert a is b, f"{name}[{i}]: got {a}, expected {b}"
        else:
            same(a, b, f"{name}[{i}]", **options)


def within(got: Tensor, expected: Tensor, limit: Tensor | float, name: str = "", *, special: bool = False) -> None:
    """`|got - expected| <= limit`, in the wider dtype. What is not finite fails, unless `special`: then it has to be equal."""
    assert got.shape == expected.shape, f"{name or 'tensor'}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    dtype = torch.promote_types(got.dtype, expected.dtype)
    got, expected = got.to(dtype), expected.to(dtype)
    fine = (got - expected).abs() <= limit
    if special and not fine.all():
        fine |= ~expected.isfinite() & ((got == expected) | (got.isnan() & expected.isnan()))
    if not fine.all():
        limit = torch.as_tensor(limit, dtype=dtype, device=expected.device).expand(expected.shape)
        raise AssertionError(_failure(name, got, expected, ~fine, limit))


def every(condition: Tensor, name: str = "") -> None:
    """All elements are true."""
    bad = ~condition.bool()
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name or 'condition'}: fails at {where}, {int(bad.sum())} of {bad.numel()}, shape {tuple(bad.shape)}"
        )
