"""What the convolutions read and write beside plain images: one small vocabulary of prologues and epilogues for all directions.

An operand says what the kernel is to see and from what that follows. A kernel with a prologue computes it while it loads;
for one without, `values` computes it once and keeps it as long as the operand lives.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fused_res.layout import to_image, to_rows
from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_act_backward import bn_act_backward_apply
from fused_res.primitives.run import Run


def multiplied(weight: Tensor, run: Run) -> Tensor:
    """The weight as the backend's matrix products multiply it: itself, or rounded to TF32 where they round float32 to that.

    What the moment form derives from a weight must be derived from these values.
    """
    own = run.find("multiplied", weight.device)
    return weight if own is None else own(weight)


def _like(rows: Tensor, image: Tensor) -> Tensor:
    n, _, h, w = image.shape
    return to_image(rows, n, h, w)


@dataclass
class Activation:
    """`relu(scale * image + shift)`, rounded to the image's dtype; without `vectors` the image itself.

    image: [N, C, H, W], channels_last. vectors: [5, C] from `bn_finalize`. Padding comes after the ReLU: what a convolution
    reads outside of the image is 0. stride: the moment form takes every stride-th pixel only, as a strided 1x1 convolution
    does; convolutions take it from their unit.
    """

    image: Tensor
    vectors: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    _values: Tensor | None = field(default=None, repr=False)

    @property
    def pixels(self) -> int:
        """Rows of `rows`."""
        n, _, h, w = self.image.shape
        return n * -(-h // self.stride[0]) * -(-w // self.stride[1])

    @property
    def kind(self) -> str:
        """What a convolution computes of it as it reads, or nothing."""
        return "" if self.vectors is None else "bn relu"

    def values(self, run: Run) -> Tensor:
        """The operand as an image, every pixel of it."""
        if self.vectors is None:
            return self.image
        if self._values is None:
            self._values = _like(bn_act(to_rows(self.image), self.vectors, run=run)[0], self.image)
        return self._values

    def rows(self, run: Run) -> Tensor:
        """The operand as a matrix [P, C], the pixels of `stride` only."""
        down, right = self.stride
        return to_rows(self.values(run)[:, :, ::down, ::right])


@dataclass
class Gradient:
    """The gradient of a convolution's output: `p * g + q * y + r`, rounded to the image's dtype; without `coefficients`, the image.

    g is the image where the ReLU behind the BN was open and 0 elsewhere: by its `signs` if they are given, otherwise by the
    sign of `scale * y + shift`; if `masked`, the image is g already. Without `training` q = r = 0, and y only gives signs.

    image, y: [N, K, H', W'], channels_last. vectors: [5, K]. coefficients: [7, K] from `bn_act_backward_finalize`. signs: as
    `bn_act` returns them.
    """

    image: Tensor
    y: Tensor | None = None
    vectors: Tensor | None = None
    coefficients: Tensor | None = None
    signs: Tensor | None = None
    training: bool = True
    masked: bool = False
    _values: Tensor | None = field(default=None, repr=False)

    @property
    def pixels(self) -> int:
        """N * H' * W'."""
        return self.image.numel() // self.image.shape[1]

    @property
    def kind(self) -> str:
        """What a convolution computes of it as it reads, or nothing."""
        if self.coefficients is None:
            return ""
        mask = "masked" if self.masked else "signs" if self.signs is not None else "relu"
        return f"{mask} bn{'' if self.training else ', running statistics'}"

    def ready(self) -> "Gradient":
        """The operand for a kernel that computes it as it loads: where it has been computed already, that image."""
        return self if self._values is None else Gradient(self._values)

    def values(self, run: Run) -> Tensor:
        """The operand as an image."""
        if self.coefficients is None:
            return self.image
        if self._values is None:
            dy, _, _ = bn_act_backward_apply(
                to_rows(self.image),
                to_rows(self.y),
                self.vectors,
                self.coefficients,
                training=self.training,
                signs=self.signs,
                run=run,
            )
            self._values = _like(dy, self.image)
        return self._values


class Output(NamedTuple):
    """The rest of a block: the convolution's output y leaves as `relu(scale * y + shift [+ shortcut])`, or without the ReLU.

    vectors: [5, K] from `bn_finalize`; None, for y itself, only with `skip` and without `relu`. The shortcut is `skip`
    [N, K, H', W'], or `scale2 * y2 + shift2` from `y2` and `vectors2`.
    """

    vectors: Tensor | None
    skip: Tensor | None = None
    y2: Tensor | None = None
    vectors2: Tensor | None = None
    relu: bool = True

    @property
    def kind(self) -> str:
        """What a convolution does before it stores."""
        shortcut = "y2" if self.y2 is not None else "skip" if self.skip is not None else "none"
        return f"output, {shortcut}{'' if self.relu else ', no ReLU'}"


class Addend(NamedTuple):
    """A gradient that joins dx: `image` [N, C, h, w] where `signs` are open (everywhere without them), at every stride-th pixel."""

    image: Tensor
    signs: Tensor | None = None
    stride: tuple[int, int] = (1, 1)

    @property
    def kind(self) -> str:
        """What a convolution does before it stores."""
        return f"{'plain' if self.signs is None else 'masked'} addend, stride {self.stride[0]} {self.stride[1]}"
