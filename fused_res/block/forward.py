"""The forward schedule of a block: which primitive runs when, and what is kept for backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.layout import nhwc, to_image, to_rows
from fused_res.primitives.bn_act import bn_act
from fused_res.primitives.bn_finalize import bn_finalize
from fused_res.primitives.bn_stats import bn_stats
from fused_res.primitives.common import statistics_dtype
from fused_res.primitives.conv_fprop import conv_fprop
from fused_res.reference import pooled
from fused_res.spec import Block, ConvBN


class Saved(NamedTuple):
    """What the forward keeps for the backward, beside the inputs.

    vectors: for every unit the [5, K] tensor of `bn_finalize`; ys: for every unit its convolution's output as a matrix
    [P, K]; signs: the outer ReLU's sign bits. The inner activations are recomputed from `ys`.
    """

    vectors: Sequence[Tensor]
    ys: Sequence[Tensor]
    signs: Tensor

    def to_list(self) -> list[Tensor]:
        return [*self.vectors, *self.ys, self.signs]

    @classmethod
    def from_list(cls, tensors: Sequence[Tensor], units: int) -> "Saved":
        if len(tensors) != 2 * units + 1:
            raise ValueError(f"saved: expected {2 * units + 1} tensors for {units} units, got {len(tensors)}")
        return cls(tensors[:units], tensors[units : 2 * units], tensors[-1])


def normalisation(y: Tensor, unit: ConvBN, residual_scale: Tensor | None, backend: str) -> Tensor:
    """The unit's [5, K] vectors, from the statistics of y [P, K] or from the running ones.

    The convolution's output lacks its bias: under batch statistics the bias cancels, under running ones it moves the mean.
    """
    if unit.training:
        partials, rows = bn_stats(y, backend=backend)
        return bn_finalize(partials, rows, y.shape[0], unit.gamma, unit.beta, unit.eps, residual_scale, backend=backend)
    dtype = statistics_dtype(y.dtype)
    mean = unit.running_mean.to(dtype)
    mean = mean if unit.bias is None else mean - unit.bias
    partials = torch.stack((mean, unit.running_var.to(dtype))).unsqueeze(0)
    return bn_finalize(partials, 1, 1, unit.gamma, unit.beta, unit.eps, residual_scale, backend=backend)


def forward(
    x: Tensor, skip: Tensor | None, residual_scale: Tensor | None, block: Block, save: bool, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """`out = relu(a * main(x) + shortcut(x))` at level `bn_act`.

    Args:
        x: [N, C, H, W], any strides.
        skip: the shortcut's value [N, K, H', W'] where the block has neither an identity nor a projection.
        residual_scale: the scalar a, or None for 1.
        block: tensors in x's dtype (BN's may be float32).
        save: whether to keep what the backward needs.

    Returns:
        out [N, K, H', W'], channels_last, and the list of `Saved`, of which only `vectors` if not `save`.
    """
    image = nhwc(x)
    vectors, ys = [], []
    z = image
    for unit in block.main[:-1]:
        y = conv_fprop(z, unit, backend=backend)
        n, _, h, w = y.shape
        ys.append(to_rows(y))
        vectors.append(normalisation(ys[-1], unit, None, backend))
        z = to_image(bn_act(ys[-1], vectors[-1], backend=backend)[0], n, h, w)
        if not save:
            ys.clear()
    y = conv_fprop(z, block.main[-1], backend=backend)
    n, _, h, w = y.shape
    del z
    ys.append(to_rows(y))
    vectors.append(normalisation(ys[-1], block.main[-1], residual_scale, backend))
    shortcut = {}
    if block.projection is not None:
        y2 = to_rows(conv_fprop(pooled(image, block.pool), block.projection, backend=backend))
        vectors.append(normalisation(y2, block.projection, None, backend))
        shortcut = {"y2": y2, "vectors2": vectors[-1]}
    else:
        shortcut = {"skip": to_rows(image if skip is None else skip)}
    out, signs = bn_act(ys[-1], vectors[len(block.main) - 1], **shortcut, keep_signs=save, backend=backend)
    if not save:
        return to_image(out, n, h, w), vectors
    if block.projection is not None:
        ys.append(y2)
    return to_image(out, n, h, w), Saved(vectors, ys, signs).to_list()
