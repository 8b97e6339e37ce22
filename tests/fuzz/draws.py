"""What cases are drawn from, and the tensors that a case stands for."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
# Around the vectors, panels and tiles of the kernels.
_CHANNELS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 20, 24, 31, 32, 33, 40, 48, 63, 64, 65, 70, 96, 100, 129)
_PIXELS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 18, 31, 33, 63, 64, 65, 100, 127, 130, 257, 300)
KINDS = ("normal", "normal", "integers", "far", "sparse")


class Scope(NamedTuple):
    """What a backend takes: the names of its dtypes, and whether its cases have to be small because it is interpreted."""

    dtypes: tuple[str, ...]
    small: bool = False

    @property
    def dtype(self):
        return st.sampled_from(self.dtypes)

    @property
    def channels(self):
        return st.sampled_from(_CHANNELS[:18] if self.small else _CHANNELS)

    @property
    def pixels(self):
        return st.sampled_from(_PIXELS[:16] if self.small else _PIXELS)

    @property
    def size(self):
        """Height and width of an image."""
        return st.tuples(st.integers(1, 6 if self.small else 12), st.integers(1, 6 if self.small else 12))


SCOPES = {
    "reference": Scope(("f32", "bf16", "f16", "f64")),
    "native": Scope(("f32", "bf16", "f16", "f64")),
    "triton": Scope(("f32", "bf16", "f16"), small=True),
}
seeds = st.integers(0, 2**16)
offsets = st.sampled_from((0, 0, 1, 3))
kinds = st.sampled_from(KINDS)
flags = st.booleans()


class Target(NamedTuple):
    """A primitive, or whole blocks: how its cases are drawn for a backend, and what holds one."""

    cases: Callable[[Scope], st.SearchStrategy]
    check: Callable[[tuple, str], None]


def statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Values:
    """Tensors of a seeded generator."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = seed

    def wide(self, *shape: int, kind: str = "normal") -> Tensor:
        """In float64. far: a mean far above the deviation. sparse: mostly zeros."""
        if kind == "integers":
            return torch.randint(-3, 4, shape, generator=self.generator).double()
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if kind == "far":
            return values + 300
        return values * (values.abs() > 1.2) if kind == "sparse" else values

    def matrix(self, *shape: int, dtype: torch.dtype, kind: str = "normal", offset: int = 0) -> Tensor:
        """Contiguous, so many elements into its memory."""
        return shifted(self.wide(*shape, kind=kind).to(dtype), offset)

    def image(self, n: int, c: int, h: int, w: int, *, dtype: torch.dtype, kind: str = "normal", offset: int = 0) -> Tensor:
        """In channels_last."""
        return self.matrix(n, h, w, c, dtype=dtype, kind=kind, offset=offset).permute(0, 3, 1, 2)

    def open(self, pixels: int, channels: int) -> Tensor:
        return torch.rand(pixels, channels, generator=self.generator) > 0.4

    def vectors(self, channels: int, dtype: torch.dtype) -> Tensor:
        """[5, C] of a BN: statistics, and a scale and a shift of either sign."""
        mean, var = self.wide(channels), self.wide(channels).square() + 0.1
        scale, shift = self.wide(channels), self.wide(channels)
        return torch.stack((mean, var, (var + 1e-5).rsqrt(), scale, shift)).to(statistics(dtype))

    def maybe(self, wanted: bool, *shape: int, dtype: torch.dtype) -> Tensor | None:
        """A parameter that may be missing; of a vector, every other one is a column of a matrix."""
        if not wanted:
            return None
        tensor = self.wide(*shape).to(dtype)
        self.parameters += 1
        return torch.stack((tensor, tensor + 1), -1)[..., 0] if shape and self.parameters % 2 else tensor


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """The same values, contiguous, so many elements into a memory of their own."""
    flat = torch.empty(offset + tensor.numel(), dtype=tensor.dtype)
    flat[:offset] = 7
    flat[offset:] = tensor.reshape(-1)
    return flat[offset:].view(tensor.shape)
