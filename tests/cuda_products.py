"""The client of cuda_products.cpp and cuda_pointwise.cpp: CUDA kernels that multiply, on the CPU, and what they should give."""

import torch
from torch import Tensor

from fused_res.primitives.bn_act import pack_signs, sign_bytes

CORE, POINTWISE = ("instruction", "plain"), ("fprop", "tail", "tail tile")
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INSTRUCTIONS = (
    "mma f32",
    "mma f16",
    "mma bf16",
    "matrices",
    "copies",
    "banks 4",
    "banks 8",
    "banks 16",
    "tf32",
    "divide",
    "halves",
)
TILES = ("small", "large", "tall")
ROWS = 64
"""Of a tile that statistics are of."""


def integers(*shape, low=-3, high=4, dtype=torch.bfloat16, seed=0):
    """Small whole numbers, whose products and sums every format holds exactly."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def real(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def vectors(channels, seed=0, whole=False):
    """[5, C], whose scale and shift are whole numbers if asked for."""
    found = real(5, channels, dtype=torch.float32, seed=seed)
    if whole:
        found[3:] = integers(2, channels, low=-2, high=3, dtype=torch.float32, seed=seed)
    return found


def to_tf32(x: Tensor) -> Tensor:
    """float32 as a product of TF32 multiplies it: rounded to 10 bits of fraction, away from 0 between two."""
    bits = x.float().contiguous().view(torch.int32)
    return torch.where(x.isfinite(), (bits + 0x1000) & ~0x1FFF, bits).view(torch.float32)


def multiplied(x: Tensor) -> Tensor:
    """Values as a product of their dtype multiplies them, in float64."""
    return (to_tf32(x) if x.dtype == torch.float32 else x).double()


def activated(x: Tensor, v: Tensor | None) -> Tensor:
    """relu(scale * x + shift) of the last dimension, rounded to x's dtype; one rounding before the ReLU."""
    if v is None:
        return x
    total = torch.addcmul(v[4].double(), x.double(), v[3].double()).float()
    return torch.where(total <= 0, 0, total).to(x.dtype)


def sampled(x: Tensor, v: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """Images [n, h, w, c] as the rows [P, c] of their sampled pixels, activated."""
    return activated(x[:, :: stride[0], :: stride[1]].reshape(-1, x.shape[-1]), v)


def activation(x: Tensor, stride: tuple[int, int]) -> tuple[int, ...]:
    return (*x.shape, *stride)


def run_instruction(emulator, kind, a, b=None, c=None, *, to, mode=0):
    emulator.run("instruction", (INSTRUCTIONS.index(kind), mode), (a, b, c, to), (to,))
    return to


def run_plain(emulator, first, second, majors=(False, False), v=None, wide=True, depth=None, again=False, **options):
    """first [R, D] x second [C, D]^T in float32; a major that is True has the matrix lie in memory transposed."""
    (rows, full), columns = first.shape, len(second)
    lie = [matrix.T.contiguous() if major else matrix for matrix, major in zip((first, second), majors, strict=True)]
    to = torch.empty(rows, columns)
    begin, end = depth or (0, full)
    numbers = (NUMBERS[first.dtype], *majors, wide, rows, columns, full, begin, end, again)
    emulator.run("plain", numbers, (*lie, v, to), (to,), **options)
    return to


def run_fprop(emulator, x, weight, v=None, stride=(1, 1), statistics=True, tile="small", **options):
    """x [n, h, w, K], weight [C, K]: y [P, C], and partials [T, 2, C] or None."""
    pixels, channels = len(sampled(x, None, stride)), len(weight)
    y = torch.empty(pixels, channels, dtype=x.dtype)
    partials = torch.empty(-(-pixels // ROWS), 2, channels) if statistics else None
    numbers = (NUMBERS[x.dtype], TILES.index(tile), *activation(x, stride), channels)
    outputs = [y] if partials is None else [y, partials]
    emulator.run("fprop", numbers, (x, v, weight, y, partials), outputs, **options)
    return y, partials


def run_tail(
    emulator,
    main,
    skip=None,
    y2=None,
    vectors2=None,
    projection=None,
    signs=True,
    stride=(1, 1),
    main_stride=(1, 1),
    tile="small",
    **options,
):
    """main, projection: image [n, h, w, K], its vectors or None, weight [C, K], vectors [5, C]; stride: the projection's."""
    z, channels = main[0], len(main[2])
    pixels = len(sampled(z, None, main_stride))
    out = torch.empty(pixels, channels, dtype=z.dtype)
    bits = torch.empty(pixels, sign_bytes(channels), dtype=torch.uint8) if signs else None
    side = (None,) * 4 if projection is None else projection
    other = (0, 1, 1, 1, 1, 1) if projection is None else activation(side[0], stride)
    numbers = (NUMBERS[z.dtype], TILES.index(tile), *activation(z, main_stride), *other, channels)
    buffers = (*main, *side, y2 if skip is None else skip, vectors2, out, bits)
    emulator.run("tail", numbers, buffers, [b for b in (out, bits) if b is not None], **options)
    return out, bits


def normalised(branch, stride=(1, 1)):
    """scale * (W z) + shift in float64, and the sum of the sizes of its terms."""
    z, v, weight, after = branch
    rows, w, after = multiplied(sampled(z, v, stride)), multiplied(weight), after.double()
    terms = rows.abs() @ w.abs().T * after[3].abs() + after[4].abs()
    return rows @ w.T * after[3] + after[4], terms


def tail(main, skip=None, y2=None, vectors2=None, projection=None, stride=(1, 1)):
    """What `run_tail` should give before it is rounded, and the sum of the sizes of its terms."""
    total, terms = normalised(main)
    if skip is not None:
        total, terms = total + skip.double(), terms + skip.double().abs()
    if y2 is not None:
        more = y2.double() * vectors2[3].double() + vectors2[4].double()
        total, terms = total + more, terms + more.abs()
    if projection is not None:
        more, size = normalised(projection, stride)
        total, terms = total + more, terms + size
    return torch.where(total <= 0, 0, total), terms


def signs_of(out):
    return pack_signs(~(out <= 0))
