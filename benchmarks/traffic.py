"""Bytes and FLOPs of a block on paper, pass by pass: what each level of fusion has to move.

A pass is one kernel. Every tensor it names is read or written in full, once: no reuse between passes, no halo, no per-channel
vectors. Sizes are elements of one image. `eager` and `fused BN` are what others do: every step on its own, and BN fused with the
ReLU, or with addition and ReLU, each BN by itself, which is as far as a compiler or a fused BN gets. The others are the levels of
`fused_res.planner`; those that it does not have yet are as they are designed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fused_res.benchmarks.cases import Case, Network

SIGN = 1 / 8
"""Bytes of a sign, one for each element of the output."""


class Pass(NamedTuple):
    """Elements read and written, FLOPs and sign bits moved for one image; `weights`, `fixed`: elements and FLOPs of a step."""

    name: str
    read: float
    written: float
    flops: float = 0.0
    signs: float = 0.0
    weights: float = 0.0
    fixed: float = 0.0


class Unit(NamedTuple):
    """A convolution: elements of its input and output, channels, and how much work it is."""

    name: str
    input: float
    output: float
    channels_in: int
    channels: int
    flops: float
    weights: float
    pointwise: bool

    def conv(self, kind: str, read: float, written: float, signs: float = 0.0) -> Pass:
        """fprop, dgrad or wgrad, which are as much work as each other."""
        return Pass(f"{kind} {self.name}", read, written, self.flops, signs, self.weights)


class Shape(NamedTuple):
    """The units of the main branch, the projection's, and the elements of x and out."""

    main: list[Unit]
    projection: Unit | None
    x: float
    out: float


