"""Line and bar charts as SVG text that takes its colours from the page it is put into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 24


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart. `style` is a CSS class of the page: `raw`, `smooth` or `points`."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, unbiased at the start; what is not finite is passed over."""
    keep, total, weight, averages = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averages.append(total / weight if weight else math.nan)
    return averages


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round numbers between `low` and `high`."""
    rough = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Logarithms of round numbers: powers of ten, with 2 and 5 between them where there is room."""
    digits = (1, 2, 5) if high - low < 2 else (1,)
    marks = [power + math.log10(digit) for power in range(math.floor(low), math.ceil(high)) for digit in digits]
    return [mark for mark in marks if low <= mark <= high]


def line_chart(
    title: str, lines: Sequence[Line], *, bounds: tuple[float, float] | None = None, log: bool = False, over: str = "steps"
) -> Markup:
    """A chart of `lines` over steps, or whatever `over` names (steps are whole numbers).

    `bounds` fixes the vertical axis, otherwise it holds the data; `log` makes it logarithmic.
    """
    told = "; ".join(f"{line.name} from {line.ys[0]:.3g} to {line.ys[-1]:.3g}" for line in lines if len(line.ys))
    if log:
        lines = [dataclasses.replace(line, ys=[math.log10(v) if v > 0 else math.nan for v in line.ys]) for line in lines]
    xs = np.concatenate([np.asarray(line.xs, float) for line in lines])
    ys = np.concatenate([np.asarray(line.ys, float) for line in lines])
    ys = ys[np.isfinite(ys)]
    if not len(ys):
        return Markup('<p class="quiet">no numbers</p>')
    low, high = bounds or (float(ys.min()), float(ys.max()))
    if bounds is None:
        pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    first, last = float(xs.min()), float(xs.max())
    last = last if last > first else first + 1
    whole = over == "steps"
    form = ".0f" if whole else ".4g"

    def x(value: float) -> float:
        return _LEFT + (value - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in _decades(low, high) if log else ticks(low, high):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{10**tick if log else tick:.4g}</text>')
    for tick in ticks(first, last, 6):
        if tick == int(tick) or not whole:
            parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:{form}}</text>')
    for line in lines:
        points = [(x(a), y(b)) for a, b in zip(line.xs, line.ys, strict=True) if math.isfinite(b)]
        if line.style == "points" or len(points) == 1:
            parts += [f'<circle class="{line.style}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
    label = escape(f"{title} over {over} {first:{form}} to {last:{form}}: {told}")
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def histogram(title: str, values: np.ndarray, *, edges: Sequence[float] = (), bins: int = 40) -> Markup:
    """How often values of a size occur, zero at the left; `edges` are marked, such as the lengths of the buckets."""
    if not len(values):
        return Markup('<p class="quiet">no numbers</p>')
    last = max(float(np.max(values)), *edges, 1.0)
    counts, bounds = np.histogram(values, bins=bins, range=(0.0, last))

    def x(value: float) -> float:
        return _LEFT + value / last * (_WIDTH - _LEFT - _RIGHT)

    def y(count: float) -> float:
        return _HEIGHT - _BOTTOM - count / counts.max() * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks(0, float(counts.max())):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(0, last, 6):
        parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:.4g}</text>')
    for count, begin, end in zip(counts, bounds[:-1], bounds[1:], strict=True):
        box = f'x="{x(begin):.1f}" y="{y(count):.1f}" width="{x(end) - x(begin):.1f}" height="{_HEIGHT - _BOTTOM - y(count):.1f}"'
        parts.append(f'<rect class="bar" {box}/>')
    parts += [f'<line class="edge" x1="{x(edge):.1f}" x2="{x(edge):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>' for edge in edges]
    told = f"{title}: {len(values)} samples from {np.min(values):.4g} to {np.max(values):.4g}, median {np.median(values):.4g}"
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>')
