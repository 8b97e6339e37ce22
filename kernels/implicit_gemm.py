"""The loop of a convolution: where pixels lie, what operands become on their way in, and the product.

All three directions are one implicit matrix product over NHWC images: rows are pixels, columns are channels, and what is summed
over runs through the taps of the filter and the channels of the other side (fprop, dgrad) or through the pixels (wgrad).
"""

import triton
import triton.language as tl

from fused_res.kernels.device import SCALE, SHIFT, activate, affine, is_open, load_row, load_rows, load_where, narrow, through_bn


@triton.jit
def _quotient(n, d):
    """n // d of the int32 n of a block, from 0 to less than d + 2^15, by a multiplication: a division is some twenty instructions.

    With m = ceil(2^31 / d), which is less than 1 too large for d of it, n * m / 2^31 exceeds n / d by less than n / 2^31, and must
    by less than 1 / d. Of a larger d there is no second multiple below d + 2^15.
    """
    d = tl.cast(d, tl.uint32)
    n = n.to(tl.uint32)
    return tl.where(d > 32768, (n >= d).to(tl.uint32), tl.umulhi(2 * n, 0x7FFFFFFF // d + 1)).to(tl.int32)


@triton.jit
def decode(first, H, W, p):
    """Image, row and column of pixels first + p of H x W images; p: int32, from 0 to less than 2^15. The image has `first`'s type.

    In a loop `first` is to be the same each time, so that what is computed of it alone comes before the loop.
    """
    n = first // (H * W)
    q = (first - n * (H * W)).to(tl.int32)
    w = q % W + p
    down = _quotient(w, W)
    h = q // W + down
    images = _quotient(h, H)
    return n + images, h - images * H, w - down * W


@triton.jit
def load_signs(signs, place, first, inside, C, WORD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sign bits [BLOCK_P, BLOCK_C] as booleans, of pixels `place` and channels from `first` on, in words of WORD bits.

    inside: which of the pixels count; None where all of them and of the channels do.
    """
    words = signs
    if WORD == 32:  # wide enough for asynchronous copies
        words = signs.to(tl.pointer_type(tl.uint32))
    S = (C + WORD - 1) // WORD
    b = first // WORD + tl.arange(0, BLOCK_C // WORD)
    mask = None
    if inside is not None:
        mask = inside[:, None] & (b < S)[None, :]
    bits = load_where(words + place[:, None] * S + b[None, :], mask)
    grouped = (bits.to(tl.uint32)[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1
    return tl.reshape(grouped, (BLOCK_P, BLOCK_C)) != 0


@triton.jit
def read(
    source,
    place,
    base,
    inside,
    first,
    C,
    LIVE: tl.constexpr,
    WORD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The source [BLOCK_P, BLOCK_C] at pixels `place`, whose first channels lie at `base`, and at channels from `first` on.

    0 where not inside: padding comes after the ReLU, and behind the last pixel there is nothing. inside: None where every pixel
    and channel is. LIVE: the gradient's BN used the batch's statistics; where not, y only gives signs.
    """
    c = first + tl.arange(0, BLOCK_C)
    mask = None
    if inside is not None:
        mask = inside[:, None] & (c < C)[None, :]
    at = base[:, None] + c[None, :]
    value = load_where(source.image + at, mask)
    if source.coefficients is not None:
        g = value.to(tl.float32)
        v = g
        if LIVE or source.vectors is not None:
            v = load_rows(source.y, at, mask)
        if source.signs is not None:
            g = tl.where(load_signs(source.signs, place, first, inside, C, WORD, BLOCK_P, BLOCK_C), g, 0.0)
        elif source.vectors is not None:
            scale, shift = load_row(source.vectors, SCALE, C, c), load_row(source.vectors, SHIFT, C, c)
            g = tl.where(is_open(affine(v, scale[None, :], shift[None, :])), g, 0.0)
        value = through_bn(g, v, source.coefficients, C, c, LIVE)
    elif source.vectors is not None:
        value = activate(value.to(tl.float32), source.vectors, C, c)
    if inside is not None and (source.coefficients is not None or source.vectors is not None):
        value = tl.where(inside[:, None], value, 0.0)
    return narrow(value, source.image.dtype.element_ty, PRECISION)


@triton.jit
def implicit_gemm(
    source,
    pixels,
    size,
    taps,
    filters,
    LIVE: tl.constexpr,
    WORD: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`sum over taps and d of source[pixel moved by the tap, d] * weight[tap, d, j]`, [BLOCK_P, BLOCK_J] in float32.

    pixels: numbers, rows and columns of the source's pixels under the first tap, and which of them count.
    size: height, width and channels of the source.
    taps: how many, how many to a row, and how far down and right from one to the next.
    filters: the weight, its first tap, how many taps on the next one down and right lie, and the strides of taps and of d and j;
    then j and its end. EVEN: one tap, under which every pixel lies inside, and blocks that nothing is missing of.
    """
    place, h, w, valid = pixels
    H, W, D = size
    count, across, down, right = taps
    weight, first, step_down, step_right, stride_tap, stride_d, stride_j, j, J = filters
    wide = tl.cast(D, tl.int64)  # a size of 1 is a constant
    base = place * wide
    # Where no tap belongs to these pixels the loop does not run, but what precedes it may divide.
    taps_in_all, taps_in_a_row = tl.maximum(count, 1), tl.maximum(across, 1)
    columns = weight + j.to(tl.int64) * stride_j
    acc = tl.zeros((BLOCK_P, BLOCK_J), tl.float32)
    for i in tl.range(0, count * tl.cdiv(D, BLOCK_D), num_stages=STAGES):
        block, tap = i // taps_in_all * BLOCK_D, i % taps_in_all
        a, b = tap // taps_in_a_row, tap % taps_in_a_row
        inside = None
        if not EVEN:
            inside = valid & ((h + a * down).to(tl.uint32) < H) & ((w + b * right).to(tl.uint32) < W)  # below 0 is far above
        move = a * down * W + b * right
        rows = read(source, place + move, base + move * wide, inside, block, D, LIVE, WORD, PRECISION, BLOCK_P, BLOCK_D)
        d = block + tl.arange(0, BLOCK_D)
        filter = (first + a * step_down + b * step_right) * stride_tap
        at = (d.to(tl.int64) * stride_d + filter)[:, None] + columns[None, :]
        mask = None
        if not EVEN:
            mask = (d < D)[:, None] & (j < J)[None, :]
        factors = load_where(at, mask)
        acc = tl.dot(rows, narrow(factors, weight.dtype.element_ty, PRECISION), acc, input_precision=PRECISION)
    return acc
