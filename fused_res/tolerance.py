"""The accuracy rule's numbers: an error of at most `MARGIN` times eager's (the library's), or the floor of the dtype."""

import torch

MARGIN = 1.25


def floor(dtype: torch.dtype) -> float:
    """The error that needs no excuse: 8 * 2^-24 in float32, half an ulp of 1 in the 16-bit dtypes."""
    return 8 * 2.0**-24 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
