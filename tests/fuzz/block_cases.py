"""Cases of whole blocks: every geometry, shortcut, form, layout, mode and frozen parameter, at every level."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from fused_res.planner import LEVELS
from fused_res.spec import FORMS, POST_ACTIVATION, AvgPool, ConvBN
from fuzz.draws import Scope, flags, seeds

LAYOUTS = ("contiguous", "channels_last", "shifted", "sliced", "narrowed", "permuted", "outside in", "expanded")


class Unit(NamedTuple):
    """There: which of bias, gamma, beta and the running statistics. kernel to groups: of the convolution."""

    out: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    training: bool
    there: tuple[bool, bool, bool, bool]
    momentum: float | None

    def size(self, height: int, width: int) -> tuple[int, int]:
        weight = torch.empty(1, 1, *self.kernel, device="meta")
        return ConvBN(weight, stride=self.stride, padding=self.padding, dilation=self.dilation).output_size(height, width)


class Whole(NamedTuple):
    """shortcut: identity, projection, pooled, given, broadcast or none. precision: pure, mixed (BN in float32) or autocast.

    frozen: bits over x, the given shortcut, the residual scale and the units' tensors. own: whether the backend's own convolutions
    run wherever they can.
    """

    dtype: str
    precision: str
    n: int
    channels: int
    size: tuple[int, int]
    main: tuple[Unit, ...]
    shortcut: str
    projection: Unit | None
    pool: AvgPool | None
    scaled: bool
    x_layout: str
    dout_layout: str
    weight_layout: str
    frozen: int
    level: str
    own: bool
    seed: int
    form: str = POST_ACTIVATION

    def sizes(self) -> list[tuple[int, int]]:
        found = [self.size]
        for unit in self.main:
            found.append(unit.size(*found[-1]))
        return found

    @property
    def out(self) -> tuple[int, ...]:
        return self.n, self.main[-1].out, *self.sizes()[-1]


def pixels(case: Whole) -> int:
    """The fewest different ones that a BN normalises: of an expanded x all images are alike."""
    sizes, n = case.sizes(), 1 if case.x_layout == "expanded" else case.n
    return min(n * h * w for h, w in (sizes[:-1] if FORMS[case.form].preactivated else sizes[1:]))


def _possible(case: Whole) -> bool:
    """Kernels fit, no batch statistic is of one value, and no window reads nothing but padding, which has no variance."""
    for unit, size in zip(case.main, case.sizes(), strict=False):
        reach = (d * (k - 1) + 1 for d, k in zip(unit.dilation, unit.kernel, strict=True))
        if any(s + 2 * p < r for s, p, r in zip(size, unit.padding, reach, strict=True)):
            return False
        if any(p > d * (k - 1) for p, d, k in zip(unit.padding, unit.dilation, unit.kernel, strict=True)):
            return False
    return pixels(case) > 1


def cases(scope: Scope):
    widths = st.sampled_from((1, 2, 3, 5, 8) if scope.small else (1, 2, 3, 5, 8, 11, 16, 20, 33))
    side = st.integers(1, 5 if scope.small else 9)
    layouts, momentum = st.sampled_from(LAYOUTS), st.sampled_from((0.1, 0.1, 0.3, None))
    # As blocks mostly are: everything there, in training or in evaluation as a whole.
    there = st.one_of(st.just((False, True, True, True)), st.tuples(flags, flags, flags, flags))
    modes = st.one_of(st.just((True,) * 4), st.just((False,) * 4), st.tuples(flags, flags, flags, flags))

    @st.composite
    def draw_case(draw):
        mode, live = draw(modes), draw(there)
        shape = draw(st.sampled_from(("basic", "bottleneck", "bottleneck", "any")))
        channels, groups = draw(widths), draw(st.sampled_from((1, 1, 1, 2)))
        stride, dilation = draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((1, 1, 2)))
        width = draw(widths) * groups
        size, n = (draw(side), draw(side)), draw(st.integers(1, 3))

        def unit(i, out, kernel, stride=1, padding=None, dilation=1, groups=1):
            pads = (dilation * (kernel // 2),) * 2 if padding is None else padding
            keeps = live if draw(st.integers(0, 3)) else draw(there)
            return Unit(out, (kernel, kernel), (stride, stride), pads, (dilation, dilation), groups, mode[i], keeps, draw(momentum))

        form = draw(st.sampled_from((POST_ACTIVATION, POST_ACTIVATION, *FORMS)))
        shortcut = draw(st.sampled_from(("identity", "projection", "pooled", "given", "broadcast")))
        if not FORMS[form].skip:
            shortcut = "none"
        elif shape == "any":
            shortcut = shortcut if shortcut in ("given", "broadcast") else "given"
        out = channels if shortcut == "identity" else draw(widths)
        if shortcut == "identity":
            stride = 1
        if shape == "basic":
            main = (unit(0, width, 3, stride, None, dilation), unit(1, out, 3))
        elif shape == "bottleneck":
            main = (unit(0, width, 1), unit(1, width, 3, stride, None, dilation, groups), unit(2, out, 1))
        else:
            main = tuple(
                unit(i, draw(widths), draw(st.integers(1, 3)), draw(st.integers(1, 2)), (draw(st.integers(0, 1)),) * 2)
                for i in range(draw(st.integers(1, 3)))
            )
        projection, pool = None, None
        if shortcut == "projection":
            projection = unit(3, out, 1, stride)
        elif shortcut == "pooled":
            projection = unit(3, out, 1)
            counts = draw(flags)
            pool = AvgPool((stride, stride), (stride, stride), (0, 0), True, counts)
            if draw(flags):
                pool = AvgPool((3, 3), (stride, stride), (1, 1), False, counts)
        return Whole(
            draw(scope.dtype),
            draw(st.sampled_from(("pure", "mixed", "autocast"))),
            n,
            channels,
            size,
            main,
            shortcut,
            projection,
            pool,
            draw(flags) and shortcut != "none",
            draw(layouts),
            draw(layouts),
            draw(st.sampled_from(("contiguous", "channels_last", "sliced"))),
            draw(st.one_of(st.just(0), st.just(0), st.integers(0, 2**20 - 1))),
            draw(st.sampled_from(LEVELS)),
            draw(flags),
            draw(seeds),
            form,
        )

    return draw_case().filter(_possible)
