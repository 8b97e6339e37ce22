"""What the kernels share inside: places of rows and channels, BN and ReLU, sign bits."""

import triton
import triton.language as tl

# Rows of the [5, C] vectors that `bn_finalize` makes, and the first of the [7, C] coefficients of `bn_act_backward_finalize`.
MEAN = tl.constexpr(0)
VAR = tl.constexpr(1)
INVSTD = tl.constexpr(2)
SCALE = tl.constexpr(3)
SHIFT = tl.constexpr(4)
ROW_P = tl.constexpr(0)
ROW_Q = tl.constexpr(1)
ROW_R = tl.constexpr(2)


@triton.jit
def aligned(C, ALIGN: tl.constexpr):
    """C, which ALIGN divides, in a form that tells the compiler so: rows then start as aligned as the tensor does."""
    return C // ALIGN * ALIGN


@triton.jit
def offset(row, C):
    """First element of a row, in 64 bits: P * C may exceed 2^31."""
    return row.to(tl.int64) * C


@triton.jit
def first_row(tile, rows):
    """First row of a tile, in 64 bits."""
    return tile.to(tl.int64) * rows


@triton.jit
def locate(C, rows, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's tile of `rows` rows: its number, its first row, the channels, and a block's places from that row on."""
    across = tl.cdiv(C, BLOCK_C)
    t = tl.program_id(0) // across
    c = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.arange(0, BLOCK_P)[:, None] * C + c[None, :]  # [BLOCK_P, BLOCK_C]
    return t, first_row(t, rows), c, at


@triton.jit
def locate_signs(C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Bytes in a row of sign bits, the bytes of this program's channels, and a block's places."""
    S = (C + 7) // 8
    b = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    at = tl.arange(0, BLOCK_P)[:, None] * S + b[None, :]  # [BLOCK_P, BLOCK_C / 8]
    return S, b, at


@triton.jit
def within(rows, P, columns, C):
    """Mask [rows, columns] of a block: the first P rows and the columns below C."""
    return (rows < P)[:, None] & (columns < C)[None, :]


@triton.jit
def places(p, left, c, C):
    """Places of rows p and of the channels c, [rows, channels], of which those past row `left` or channel C stand for others.

    A load that is masked has to point inside of its tensor all the same where a loop is pipelined: compilers have been seen to lose
    the mask of such a copy (https://github.com/pytorch/pytorch/issues/186440).
    """
    return (tl.minimum(p, left - 1) * C)[:, None] + (c % C)[None, :]


@triton.jit
def affine(y, scale, shift):
    """scale * y + shift with one rounding, so that forward and backward take the same sign for every element."""
    return tl.fma(y, scale, shift)


@triton.jit
def is_open(v):
    """Whether the ReLU lets v's gradient pass; NaN does."""
    return (v <= 0) == 0


@triton.jit
def relu(v):
    """max(v, 0) that keeps NaN: one instruction, where a comparison and a choice are two."""
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def narrow(v, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """v as a matrix product of this dtype and precision multiplies it: TF32 keeps the upper 10 bits of a float32's fraction."""
    if tl.float32 == DTYPE and PRECISION == "tf32":
        bits = v.to(tl.int32, bitcast=True)
        bits = tl.where(v == v, bits, 0)
        even = bits + 0xFFF + ((bits >> 13) & 1)
        v = tl.where(v == v, (even & -0x2000).to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def load_where(pointers, mask):
    """What lies there, and 0 where masked. mask: None where all of it counts, which saves an instruction for each element."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_row(vectors, row: tl.constexpr, C, c):
    """Row of a [rows, C] tensor of per-channel vectors, at the channels c; 0 past the last channel."""
    return tl.load(vectors + row * C + c, mask=c < C, other=0.0)


@triton.jit
def load_row_where(vectors, row: tl.constexpr, C, c, mask):
    """The same, 0 where masked. mask: None where all channels c count."""
    return load_where(vectors + row * C + c, mask)


@triton.jit
def store_vectors(pointer, vectors, C, c):
    """Per-channel vectors as the rows of a [rows, C] tensor."""
    for row in tl.static_range(len(vectors)):
        tl.store(pointer + row * C + c, vectors[row], mask=c < C)


@triton.jit
def widen(v):
    """v in float32.

    bfloat16 is its upper half: said in integers, the upper one of two that lie in a register takes one instruction, where the
    compiler's own conversion takes two.
    """
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return v.to(tl.float32)


@triton.jit
def load_rows(pointer, at, mask):
    """A tile of activations in float32; 0 where masked. mask: as in `load_where`."""
    return widen(load_where(pointer + at, mask))


@triton.jit
def activate(v, vectors, C, c, mask):
    """relu(scale * v + shift), with the vectors of the channels c; 0 where v is 0 and they are masked. mask: None, or [C]."""
    scale, shift = load_row_where(vectors, SCALE, C, c, mask), load_row_where(vectors, SHIFT, C, c, mask)
    return relu(affine(v, scale[None, :], shift[None, :]))


@triton.jit
def add_shortcut(v, skip, y2, vectors2, start, at, mask, C, c):
    """v + skip, or v + scale2 * y2 + shift2, of whichever is there the elements `at` from `start` on."""
    if skip is not None:
        v += load_rows(skip + start, at, mask)
    if y2 is not None:
        there = None if mask is None else c < C
        scale, shift = load_row_where(vectors2, SCALE, C, c, there), load_row_where(vectors2, SHIFT, C, c, there)
        v += affine(load_rows(y2 + start, at, mask), scale[None, :], shift[None, :])
    return v


@triton.jit
def through_bn(g, y, coefficients, C, c, mask, LIVE: tl.constexpr):
    """p * g + q * y + r, with the coefficients of the channels c; p * g where the statistics are no function of y.

    mask: of the channels, whose coefficients are then 0; None where all of them count.
    """
    result = g * load_row_where(coefficients, ROW_P, C, c, mask)[None, :]
    if LIVE:
        q, r = load_row_where(coefficients, ROW_Q, C, c, mask), load_row_where(coefficients, ROW_R, C, c, mask)
        result += tl.fma(y, q[None, :], r[None, :])
    return result


@triton.jit
def apart(v):
    """[P, C] as [1, P, C], on its way from a matrix product to sums over rows and memory.

    The compiler lets values lie as the product left them, a column spread over many threads, until something else is asked for: it
    knows no layout of a product with one more dimension, and takes one in which a thread has more of a column.
    """
    return v[None, :, :]


@triton.jit
def sum_rows(v):
    """Sums over the rows of [1, P, C]."""
    return tl.sum(tl.sum(v, axis=0), axis=0)


@triton.jit
def store_gradient(pointer, gradient, at, mask, y, vectors, partials, t, C, c):
    """Store a block of the gradient of z at elements `at`, where z is `relu(scale * y + shift)` if there are `partials`.

    It is then masked by that ReLU, and row t of `partials` [T, 2, C] becomes the sums over the block of g and g * (y - mean), of
    the values as they are stored.
    """
    stored = gradient.to(pointer.dtype.element_ty)
    if partials is None:
        tl.store(pointer + at, stored, mask=mask)
    else:
        at, there = apart(at), None
        if mask is not None:
            mask, there = apart(mask), c < C
        v = load_rows(y, at, mask)
        scale, shift = load_row_where(vectors, SCALE, C, c, there), load_row_where(vectors, SHIFT, C, c, there)
        g = tl.where(is_open(affine(v, scale[None, None, :], shift[None, None, :])), widen(apart(stored)), 0.0)
        tl.store(pointer + at, g.to(pointer.dtype.element_ty), mask=mask)
        if mask is not None:
            g = tl.where(mask, g, 0.0)
        moment = g * (v - load_row_where(vectors, MEAN, C, c, there)[None, None, :])
        store_vectors(partials + offset(t * 2, C), (sum_rows(g), sum_rows(moment)), C, c)


@triton.jit
def pack(bits, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WORD: tl.constexpr = 8):
    """Booleans [BLOCK_P, BLOCK_C] as sign words [BLOCK_P, BLOCK_C / WORD] of 8 or 32 bits, the first channel in the lowest bit.

    Threads put together what they have of a word before they exchange it: the longer the word, the fewer exchanges.
    """
    grouped = tl.reshape(bits.to(tl.uint32), (BLOCK_P, BLOCK_C // WORD, WORD))
    words = tl.sum(grouped << tl.arange(0, WORD)[None, None, :], axis=2)
    return words if WORD == 32 else words.to(tl.uint8)


@triton.jit
def unpack(signs, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Inverse of `pack`."""
    bits = (signs.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_P, BLOCK_C)) != 0
