"""A convolution of evaluation whose weight has been prepared."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """call: of x [N, C, H, W] and a shortcut [N, K, H', W'] or None, both channels_last, the image [N, K, H', W'], channels_last.

    tensors: all that have been prepared, and that the call reads beside its arguments. It may run in several threads at once.
    """

    call: Callable[[Tensor, Tensor | None], Tensor]
    tensors: tuple[Tensor, ...]
