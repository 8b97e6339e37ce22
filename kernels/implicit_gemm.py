"""The loop of a convolution: where pixels lie, what operands become on their way in, and the product.

All three directions are one implicit matrix product over NHWC images: rows are pixels, columns are channels, and what is summed
over runs through the taps of the filter and the channels of the other side (fprop, dgrad) or through the pixels (wgrad).
"""

import triton
import triton.language as tl

from fused_res.kernels.device import (
    SCALE,
    SHIFT,
    activate,
    affine,
    is_open,
    load_row_where,
    load_where,
    narrow,
    through_bn,
    widen,
)


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
def load_signs(
    signs,
    row,
    place,
    first,
    inside,
    C,
    WORD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr = False,
):
    """Sign bits [BLOCK_P, BLOCK_C] as booleans, of pixels row + place and channels from `first` on, in words of WORD bits.

    inside: which of the pixels count; None where all do. FULL: all channels are there.
    """
    words = signs
    if WORD == 32:  # wide enough for asynchronous copies
        words = signs.to(tl.pointer_type(tl.uint32))
    S, b = (C + WORD - 1) // WORD, tl.arange(0, BLOCK_C // WORD)
    start, mask = words + tl.cast(row, tl.int64) * S, None
    if inside is not None:
        mask = inside[:, None]
    if FULL:
        start += first // WORD
    else:
        b += first // WORD
        mask = mask & (b < S)[None, :]
        b %= S
    bits = load_where(start + ((place * S)[:, None] + b[None, :]), mask)
    grouped = (bits.to(tl.uint32)[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1
    return tl.reshape(grouped, (BLOCK_P, BLOCK_C)) != 0


@triton.jit
def _pointers(image, start, at, c, ALONG: tl.constexpr):
    """To elements of an image from `start` on, at [BLOCK_P, 1] and channels c, added in the order that `read` says."""
    if ALONG:
        return (image + start + at) + c[None, :]
    return image + start + (at + c[None, :])


@triton.jit
def read(
    source,
    row,
    place,
    inside,
    first,
    C,
    ALONG: tl.constexpr,
    LIVE: tl.constexpr,
    WORD: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The source [BLOCK_P, BLOCK_C] at pixels row + place and at channels from `first` on.

    0 where not inside: padding comes after the ReLU, and behind the last pixel there is nothing. inside: None where every pixel
    is; there row + place is to be a pixel of the image all the same. FULL: all channels are there. LIVE: the gradient's BN used the
    batch's statistics; where not, y only gives signs.

    ALONG: a loop goes on along the channels, from the same pixels, and adds 32 bits to the pointers to these; otherwise it goes on
    from pixel to pixel, and adds a row to the places of a block.
    """
    c, mask = first + tl.arange(0, BLOCK_C), None
    if inside is not None:
        mask = inside[:, None]
    if not FULL:
        mask = mask & (c < C)[None, :]
        c %= C
    start, at = tl.cast(row, tl.int64) * C, (place * C)[:, None]
    value = load_where(_pointers(source.image, start, at, c, ALONG), mask)
    if source.coefficients is not None:
        g = widen(value)
        v = g
        if LIVE or source.vectors is not None:
            v = widen(load_where(_pointers(source.y, start, at, c, ALONG), mask))
        if source.signs is not None:
            g = tl.where(load_signs(source.signs, row, place, first, inside, C, WORD, BLOCK_P, BLOCK_C, FULL), g, 0.0)
        elif source.vectors is not None:
            scale = load_row_where(source.vectors, SCALE, C, c, None)
            shift = load_row_where(source.vectors, SHIFT, C, c, None)
            g = tl.where(is_open(affine(v, scale[None, :], shift[None, :])), g, 0.0)
        value = through_bn(g, v, source.coefficients, C, c, None, LIVE)
    elif source.vectors is not None:
        value = activate(widen(value), source.vectors, C, c, None)
    if mask is not None and (source.coefficients is not None or source.vectors is not None):
        value = tl.where(mask, value, 0.0)
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
    DENSE: tl.constexpr,
    POINTWISE: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`sum over taps and d of source[pixel moved by the tap, d] * weight[tap, d, j]`, [BLOCK_P, BLOCK_J] in float32.

    pixels: a row, and from there on the places of the source's pixels under the first tap, their lines and columns, and which of
    them count. size: height, width and channels of the source.
    taps: how many, how many to a row, and how far down and right from one to the next.
    filters: the weight, its first tap, how many taps on the next one down and right lie, and the strides of taps and of d and j;
    then the first j and its end.
    DENSE: stride_d is 1. POINTWISE: one tap, under which every pixel that counts lies inside. EVEN: all of them count. FULL: no
    step of d and no block of j reaches beyond the end.
    """
    row, place, h, w, valid = pixels
    H, W, D = size
    count, across, down, right = taps
    weight, first, step_down, step_right, stride_tap, stride_d, stride_j, first_j, J = filters
    # Where no tap belongs to these pixels the loop does not run, but what precedes it may divide.
    taps_in_all, taps_in_a_row = tl.maximum(count, 1), tl.maximum(across, 1)
    if POINTWISE:
        count = 1
    d, j = tl.arange(0, BLOCK_D), first_j + tl.arange(0, BLOCK_J)
    there = j < J
    if not FULL:
        j %= J
    columns = j.to(tl.int64) * stride_j
    acc = tl.zeros((BLOCK_P, BLOCK_J), tl.float32)
    for i in tl.range(0, count * tl.cdiv(D, BLOCK_D), num_stages=STAGES):
        inside, block, filter, origin, at = None, i * BLOCK_D, 0, row, place
        if POINTWISE:
            if not EVEN:
                inside, at = valid, tl.where(valid, place, 0)
        else:
            block, tap = i // taps_in_all * BLOCK_D, i % taps_in_all
            a, b = tap // taps_in_a_row, tap % taps_in_a_row
            inside = valid & ((h + a * down).to(tl.uint32) < H) & ((w + b * right).to(tl.uint32) < W)  # below 0 is far above
            move = a * down * W + b * right
            origin, at = row + move, tl.where(inside, place, -move)
            filter = first + a * step_down + b * step_right
        rows = read(source, origin, at, inside, block, D, True, LIVE, WORD, FULL, PRECISION, BLOCK_P, BLOCK_D)
        deep, mask = block + d, None
        if not FULL:
            mask = (deep < D)[:, None] & there[None, :]
            deep %= D
        start = weight + tl.cast(filter, tl.int64) * stride_tap
        if DENSE and POINTWISE:  # as `read` does along the channels; of several taps that spills on compute capability 12.0
            at = (start + columns[None, :]) + deep[:, None]
        else:
            start += tl.cast(block, tl.int64) * stride_d
            at = start + (((deep - block).to(tl.int64) * stride_d)[:, None] + columns[None, :])
        factors = load_where(at, mask)
        acc = tl.dot(rows, narrow(factors, weight.dtype.element_ty, PRECISION), acc, input_precision=PRECISION)
    return acc
