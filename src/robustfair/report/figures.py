"""Figures of the report: data in, SVG out, as markup that a template prints. Nothing is read, written or fetched.

Colours and fonts are classes that `templates/report.css` fills in, so that a figure follows the reader's light or dark
scheme. A figure is drawn about as wide as a telephone and may be shown somewhat larger: its text is readable on both.
Rates are fractions and are printed as percent; nan is left out. Every text is escaped, by `svg.element`. No plotting
library is needed: every report has all its figures, with a tooltip at each point and words for a screen reader.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from markupsafe import Markup

from robustfair.report import svg
from robustfair.report.words import NO_IMAGES, percent, short_names

HEAT_STEPS = 9
"""Shades of the confusion heat map; class `hN` of the style sheet, N from 0 (no error) to this."""

Look = Literal["plain", "faint", "worst"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One measured rate with its interval, all fractions.

    Attributes:
        rate, lower, upper: nan for a class without images.
        look: "plain" for an attack, "faint" for clean images, "worst" for the worst class.
        before: drawn hollow, as the state before a repair.
    """

    rate: float
    lower: float
    upper: float
    look: Look = "plain"
    before: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart: `y` has a value for each x, None or nan where there is none.

    Attributes:
        look: "plain" and "worst" are drawn strong, "faint" is background.
        dashed: to tell two lines of one look apart without colour.
        labelled: whether its name is written at its end.
    """

    name: str
    y: Sequence[float | None]
    look: Look = "plain"
    dashed: bool = False
    labelled: bool = True


def bars(items: Sequence[Bar]) -> Markup:
    """Horizontal bars on a scale from 0 to 100 percent, one under the other, with the interval as a whisker.

    The drawing stretches to the width it is given. It carries no text: the numbers are beside it.
    """
    height = 12 * len(items)
    parts = [svg.line(tick, 0, tick, height, "grid") for tick in (0, 25, 50, 75, 100)]
    for row, item in enumerate(items):
        if math.isnan(item.rate):
            continue
        middle = 12 * row + 6
        kind = f"bar {item.look}{' before' if item.before else ''}"
        parts.append(svg.box(0, middle - 4, 100 * item.rate, 8, kind))
        low, high = 100 * item.lower, 100 * item.upper
        for stroke in ("halo", "whisker"):
            parts.append(svg.line(low, middle, high, middle, stroke))
            parts += [svg.line(end, middle - 3, end, middle + 3, stroke) for end in (low, high)]
    return svg.drawing(100, height, parts, "bars", stretch=True)


def rug(rates: Sequence[float], *, average: float, worst: Sequence[int], label: str) -> Markup:
    """All class accuracies (C,) as ticks on one scale from 0 to 100 percent, the worst tall, the average as a wedge."""
    parts = [svg.line(0, 22, 100, 22, "axis")]
    for index, rate in enumerate(rates):
        if not math.isnan(rate) and index not in worst:
            parts.append(svg.line(100 * rate, 10, 100 * rate, 22, "tick"))
    if not math.isnan(average):
        parts.append(svg.line(100 * average, 2, 100 * average, 22, "tick average"))
    if worst:
        parts.append(svg.line(100 * rates[worst[0]], 2, 100 * rates[worst[0]], 22, "tick worst"))
    return svg.drawing(100, 24, parts, "rug", stretch=True, label=label)


def heat_map(
    counts_pred_true: Sequence[Sequence[int]],
    names: Sequence[str],
    *,
    top: float | None = None,
    classes: Sequence[int] | None = None,
) -> Markup:
    """Confusion counts (C, C), rows predicted, columns true, as shares of each true class.

    Shades show errors only, on a scale that ends at `top` (default: the largest error), so that a high diagonal does
    not drown them; the diagonal is outlined. Shares are printed in the cells for up to 20 classes, and in all tooltips.
    `classes` are those that are drawn, all if None; shares are of all images of a class either way.

    Returns:
        two drawings in one element: the names of the rows, and the cells, which scroll sideways where they must.
    """
    drawn = range(len(names)) if classes is None else classes
    size = len(drawn)
    wide, high = _cell(size)
    texts = size <= 20
    columns = [sum(row[true] for row in counts_pred_true) for true in range(len(names))]
    top = largest_error(counts_pred_true) if top is None else top
    every_name = short_names(names, 16)
    shown = [every_name[index] for index in drawn]
    font = 12.0 if texts else 9.5
    longest = max(_width(name, font) for name in shown)
    upright = longest > wide - 6
    head = 30 + (longest * (0.72 if texts else 1.0) if upright else 16)
    gutter = max(longest, _width("predicted", 12)) + 8
    rows = [svg.text(gutter - 8, head - 8, "predicted", "axis-title", anchor="end")]
    cells = [svg.text(0, 12, "true", "axis-title")]
    for index, name in enumerate(shown):
        tip = svg.tip(names[drawn[index]])
        middle = head + (index + 0.5) * high + font * 0.35
        rows.append(svg.text(gutter - 8, middle, name, "name", anchor="end", tip=tip, size=font))
        x = (index + 0.5) * wide
        if not upright:
            cells.append(svg.text(x, head - 8, name, "name", anchor="middle", tip=tip, size=font))
        else:
            angle = -45 if texts else -90
            x += 2 if texts else font * 0.35
            cells.append(svg.text(x, head - 6, name, "name", tip=tip, size=font, degrees=angle))
    for column, true in enumerate(drawn):
        for row, pred in enumerate(drawn):
            count, n = counts_pred_true[pred][true], columns[true]
            diagonal = pred == true
            if not count and not diagonal:
                continue
            share = count / n if n else math.nan
            kind = "diagonal" if diagonal else f"h{shade(share, top)}"
            x, y = column * wide, head + row * high
            tip = svg.tip(_cell_words(names, pred, true, count, n))
            inset = 1.5 if diagonal and texts else 0.5
            box = svg.box(x + inset, y + inset, wide - 2 * inset, high - 2 * inset)
            value = Markup()
            if texts and n:
                value = svg.text(x + wide / 2, y + high / 2 + 4, percent(share), "value", anchor="middle", size=12)
            cells.append(svg.element("g", kind, tip, box, value))
    bottom = head + size * high
    frame = svg.box(0.5, head, size * wide - 1, size * high, "frame")
    overhang = longest * 0.72 if upright and texts else 0
    label = (
        f"Confusion heat map of {size} classes, rows predicted, columns true. "
        f"The largest error is {percent(largest_error(counts_pred_true))} percent of a class."
    )
    left = svg.drawing(gutter, bottom + 1, rows, "heat-rows", fixed=True, label="Predicted classes")
    right = svg.drawing(
        size * wide + max(1, overhang), bottom + 1, [frame, *cells], "heat-cells", fixed=True, label=label
    )
    return svg.beside(left, right, label)


def rate_map(
    rates: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    scale: tuple[float, float],
    tips: Sequence[Sequence[str]],
    apart: tuple[int, int] = (0, 0),
    label: str,
) -> Markup:
    """Rates (R, K) as percent in cells, the darker the lower.

    Args:
        scale: the rates at which shades begin and end, the higher first.
        tips: (R, K) words of the tooltips.
        apart: how many of the last rows and columns are set apart from the others.

    Returns:
        two drawings in one element: the names of the rows, and the cells, which scroll sideways where they must.
    """
    wide, high, gap, head = 46.0, 26.0, 8.0, 22.0
    across = [k * wide + gap * (k >= len(columns) - apart[1]) for k in range(len(columns))]
    down = [head + r * high + gap * (r >= len(rows) - apart[0]) for r in range(len(rows))]
    shown = short_names(rows, 24)
    gutter = max(_width(name, 12) for name in shown) + 8
    names = [
        svg.text(gutter - 8, y + high / 2 + 4, name, "name", anchor="end", tip=svg.tip(full), size=12)
        for y, name, full in zip(down, shown, rows, strict=True)
    ]
    cells = [
        svg.text(x + wide / 2, head - 8, column, "name", anchor="middle", size=12)
        for x, column in zip(across, columns, strict=True)
    ]
    for y, line, words in zip(down, rates, tips, strict=True):
        for x, rate, tip in zip(across, line, words, strict=True):
            if not math.isnan(rate):
                box = svg.box(x + 0.5, y + 0.5, wide - 1, high - 1)
                value = svg.text(x + wide / 2, y + high / 2 + 4, percent(rate), "value", anchor="middle", size=12)
                kind = f"h{shade(scale[0] - rate, scale[0] - scale[1])}"
                cells.append(svg.element("g", kind, svg.tip(tip), box, value))
    bottom = down[-1] + high + 1
    left = svg.drawing(gutter, bottom, names, "heat-rows", fixed=True, label="Rows")
    right = svg.drawing(across[-1] + wide, bottom, cells, "heat-cells", fixed=True, label=label)
    return svg.beside(left, right, label)


def largest_error(counts_pred_true: Sequence[Sequence[int]]) -> float:
    """Largest share of a true class that is predicted as one other class; 0 without errors.

    >>> largest_error([[3, 1], [1, 0]])
    1.0
    """
    size = len(counts_pred_true)
    columns = [sum(row[true] for row in counts_pred_true) for true in range(size)]
    shares = [
        counts_pred_true[pred][true] / columns[true]
        for true in range(size)
        for pred in range(size)
        if pred != true and columns[true]
    ]
    return max(shares, default=0.0)


def shade(share: float, top: float) -> int:
    """Step of the colour scale for an error share: 0 for none, 1 to HEAT_STEPS in equal parts of `top`.

    >>> shade(0.0, 0.4), shade(0.001, 0.4), shade(0.2, 0.4), shade(0.4, 0.4)
    (0, 1, 5, 9)
    """
    if not share > 0 or top <= 0:
        return 0
    return min(HEAT_STEPS, max(1, math.ceil(share / top * HEAT_STEPS)))


def scatter(
    x: Sequence[float], y: Sequence[float], names: Sequence[str], *, worst: Sequence[int], x_label: str, y_label: str
) -> Markup:
    """Points (C,) against a rate (C,), each with the name of its class where there is space and they are at most 20.

    Of more classes only the three lowest and the three highest are named; every point has a tooltip.
    """
    present = [i for i in range(len(names)) if not (math.isnan(x[i]) or math.isnan(y[i]))]
    width, height, left, right, top, bottom = 360.0, 270.0, 38.0, 12.0, 26.0, 42.0
    x_ticks = _ticks(*_domain([x[i] for i in present]))
    y_ticks = [t for t in _ticks(*_domain([y[i] for i in present], least=0.1)) if -1e-9 <= t <= 1 + 1e-9]
    across = _Scale(x_ticks[0], x_ticks[-1], left + 6, width - right)
    up = _Scale(y_ticks[0], y_ticks[-1], height - bottom, top + 4)
    parts = _frame(x_ticks, y_ticks, across, up, left, width - right, height - bottom, share=True)
    parts.append(svg.text(0, 12, y_label, "axis-title"))
    parts.append(svg.text(width - right, height - 6, x_label, "axis-title", anchor="end"))
    by_height = sorted(present, key=lambda i: y[i])
    named = set(present if len(present) <= 20 else by_height[:3] + by_height[-3:])
    shown = short_names(names, 14)
    taken = [(across(x[i]) - 4, up(y[i]) - 4, across(x[i]) + 4, up(y[i]) + 4) for i in present]
    for i in sorted(present, key=lambda i: i not in worst):
        a, b = across(x[i]), up(y[i])
        tip = svg.tip(f"{names[i]}: {x_label} {_value(x[i])}, {y_label} {percent(y[i])}")
        kind = "point worst" if i in worst else "point"
        parts.append(svg.dot(a, b, 4, kind, tip))
        if i in named:
            text = shown[i]
            place = _free_place(a, b, _width(text, 11), taken, (left, top, width, height - bottom))
            if place is not None:
                taken.append(place)
                parts.append(svg.text(place[0], place[3] - 3, text, "name worst" if i in worst else "name", size=11))
    label = f"{y_label} against {x_label} for {len(present)} classes"
    return svg.drawing(width, height, parts, "chart", label=label)


def line_chart(x: Sequence[float], curves: Sequence[Curve], *, title: str, share: bool) -> Markup:
    """Curves over epochs, each with its name at its end. With `share` the values are fractions, printed as percent."""
    width, height, left, top, bottom = 360.0, 210.0, 44.0, 28.0, 30.0
    strong = [c for c in curves if c.labelled]
    short = dict(zip((c.name for c in curves), short_names([c.name for c in curves], 16), strict=True))
    margin = min(110.0, max((_width(short[c.name], 11) for c in strong), default=0.0) + 10)
    values = [v for c in curves for v in c.y if _is_number(v)]
    low, high = _domain(values, least=0.1 if share else 0.0)
    y_ticks = _ticks(max(0.0, low) if min(values, default=0.0) >= 0 else low, high)
    if share:
        y_ticks = [t for t in y_ticks if -1e-9 <= t <= 1 + 1e-9]
    x_low, x_high = (min(x), max(x)) if len(x) else (0, 1)
    across = _Scale(x_low, x_high, left + 4, width - margin)
    up = _Scale(y_ticks[0], y_ticks[-1], height - bottom, top + 4)
    x_ticks = [t for t in _ticks(x_low, x_high, 5) if x_low <= t <= x_high and float(t).is_integer()] or [x_low]
    parts = _frame(x_ticks, y_ticks, across, up, left, width - margin, height - bottom, share=share)
    parts.append(svg.text(0, 13, title, "chart-title"))
    parts.append(svg.text(width - margin, height - 2, "epoch", "axis-title", anchor="end"))
    ends = []
    for curve in sorted(curves, key=lambda c: (c.labelled, c.look != "faint")):
        points = [(across(a), up(v)) for a, v in zip(x, curve.y, strict=True) if _is_number(v)]
        if not points:
            continue
        kind = f"curve {curve.look}{' dashed' if curve.dashed else ''}"
        tip = svg.tip(f"{curve.name}: {_words(curve, share)}")
        if len(points) == 1:
            parts.append(svg.dot(*points[0], 3, f"point {curve.look}", tip))
        else:
            path = " ".join(f"{svg.number(a)},{svg.number(b)}" for a, b in points)
            parts.append(svg.element("polyline", kind, tip, points=path))
        if curve.labelled:
            ends.append((points[-1][1], curve))
    for place, (_, curve) in zip(_spread([y for y, _ in ends], 12, top, height - bottom), ends, strict=True):
        parts.append(
            svg.text(
                width - margin + 6, place + 4, short[curve.name], f"name {curve.look}", tip=svg.tip(curve.name), size=11
            )
        )
    words = "; ".join(f"{c.name} {_words(c, share)}" for c in strong or curves)
    return svg.drawing(width, height, parts, "chart", label=f"{title} over {len(x)} epochs. {words}")


# Parts


@dataclass(frozen=True)
class _Scale:
    """Linear map of [low, high] onto [start, end]; a range without extent maps to the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _frame(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    across: _Scale,
    up: _Scale,
    left: float,
    right: float,
    base: float,
    *,
    share: bool,
) -> list[Markup]:
    """Grid lines and tick labels of a chart."""
    parts = []
    for tick in y_ticks:
        parts.append(svg.line(left, up(tick), right, up(tick), "grid"))
        text = f"{100 * tick:g}" if share else _value(tick)
        parts.append(svg.text(left - 6, up(tick) + 4, text, "tick-label", anchor="end"))
    for tick in x_ticks:
        parts.append(svg.text(across(tick), base + 15, _value(tick), "tick-label", anchor="middle"))
    return parts