def shape_of(case: Case) -> Shape:
    outer, inner = case.size**2, case.output_size**2

    def unit(name: str, cin: int, cout: int, pixels_in: int, pixels: int, kernel: int, groups: int = 1) -> Unit:
        weights = cout * (cin // groups) * kernel**2
        return Unit(name, cin * pixels_in, cout * pixels, cin, cout, 2.0 * pixels * weights, weights, kernel == 1)

    width, outplanes = case.width, case.outplanes
    if case.basic:
        main = [
            unit("conv1", case.inplanes, width, outer, inner, 3),
            unit("conv2", width, width, inner, inner, 3),
        ]
    else:
        main = [
            unit("conv1", case.inplanes, width, outer, outer, 1),
            unit("conv2", width, width, outer, inner, 3, case.groups),
            unit("conv3", width, outplanes, inner, inner, 1),
        ]
    projection = unit("projection", case.inplanes, outplanes, outer, inner, 1) if case.projection else None
    return Shape(main, projection, case.inplanes * outer, outplanes * inner)


def _norm(name: str, size: float, train: bool, fused: bool) -> Iterator[Pass]:
    """Forward through a BN of its own and its ReLU, in one pass or in two."""
    if train:
        yield Pass(f"statistics {name}", size, 0)
    yield Pass(f"normalise {name}", size, size)
    if not fused:
        yield Pass(f"ReLU {name}", size, size)


def _norm_backward(name: str, size: float, fused: bool) -> Iterator[Pass]:
    if not fused:
        yield Pass(f"ReLU backward {name}", 2 * size, size)
    yield Pass(f"BN reduce {name}", 2 * size, 0)
    yield Pass(f"BN apply {name}", 2 * size, size)


def _separate_preactivated(shape: Shape, mode: str, fused: bool) -> Iterator[Pass]:
    """`_separate` of a pre-activation block: a BN and its ReLU in front of each convolution."""
    yield from _bare(shape, mode)
    for u in shape.main:
        yield from _norm(u.name, u.input, mode != "eval", fused)
    yield Pass("add", 2 * shape.out, shape.out)
    if mode == "train":
        for u in shape.main:
            yield from _norm_backward(u.name, u.input, fused)
        yield Pass("add gradients", 2 * shape.x, shape.x)


def _preactivated(shape: Shape, mode: str, level: "Fusion") -> Iterator[Pass]:
    """A pre-activation block: the BN in front of all is of x, and nothing but the sum stands behind the last convolution."""
    *_, last = shape.main
    x, c, p, train = shape.x, shape.out, shape.projection, mode != "eval"
    for i, u in enumerate(shape.main):
        if train and (i == 0 or not level.epilogue):
            yield Pass(f"statistics {u.name}", u.input, 0)
        if not (level.prologue or (i > 0 and level.epilogue and not train)):
            yield Pass(f"normalise {u.name}", u.input, u.input)
        yield u.conv("fprop", u.input + (c if u is last and level.epilogue else 0), u.output)
    if p:
        yield p.conv("fprop", p.input, c)
    if not level.epilogue:
        yield Pass("add", 2 * c, c)
    if mode != "train":
        return
    if p:
        if not level.prologue:
            yield Pass("normalise projection", x, x)
        yield p.conv("wgrad", c + p.input, 0)
        yield p.conv("dgrad", c, p.input)
    for i, u in reversed(list(enumerate(shape.main))):
        dy = u.output if u is last or not level.prologue else 2 * u.output
        if not level.prologue:
            yield Pass(f"normalise {u.name}", u.input, u.input)
        yield u.conv("wgrad", dy + u.input, 0)
        yield u.conv("dgrad", dy + (u.input if level.epilogue else 0), u.input)
        joined = i == 0 and p is not None
        if joined and not level.epilogue:
            yield Pass("add gradients", 2 * x, x)
        if joined or not level.epilogue:
            yield Pass(f"BN reduce {u.name}", 2 * u.input, 0)
        if i == 0 or not level.prologue:
            yield Pass(f"BN apply {u.name}", 2 * u.input, u.input)
    if p is None:
        yield Pass("add gradients", 2 * x, x)


def _bare(shape: Shape, mode: str) -> Iterator[Pass]:
    for u in [*shape.main, *([shape.projection] if shape.projection else [])]:
        yield u.conv("fprop", u.input, u.output)
        if mode == "train":
            yield u.conv("dgrad", u.output, u.input)
            yield u.conv("wgrad", u.output + u.input, 0)


def _separate(shape: Shape, mode: str, fused: bool) -> Iterator[Pass]:
    """`eager`, or with `fused` each BN one with its ReLU or addition."""
    yield from _bare(shape, mode)
    projection, c = shape.projection, shape.out
    units = [*shape.main, *([projection] if projection else [])]
    for u in units:
        last, inner = u is shape.main[-1], u is not shape.main[-1] and u is not projection
        if mode != "eval":
            yield Pass(f"statistics {u.name}", u.output, 0)
        yield Pass(f"normalise {u.name}", u.output + (c if last and fused else 0), u.output)
        if inner and not fused:
            yield Pass(f"ReLU {u.name}", u.output, u.output)
    if not fused:
        yield Pass("add", 2 * c, c)
        yield Pass("ReLU", c, c)
    if mode != "train":
        return
    if not fused:
        yield Pass("ReLU backward", 2 * c, c)
    for u in units:
        yield Pass(f"BN reduce {u.name}", 2 * u.output, 0)
        yield Pass(f"BN apply {u.name}", 2 * u.output, u.output + (c if fused and u is shape.main[-1] else 0))
        if not fused and u is not shape.main[-1] and u is not projection:
            yield Pass(f"ReLU backward {u.name}", 2 * u.output, u.output)
    yield Pass("add gradients", 2 * shape.x, shape.x)


@dataclass(frozen=True)
class Fusion:
    """What is fused into the convolutions: statistics and reductions, BN and ReLU of their input, the last BN's moments."""

    epilogue: bool = False
    prologue: bool = False
    moment: bool = False


LEVELS = {
    "bn_act": Fusion(),
    "epilogue": Fusion(epilogue=True),
    "prologue": Fusion(epilogue=True, prologue=True),
    "moment": Fusion(epilogue=True, prologue=True, moment=True),
}


def _forward(shape: Shape, mode: str, level: Fusion) -> Iterator[Pass]:
    *inner, last = shape.main
    c, p, train = shape.out, shape.projection, mode != "eval"
    signs = c if train else 0
    one_launch = level.epilogue and not train
    for u in inner:
        yield u.conv("fprop", u.input, u.output)
        if train and not level.epilogue:
            yield Pass(f"statistics {u.name}", u.output, 0)
        if not (one_launch or level.prologue):
            yield Pass(f"normalise {u.name}", u.output, u.output)
    if one_launch:
        if p:
            yield p.conv("fprop", c + p.channels_in * c / p.channels, c)
        yield last.conv("fprop", last.input + c, c)
        return
    if level.moment and last.pointwise:
        yield _moments(last, last.input)
        if p:
            yield _moments(p, _sampled(p))
        read, flops = (_sampled(p), p.flops) if p else (c, 0.0)
        weights = last.weights + (p.weights if p else 0)
        yield Pass("tail", last.input + read, c, last.flops + flops, signs, weights)
        return
    for u in (last, p):
        if u is None:
            continue
        yield u.conv("fprop", u.input, u.output)
        if train and not level.epilogue:
            yield Pass(f"statistics {u.name}", u.output, 0)
    yield Pass("tail", 2 * c, c, signs=signs)


def _sampled(u: Unit) -> float:
    """Elements of x that a strided 1x1 convolution looks at."""
    return u.output / u.channels * u.channels_in


def _moments(u: Unit, read: float) -> Pass:
    k, pixels = u.channels_in, u.output / u.channels
    return Pass(f"moments {u.name}", read, 0, 2.0 * pixels * k * k, fixed=2.0 * u.channels * k * k)


def _moment_tail(shape: Shape) -> Iterator[Pass]:
    """Backward of the last 1x1 convolution and of the projection in the moment form.

    Where the accumulators of M fit one thread block, the pass that fills them reads the incoming gradient once for both results.
    """
    c, last, p = shape.out, shape.main[-1], shape.projection
    for u, read, written in ((last, last.input, last.input), *(((p, _sampled(p), shape.x),) if p else ())):
        pixels, k = u.output / u.channels, u.channels_in
        small, quadratic = 2.0 * u.channels * k * k, 2.0 * pixels * k * k
        if u.channels <= 256 and k <= 64:
            yield Pass(f"wgrad and g W {u.name}", c + read, read, 2 * u.flops, c, 2 * u.weights, small)
            yield Pass(f"dgrad {u.name}", 2 * read, written, quadratic, fixed=small)
        else:
            yield Pass(f"wgrad {u.name}", c + read, 0, u.flops, c, u.weights, small)
            yield Pass(f"dgrad {u.name}", c + read, written, u.flops + quadratic, c, u.weights, small)


def _backward(shape: Shape, level: Fusion) -> Iterator[Pass]:
    c, p, x = shape.out, shape.projection, shape.x
    count = len(shape.main)
    moment = level.moment and shape.main[-1].pointwise
    top = [shape.main[-1], *([p] if p else [])]
    if moment:
        yield from _moment_tail(shape)
    else:
        yield Pass("BN reduce", c + len(top) * c, 0, signs=c)
        if not level.prologue:
            masked = c if p is None and not level.epilogue else 0
            yield Pass("BN apply", c + len(top) * c, len(top) * c + masked, signs=c)
    for i in reversed(range(count)):
        u, last = shape.main[i], i == count - 1
        if moment and last:
            continue
        dy = 2 * u.output if level.prologue else u.output
        signs = c if level.prologue and last else 0
        if i > 0 and not level.prologue:
            yield Pass(f"normalise {shape.main[i - 1].name}", u.input, u.input)
        yield u.conv("wgrad", dy + u.input, 0, signs)
        if i > 0:
            yield u.conv("dgrad", dy + (u.input if level.epilogue else 0), u.input, signs)
            if not level.epilogue:
                yield Pass(f"BN reduce {shape.main[i - 1].name}", 2 * u.input, 0)
            if not level.prologue:
                yield Pass(f"BN apply {shape.main[i - 1].name}", 2 * u.input, u.input)
        else:
            yield u.conv("dgrad", dy + (x if level.epilogue else 0), x, c if level.epilogue and p is None else 0)
    if p and not moment:
        dy = 2 * c if level.prologue else c
        yield p.conv("wgrad", dy + p.input, 0, c if level.prologue else 0)
        yield p.conv("dgrad", dy, p.input, c if level.prologue else 0)
    if not level.epilogue:
        yield Pass("add gradients", 2 * x, x)


WAYS = ("eager", "fused BN", *LEVELS)


def passes(case: Case, way: str, mode: str) -> list[Pass]:
    """The kernels of one step. `way` is one of `WAYS`, or "bare" for the convolutions alone."""
    shape = shape_of(case)
    if way == "bare":
        return list(_bare(shape, mode))
    if way in ("eager", "fused BN"):
        separate = _separate_preactivated if case.preactivated else _separate
        return list(separate(shape, mode, way == "fused BN"))
    level = LEVELS[way]
    if case.preactivated:
        return list(_preactivated(shape, mode, level))
    found = list(_forward(shape, mode, level))
    return found + list(_backward(shape, level)) if mode == "train" else found


class Cost(NamedTuple):
    """Bytes moved and FLOPs of one step of a whole batch."""

    bytes: float
    flops: float


def cost(found: Pass, batch: int, itemsize: int) -> Cost:
    elements = batch * (found.read + found.written) + found.weights
    return Cost(elements * itemsize + batch * found.signs * SIGN, batch * found.flops + found.fixed)


def total(case: Case, way: str, mode: str, batch: int, itemsize: int) -> Cost:
    """Bytes and FLOPs of one step; `itemsize` is that of activations and weights."""
    costs = [cost(found, batch, itemsize) for found in passes(case, way, mode)]
    return Cost(sum(c.bytes for c in costs), sum(c.flops for c in costs))


def convolution_flops(case: Case | Network, mode: str, batch: int) -> float:
    """FLOPs of the convolutions (and a network's classifier) of one step: what every peer has to do, whatever it fuses."""
    times = 3 if mode == "train" else 1
    if not case.is_network:
        return sum(found.flops for found in _bare(shape_of(case), mode)) * batch
    stem, classifier = 2.0 * 112**2 * 64 * 3 * 49, 2.0 * 1000 * (512 if case.kind == "basic" else 2048)
    blocks = sum(count * convolution_flops(block, mode, 1) for block, count in case.blocks())
    return batch * (blocks + (min(times, 2)) * stem + times * classifier)
