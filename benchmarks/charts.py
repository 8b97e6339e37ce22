"""Charts as SVG text: grouped horizontal bars and a roofline, for a page without network and without scripts."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

LABELS, WIDTH, BAR = 190, 940, 13
GREY, INK = "#5b6770", "#1f2933"


class Bar(NamedTuple):
    """One bar: its length, the ends of its interval (or None), its colour, what hovering shows, whether it stands out."""

    value: float
    interval: tuple[float, float] | None
    colour: str
    hint: str
    bold: bool = False


def _text(x: float, y: float, text: str, anchor: str = "start", size: float = 11, weight: str = "normal", fill: str = INK) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def nice_step(largest: float, steps: int = 6) -> float:
    """1, 2 or 5 times a power of ten, such that about `steps` of them reach `largest`."""
    raw = largest / steps
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], axis: str, mark: float | None = None, digits: int = 2) -> str:
    """Groups of bars below each other; `mark` is a value with a line of its own."""
    largest = max((max(b.value, (b.interval or (0, 0))[1]) for _, group in groups for b in group), default=1.0)
    largest = max(largest, mark or 0.0) or 1.0
    scale, top, y, parts = (WIDTH - LABELS - 60) / largest, 22, 26.0, []
    for name, group in groups:
        height = BAR * len(group)
        parts.append(_text(LABELS - 8, y + height / 2 + 4, name, "end"))
        for bar in group:
            hint = f"<title>{escape(bar.hint)}</title>"
            size = f'x="{LABELS}" y="{y + 1:.1f}" width="{max(bar.value * scale, 0.5):.1f}" height="{BAR - 2}"'
            parts.append(f'<rect {size} fill="{bar.colour}">{hint}</rect>')
            end = bar.value
            if bar.interval:
                low, high = bar.interval
                end, middle = max(end, high), y + BAR / 2
                parts.append(_line(LABELS + low * scale, middle, LABELS + high * scale, middle, INK))
            weight = "bold" if bar.bold else "normal"
            parts.append(_text(LABELS + end * scale + 5, y + BAR - 3, f"{bar.value:.{digits}f}", size=10, weight=weight))
            y += BAR
        y += 9
    grid, step = [], nice_step(largest)
    for n in range(int(largest / step) + 1):
        x = LABELS + n * step * scale
        grid += [_line(x, top, x, y, "#e4e7eb"), _text(x, top - 6, f"{n * step:g}", "middle", 10, fill=GREY)]
    if mark is not None:
        grid.append(_line(LABELS + mark * scale, top, LABELS + mark * scale, y, "#c0392b", 1.4, "5 3"))
    return _svg(WIDTH, y + 18, [*grid, *parts, _text(LABELS, y + 12, axis, size=10.5, fill=GREY)], axis)


class Point(NamedTuple):
    """Where a peer stands on the roofline."""

    intensity: float
    rate: float
    colour: str
    hint: str


def roofline(points: Sequence[Point], peak: float, bandwidth: float) -> str:
    """FLOP/s over FLOPs per byte, both logarithmic, under the measured ceilings [FLOP/s, bytes/s]."""
    left, right, top, bottom = 70, WIDTH - 30, 20, 360
    ridge = peak / bandwidth
    xs, ys = [p.intensity for p in points] + [ridge], [p.rate for p in points] + [peak]
    x0 = math.floor(min(math.log10(min(xs)), math.log10(ridge) - 0.5) * 2) / 2
    x1 = math.ceil(math.log10(max(xs)) * 2 + 0.4) / 2
    y0, y1 = math.floor(math.log10(min(ys)) * 2) / 2, math.log10(max(ys)) + 0.12

    def at(intensity: float, rate: float) -> tuple[float, float]:
        x = left + (math.log10(intensity) - x0) / (x1 - x0) * (right - left)
        return x, bottom - (math.log10(rate) - y0) / (y1 - y0) * (bottom - top)

    parts = []
    for exponent in range(math.ceil(x0), math.floor(x1) + 1):
        x, _ = at(10.0**exponent, peak)
        parts += [_line(x, top, x, bottom, "#e4e7eb"), _text(x, bottom + 15, f"{10.0**exponent:g}", "middle", 10, fill=GREY)]
    for exponent in range(math.ceil(y0), math.floor(y1) + 1):
        _, y = at(ridge, 10.0**exponent)
        shown = f"{10.0**exponent / 1e12:g} TFLOP/s"
        parts += [_line(left, y, right, y, "#e4e7eb"), _text(left - 4, y + 4, shown, "end", 9.5, fill=GREY)]
    start = max(x0, y0 - math.log10(bandwidth))
    corner, begin, end = at(ridge, peak), at(10**start, 10**start * bandwidth), at(10**x1, peak)
    parts += [_line(*begin, *corner, "#c0392b", 1.6), _line(*corner, *end, "#c0392b", 1.6)]
    parts.append(_text(end[0], end[1] - 6, f"{peak / 1e12:.3g} TFLOP/s measured", "end", 10, fill="#c0392b"))
    parts.append(_text(begin[0] + 22, begin[1] + 4, f"{bandwidth / 1e9:.3g} GB/s measured", size=10, fill="#c0392b"))
    for point in points:
        x, y = at(point.intensity, point.rate)
        look = f'fill="{point.colour}" fill-opacity="0.8" stroke="white" stroke-width="0.7"'
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {look}><title>{escape(point.hint)}</title></circle>')
    axis = "FLOPs of the convolutions for each byte that the step moves by the model of traffic"
    return _svg(WIDTH, bottom + 36, [*parts, _text(left, bottom + 31, axis, size=10.5, fill=GREY)], "roofline")
