"""The accuracy rule's numbers: an error of at most `MARGIN` times eager's (the library's), or the floor of the dtype."""

import math

import torch

MARGIN = 1.25


def scatter(values: int) -> float:
    """How far the ratio of two equally good candidates' errors over so many values may be from 1 by chance.

    The error of n independent values is known to a share of 1 / sqrt(2 n), and the ratio of two such to 1 / sqrt(n); this leaves
    room for three of those.
    """
    return 1 + 3 / math.sqrt(max(values, 1))


def floor(dtype: torch.dtype) -> float:
    """The error that needs no excuse: 8 * 2^-24 in float32, half an ulp of 1 in the 16-bit dtypes."""
    return 8 * 2.0**-24 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
