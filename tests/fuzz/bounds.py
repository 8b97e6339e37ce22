"""How far rounding takes a result from the truth at most."""

import torch
from compare import every, same, within
from torch import Tensor

from fused_res.primitives.bn_act import unpack_signs
from fused_res.primitives.bn_finalize import Vectors

_SUBNORMAL = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 0.0}


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of the arithmetic on values of this dtype."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def stored(truth: Tensor, slack: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The bound for a value within `slack` of the truth once it is rounded to the dtype."""
    half = torch.finfo(dtype).eps / 2
    return slack + half * (truth.abs() + slack) + _SUBNORMAL[dtype]


def hold(got: Tensor, truth: Tensor, slack: Tensor | float, name: str) -> None:
    """What was computed to within `slack` and then stored; what the dtype does not hold may be infinite."""
    limit, wide = stored(truth, slack, got.dtype), got.double()
    over = wide.isinf() & (wide.sign() == truth.sign()) & (truth.abs() + limit >= torch.finfo(got.dtype).max)
    within(torch.where(over, truth, wide), truth, limit, name, special=True)


def hold_sums(partials: Tensor, terms: Tensor, slack: Tensor | float, name: str) -> None:
    """Sums over the rows of `terms`, partial ones of which are given; slack: the terms' own errors, summed."""
    u = roundoff(partials.dtype)
    limit = (len(terms) + 4) * u * terms.abs().sum(0) + slack
    within(partials.double().sum(0), terms.sum(0), limit + 2.0**-149, name)


def hold_statistics(partials: Tensor, rows: int, y: Tensor, name: str) -> None:
    """What `bn_stats` promises of y, tile by tile, if deviations are taken from means that are off by a few roundings."""
    tiles = y.double().split(rows)
    assert partials.shape == (len(tiles), 2, y.shape[1]), f"{name}: {len(tiles)} tiles of {rows} rows, got {tuple(partials.shape)}"
    u = roundoff(y.dtype)
    for t, tile in enumerate(tiles):
        mean, n = tile.mean(0), len(tile)
        squares = (tile - mean).square().sum(0)
        off = (n + 8) * u * tile.abs().amax(0)
        within(partials[t, 0].double(), mean, off, f"{name}: mean of tile {t}")
        limit = 2 * (n + 8) * u * squares + 2 * off * (n * squares).sqrt() + n * off.square()
        within(partials[t, 1].double(), squares, limit, f"{name}: squares of tile {t}")


def affine(y: Tensor, vectors: Tensor, slack: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """scale * y + shift and its bound, for y within `slack`."""
    v = Vectors(*vectors.double())
    return v.scale * y + v.shift, 3 * roundoff(vectors.dtype) * ((v.scale * y).abs() + v.shift.abs()) + v.scale.abs() * slack


def activation(image_rows: Tensor, vectors: Tensor | None, slack: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """What an operand's rows are, and how far they may be off; they are rounded to the image's dtype."""
    if vectors is None:
        return image_rows.double(), torch.zeros(image_rows.shape, dtype=torch.float64)
    value, off = affine(image_rows.double(), vectors, slack)
    value = value.relu()
    return value, stored(value, off, image_rows.dtype)


def gate(dout: Tensor, y: Tensor, vectors: Tensor, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """g, and by how much it is uncertain: all of it where the sign of the pre-activation is within rounding."""
    if signs is not None:
        return torch.where(unpack_signs(signs, dout.shape[1]), dout.double(), 0), torch.zeros(dout.shape, dtype=torch.float64)
    value, off = affine(y.double(), vectors)
    return torch.where(value > 0, dout.double(), 0), torch.where(value.abs() <= off, dout.double().abs(), 0)


def hold_signs(signs: Tensor, out: Tensor, name: str) -> None:
    """Bits are set where `not (out <= 0)`, and nowhere in the padding of a row."""
    from fused_res.primitives.bn_act import pack_signs

    same(signs, pack_signs(~(out <= 0)), name)


def untouched(tensors: list[Tensor], copies: list[Tensor], name: str) -> None:
    """A primitive writes to none of its inputs."""
    for i, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
        bad = (tensor != copy) & ~(tensor.isnan() & copy.isnan()) if tensor.is_floating_point() else tensor != copy
        every(~bad, f"{name}: input {i} is as it was")
