"""Convolutions without data, to compile their kernels ahead of time."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res.kernels.ahead import meta, meta_image
from fused_res.kernels.conv_tiling import Config, configurations, fitting
from fused_res.kernels.tiling import cdiv
from fused_res.spec import ConvBN


class MetaCase(NamedTuple):
    """A convolution without data to compile ahead of time; of the `main` ones, all variants.

    wide: whether vectors of 16 bytes never cross a row's end. at: the shape, for the variant's name.
    """

    unit: ConvBN
    x: Tensor
    dy: Tensor
    at: str
    wide: bool
    main: bool


def meta_cases(dtype: torch.dtype) -> Iterator[MetaCase]:
    """Convolutions of ResNets, and ragged ones."""
    for n, c, k, size, r, stride, main in (
        (32, 256, 64, 56, 1, 1, True),
        (32, 64, 64, 56, 3, 1, True),
        (32, 128, 128, 56, 3, 2, True),
        (32, 256, 512, 56, 1, 2, False),
        (2, 512, 512, 7, 3, 1, False),
        (8, 20, 13, 9, 3, 2, False),
        (1, 3, 5, 7, 7, 2, False),
        (1, 1, 1, 1, 3, 1, False),
    ):
        weight = meta_image(k, c, r, r, dtype=dtype)
        unit = ConvBN(weight, stride=(stride, stride), padding=(r // 2, r // 2))
        dy = meta_image(n, k, *unit.output_size(size, size), dtype=dtype)
        at = f"{n}x{c}x{size}x{size} {k}x{r}x{r}/{stride}"
        yield MetaCase(unit, meta_image(n, c, size, size, dtype=dtype), dy, at, c % 16 == 0, main)


def meta_tiles(
    direction: str, dtype: torch.dtype, operands: Callable[[MetaCase], tuple]
) -> Iterator[tuple[MetaCase, tuple, Config, str]]:
    """The `main` cases, what `operands` makes of each, every tile worth measuring for that, and a variant's name."""
    for case in meta_cases(dtype):
        if case.main:
            made, weight, image = operands(case), case.unit.weight, case.x if direction == "dgrad" else case.dy
            configs = configurations(direction, dtype, image.numel() // image.shape[1], weight.shape)
            for config in fitting(direction, configs, weight, *made):
                yield case, made, config, f"{' '.join(map(str, config))} {case.at}"


def meta_activated(case: MetaCase) -> Any:
    """The case's x without data, with BN and ReLU still to be applied."""
    return SimpleNamespace(image=case.x, vectors=meta(5, case.x.shape[1]))


def meta_gradient(dy: Tensor, mask: str) -> Any:
    """A `Gradient` without data, whose mask is "signs", "y", "applied" already, or, with nothing to apply at all, "none"."""
    n, k, h, w = dy.shape
    fields: dict[str, Any] = {"y": dy, "vectors": None, "coefficients": meta(7, k), "signs": None}
    if mask == "none":
        fields |= {"y": None, "coefficients": None}
    elif mask == "signs":
        fields["signs"] = meta(n * h * w, cdiv(k, 8), dtype=torch.uint8)
    elif mask == "y":
        fields["vectors"] = meta(5, k)
    return SimpleNamespace(image=dy, **fields, masked=mask == "applied", training=True)
