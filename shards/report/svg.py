"""Small charts as SVG text: lines with a band around them, and bars. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shards.diagnosis import number
from shards.report.points import Point
from shards.report.shell import escape

LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 12.0, 34.0
MARKERS = 60  # points of a line that are drawn as dots; above that the line alone is clearer


@dataclass(frozen=True)
class Series:
    """One line of a chart; `style` is its class in the style sheet. With `bars` the spread is drawn as error bars."""

    name: str
    style: str
    points: Sequence[Point]
    bars: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.first + (value - self.low) / span * (self.last - self.first)


def lines(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "iteration",
    width: int = 360,
    height: int = 210,
    zone: tuple[float, float] | None = None,
    include: Sequence[float] = (),
    whole_x: bool = True,
    style: str = "",
) -> str:
    """A line chart. `zone` shades a range of values, `include` widens the axis to certain values.

    Points that are not finite are left out. `label` is read out by screen readers. `whole_x`: ticks at integers only.
    `style` is the class of the picture.
    """
    series = [Series(one.name, one.style, [p for p in one.points if _finite(p)], one.bars) for one in series]
    points = [point for one in series for point in one.points]
    if not points:
        return '<p class="empty">nothing to show yet</p>'
    edges = [value for p in points for value in (p.y, p.low, p.high) if value is not None and math.isfinite(value)]
    ticks = nice_ticks([*edges, *include, *(zone or ())])
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    pad = 0.5 if x_low == x_high else 0.0
    x = Scale(x_low - pad, x_high + pad, LEFT + 8, width - RIGHT - 8)
    y = Scale(ticks[0], ticks[-1], height - BOTTOM, TOP)
    parts = [_zone(zone, y, width) if zone else "", _grid(ticks, y, width)]
    parts += [_x_axis(x_low, x_high, x, width, height, x_label, whole_x)]
    parts += [_band(one, x, y) for one in series if not one.bars]
    parts += [_line(one, x, y) for one in series]
    parts += [_hits(one, x, y, x_label) for one in series]
    return _svg(parts, width, height, label, style)


def histogram(counts: Sequence[int], edges: Sequence[float], *, style: str, label: str, width: int = 360) -> str:
    """Bars over the ranges between `edges` (one more than `counts`)."""
    height = 210
    if not sum(counts):
        return '<p class="empty">nothing to show yet</p>'
    ticks = nice_ticks([0.0, float(max(counts))])
    x, y = Scale(edges[0], edges[-1], LEFT, width - RIGHT), Scale(ticks[0], ticks[-1], height - BOTTOM, TOP)
    bars = []
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        tip = escape(f"{number(low)} to {number(high)}: {count} samples")
        left, top = x(low) + 1, y(count)
        bars.append(
            f'<rect class="bar {style}" x="{left:.1f}" y="{top:.1f}" width="{max(1.0, x(high) - left - 1):.1f}" '
            f'height="{max(0.0, y(0) - top):.1f}" rx="1.5" data-tip="{tip}"></rect>'
        )
    marks = [value for value in nice_ticks([edges[0], edges[-1]]) if edges[0] <= value <= edges[-1]]
    axis = "".join(_x_tick(x(value), height, number(value)) for value in marks)
    middle = (LEFT + width - RIGHT) / 2
    title = f'<text class="axis" x="{middle:.0f}" y="{height - 4}" text-anchor="middle">advantage</text>'
    return _svg([_grid(ticks, y, width), *bars, axis, title], width, height, label)


def legend(series: Sequence[Series]) -> str:
    """Names of the lines with their colours, as HTML."""
    items = "".join(f'<span class="key {one.style}">{escape(one.name)}</span>' for one in series if one.points)
    return f'<p class="legend">{items}</p>'


def nice_ticks(values: Sequence[float], count: int = 4) -> list[float]:
    """Round values that enclose all of `values`, about `count` steps of 1, 2, 2.5 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):  # one value only
        room = abs(low) * 0.5
        low, high = (low - room, high + room) if room else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _finite(point: Point) -> bool:
    return math.isfinite(point.x) and math.isfinite(point.y)


def _svg(parts: Sequence[str], width: int, height: int, label: str, style: str = "") -> str:
    body, kind = "".join(parts), f'class="{style}" ' if style else ""
    return f'<svg {kind}viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _zone(zone: tuple[float, float], y: Scale, width: int) -> str:
    top, bottom = y(zone[1]), y(zone[0])
    box = f'x="{LEFT}" y="{top:.1f}" width="{width - LEFT - RIGHT}" height="{bottom - top:.1f}"'
    return f'<rect class="zone" {box}></rect>'


def _grid(ticks: Sequence[float], y: Scale, width: int) -> str:
    rows = []
    for value in ticks:
        at = y(value)
        rows.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"></line>')
        rows.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    return "".join(rows)


def _x_axis(low: float, high: float, x: Scale, width: int, height: int, label: str, whole: bool) -> str:
    ticks = (
        [value for value in nice_ticks([low, high], 5) if low - 1e-9 <= value <= high + 1e-9] if high > low else [low]
    )
    if whole:
        ticks = sorted({float(round(value)) for value in ticks if abs(value - round(value)) < 1e-9}) or [low]
    marks = "".join(_x_tick(x(value), height, number(value)) for value in ticks)
    middle = (LEFT + width - RIGHT) / 2
    return f'{marks}<text class="axis" x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{escape(label)}</text>'


def _x_tick(at: float, height: int, text: str) -> str:
    return f'<text class="tick" x="{at:.1f}" y="{height - BOTTOM + 15:.1f}" text-anchor="middle">{text}</text>'


def _band(series: Series, x: Scale, y: Scale) -> str:
    points = [p for p in series.points if p.low is not None and p.high is not None]
    if len(points) == 1:
        return _error_bar(points[0], series.style, x, y)
    if not points:
        return ""
    upper = [f"{x(p.x):.1f},{y(p.high):.1f}" for p in points if p.high is not None]
    lower = [f"{x(p.x):.1f},{y(p.low):.1f}" for p in reversed(points) if p.low is not None]
    return f'<polygon class="band {series.style}" points="{" ".join(upper + lower)}"></polygon>'


def _error_bar(point: Point, style: str, x: Scale, y: Scale) -> str:
    if point.low is None or point.high is None:
        return ""
    at = f"{x(point.x):.1f}"
    return f'<line class="whisker {style}" x1="{at}" x2="{at}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"></line>'


def _line(series: Series, x: Scale, y: Scale) -> str:
    places = [f"{x(p.x):.1f},{y(p.y):.1f}" for p in series.points]
    line = f'<polyline class="line {series.style}" points="{" ".join(places)}"></polyline>' if len(places) > 1 else ""
    bars = "".join(_error_bar(p, series.style, x, y) for p in series.points) if series.bars else ""
    dots = ""
    if len(series.points) <= MARKERS:
        discs = [f'cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3.2"' for p in series.points]
        dots = "".join(f'<circle class="dot {series.style}" {disc}></circle>' for disc in discs)
    return bars + line + dots


def _hits(series: Series, x: Scale, y: Scale, x_label: str) -> str:
    """Invisible discs that carry the text a pointer over them shows."""
    found = []
    for p in series.points:
        spread = f", {number(p.low)} to {number(p.high)}" if p.low is not None and p.high is not None else ""
        tip = f"{series.name}, {p.note or f'{x_label} {number(p.x)}'}: {number(p.y, 4)}{spread}"
        circle = f'cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="9"'
        found.append(f'<circle class="hit" {circle} data-tip="{escape(tip)}"></circle>')
    return "".join(found)