def _cell(size: int) -> tuple[float, float]:
    """Width and height of a heat map cell, in pixels."""
    if size <= 4:
        return 84, 52
    if size <= 10:
        return 54, 36
    return (44, 30) if size <= 20 else (12, 12)


def _cell_words(names: Sequence[str], pred: int, true: int, count: int, n: int) -> str:
    if pred == true:
        return f"{names[true]}: " + (f"right {percent(count / n)} % ({count} of {n})" if n else NO_IMAGES)
    return f"true {names[true]}, predicted {names[pred]}: {percent(count / n)} % ({count} of {n})"


def _free_place(
    x: float,
    y: float,
    width: float,
    taken: Sequence[tuple[float, float, float, float]],
    inside: tuple[float, float, float, float],
) -> tuple[float, float, float, float] | None:
    """Box (left, top, right, bottom) beside (x, y) for a label 14 high that covers nothing; None if there is none."""
    for left, top in (
        (x + 7, y - 7),
        (x - 7 - width, y - 7),
        (x - width / 2, y - 20),
        (x - width / 2, y + 6),
        (x + 6, y - 16),
        (x + 6, y + 2),
        (x - 6 - width, y - 16),
        (x - 6 - width, y + 2),
    ):
        box = (left, top, left + width, top + 14)
        fits = box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
        if fits and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            return box
    return None


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near the `wanted` ones, at least `gap` apart and, where they all fit, within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _domain(values: Sequence[float], least: float = 0.0) -> tuple[float, float]:
    """The range of the values with some air, at least `least` wide; around a lone value, a range that contains it."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    air = (high - low) * 0.05 if high - low > max(1e-6 * size, 1e-9) else size * 0.1 if size > 1e-9 else 0.5
    air = max(air, (least - (high - low)) / 2)
    return low - air, high + air


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span [low, high].

    >>> _ticks(0.13, 0.92)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _words(curve: Curve, share: bool) -> str:
    values = [v for v in curve.y if _is_number(v)]
    if not values:
        return "without values"
    first, last = (percent(v) + " %" if share else _value(v) for v in (values[0], values[-1]))
    return f"{first} to {last}"


def _value(value: float) -> str:
    return f"{value:.4g}"


def _width(text: str, size: float) -> float:
    """A generous estimate of the width of `text` at a font size, in the same unit."""
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.6 for letter in text)
