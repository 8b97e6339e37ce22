"""Images, addends of them, and their sums."""

import torch
from convolutions import Draw

from fused_res.layout import to_rows
from fused_res.primitives.bn_act import pack_signs
from fused_res.primitives.operands import Addend


def addend_case(shape, stride, dtype, device, signs=True):
    draw, (n, c, h, w) = Draw(0, device), shape
    dx = draw.integers(*shape, dtype=dtype)
    image = draw.integers(n, c, -(-h // stride[0]), -(-w // stride[1]), dtype=dtype)
    opened = draw.integers(*image.shape) > 0 if signs else torch.ones_like(image, dtype=torch.bool)
    expected = dx.double()
    expected[:, :, :: stride[0], :: stride[1]] += torch.where(opened, image.double(), 0)
    return dx, Addend(image, pack_signs(to_rows(opened)) if signs else None, stride), expected.to(dtype)
