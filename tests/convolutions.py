"""Convolutions of every geometry, and their operands: what the tests of the three directions share."""

from typing import NamedTuple

import pytest
import torch
from compare import every, same, within

from fused_res.spec import ConvBN

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Geometry(NamedTuple):
    """Images, input and output channels, image size, and the convolution's arguments."""

    n: int
    c: int
    k: int
    size: tuple[int, int]
    filter: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def unit(self, weight):
        return ConvBN(weight, stride=self.stride, padding=self.padding, dilation=self.dilation)

    @property
    def out(self):
        """Shape of the output."""
        weight = torch.empty(self.k, self.c, *self.filter, device="meta")
        return self.n, self.k, *self.unit(weight).output_size(*self.size)


GEOMETRIES = {
    "1x1": Geometry(3, 40, 20, (9, 7), (1, 1)),
    "1x1, wide": Geometry(1, 24, 150, (6, 12), (1, 1)),
    "1x1, stride 2": Geometry(2, 20, 24, (7, 6), (1, 1), (2, 2)),
    "1x1, padded": Geometry(1, 16, 16, (3, 4), (1, 1), (1, 1), (1, 0)),
    "3x3": Geometry(2, 20, 13, (9, 8), (3, 3), (1, 1), (1, 1)),
    "3x3, stride 2": Geometry(2, 16, 32, (7, 8), (3, 3), (2, 2), (1, 1)),
    "3x3, dilation 2": Geometry(1, 8, 9, (7, 6), (3, 3), (1, 1), (2, 2), (2, 2)),
    "3x3, stride 3, dilation 2": Geometry(1, 9, 8, (10, 11), (3, 3), (3, 3), (2, 1), (2, 2)),
    "3x3, stride 2, dilation 2": Geometry(1, 5, 6, (9, 8), (3, 3), (2, 2), (2, 2), (2, 2)),
    "7x7, stride 2": Geometry(1, 3, 8, (9, 10), (7, 7), (2, 2), (3, 3)),
    "1x3": Geometry(2, 6, 7, (4, 5), (1, 3), (1, 2), (0, 1)),
    "2x2, uneven": Geometry(1, 7, 5, (5, 4), (2, 2), (2, 1), (1, 0)),
    "one pixel": Geometry(1, 33, 17, (1, 1), (3, 3), (1, 1), (1, 1)),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_geometry = pytest.mark.parametrize(
    ("geometry", "dtype"),
    [pytest.param(geometry, dtype, id=f"{name}-{dtype}") for name, geometry in GEOMETRIES.items() for dtype in DTYPES],
)
# For every tile: small where kernels are interpreted, of a network where they run on a GPU, since only size shows some faults.
TILED = (
    [
        Geometry(16, 256, 64, (56, 56), (1, 1)),
        Geometry(16, 64, 256, (56, 56), (1, 1)),
        Geometry(8, 64, 64, (56, 56), (3, 3), (1, 1), (1, 1)),
        Geometry(8, 128, 128, (56, 56), (3, 3), (2, 2), (1, 1)),
        Geometry(4, 512, 512, (7, 7), (3, 3), (1, 1), (1, 1)),
    ]
    if torch.cuda.is_available()
    else [
        Geometry(1, 70, 70, (9, 7), (1, 1)),
        Geometry(1, 24, 96, (7, 8), (3, 3), (2, 2), (1, 1)),
    ]
)
every_tiled = pytest.mark.parametrize("geometry", TILED, ids=lambda g: "x".join(map(str, (g.c, g.k, *g.size, *g.filter))))


class Draw:
    """Tensors from a seeded generator, on a device: small integers, whose sums are exact, and normal numbers."""

    def __init__(self, seed, device):
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def integers(self, *shape, low=-2, high=3, dtype=torch.float32):
        values = torch.randint(low, high, shape, generator=self.generator)
        return _laid_out(values.to(self.device, dtype))

    def normal(self, *shape, dtype=torch.float32):
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return _laid_out(values.to(self.device, dtype))

    def vectors(self, channels, rows=5):
        """Integer vectors of a BN: scales of both signs, and shifts that are mostly positive."""
        vectors = self.integers(rows, channels)
        vectors[-1] += 1
        return vectors


def _laid_out(values):
    return values.to(memory_format=torch.channels_last) if values.dim() == 4 else values


def in_float64(operation, *images):
    """The operation on the images in float64, on the CPU: a GPU's library may take an algorithm that rounds even integers."""
    return operation(*(image.cpu().double().contiguous() for image in images)).to(images[0].device)


def assert_same_sums(got, expected, rounding=2.0**-20):
    """The same bits; on a GPU another alignment may mean another share of each thread, whose sums then round differently."""
    if got.device.type == "cpu" or not got.is_floating_point():
        same(got, expected)
        return
    assert got.dtype == expected.dtype
    difference = (got.double() - expected.double()).abs()
    limit = rounding * expected.double().abs().max() + torch.finfo(got.dtype).eps * expected.double().abs()
    every(difference <= limit)


def assert_rounded(got, expected, magnitude, images, backend):
    """The float64 sums, rounded once; magnitude: the sums of their terms' magnitudes.

    The library's gradient of a weight rounds after every image on a CPU without instructions for bfloat16, and so on most.
    """
    if backend == "triton" or got.dtype != torch.bfloat16 or got.is_cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        same(got, expected.to(got.dtype))
        return
    within(got.double(), expected, images * torch.finfo(got.dtype).eps / 2 * magnitude)


def misaligned(image):
    """The same channels_last image, one element off any alignment."""
    n, c, h, w = image.shape
    rows = image.permute(0, 2, 3, 1).reshape(-1)
    return torch.cat([rows.new_zeros(1), rows])[1:].view(n, h, w, c).permute(0, 3, 1, 2)


def huge(n, c, h, w, dtype=torch.bfloat16):
    """A channels_last image of zeros that takes memory only where it is touched; CPU only."""
    import mmap

    memory = mmap.mmap(-1, n * c * h * w * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(n, h, w, c).permute(0, 3, 1, 2)
