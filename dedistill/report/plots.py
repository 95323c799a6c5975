"""Line plots and heat maps as inline SVG: no plotting library, no script, legible in a light and in a dark page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# --- line plots as inline SVG ----------------------------------------------------------------------------------------


WIDTH, PLOT_HEIGHT = 380, 190
LEFT, RIGHT, BOTTOM = 76, 8, 46
TEXT = 12  # pixels at the plot's own width
CROWDED = 40  # places on the horizontal axis beyond which lines have no markers, and round numbers below
CHARACTER = 6.4  # average width of one character of that size: there is no font to measure with here

# Darkened Okabe-Ito colours: distinct under the common colour blindnesses and at least 3:1 on white. The page's
# style sheet lightens them in the dark by class (s0, s1, ...); these are what a page without that style sheet shows.
COLOURS = ("#0072b2", "#d55e00", "#00855f", "#b5528c", "#a66f00", "#5b6068")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "12 3")
# Outlines around (0, 0): colour must never be the only thing that tells two lines apart.
MARKERS = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",
    "M-3.3-3.3h6.6v6.6h-6.6z",
    "M0-4.4L4.2 3.4H-4.2z",
    "M0-4.8L4.8 0L0 4.8L-4.8 0z",
    "M-4.2-3.4H4.2L0 4.4z",
    "M-1.4-4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",
)

Points = Sequence[tuple[float, ...]]
"""(x, y) each, or (x, y, low, high) with an interval around y."""


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels; ``start`` and ``end`` are the pixels of ``low`` and ``high``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def line_plot(
    series: Mapping[str, Points],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    round_x: bool = False,
) -> str:
    """One line per series as an ``<svg>`` string; hovering over a point tells its value.

    Points whose value or interval is missing, not finite, or (with ``log_y``) not positive are left out. A series
    without points draws nothing but keeps its colour, so several plots of the same candidates agree; a single one of the
    plot's own name needs no legend. ``y_range`` widens the vertical axis to cover at least this range, which makes plots
    comparable. ``marks`` are (x, what happened there). Ticks of the horizontal axis are the places there are, while these
    are few; with ``round_x``, for places that were measured, always round numbers.
    """
    clean = {name: _drawable(points, log_y) for name, points in series.items()}
    values = [y for points in clean.values() for _, *numbers in points for y in numbers]
    values += [edge for edge in y_range or () if edge > 0 or not log_y]
    scales = sorted({x for points in clean.values() for x, *_ in points})
    crowded = len(scales) > CROWDED
    legend = _legend_places([name for name in clean if clean[name] and [*clean] != [title]])
    top = 34 + 20 * (1 + max((row for _, row in legend.values()), default=0)) if legend else 34
    height = top + PLOT_HEIGHT + BOTTOM
    parts = [
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(f"{title}: {ylabel} over {xlabel}")}" font-family="system-ui, sans-serif" font-size="{TEXT}">',
        f'<text class="plot-title" x="0" y="15" font-size="14" font-weight="600" fill="currentColor">{escape(title)}</text>',
    ]
    if not values or not scales:
        parts.append(f'<text x="{WIDTH / 2}" y="{height / 2}" text-anchor="middle" fill="currentColor">no values</text></svg>')
        return "\n".join(parts)

    low, high, ticks = _log_ticks(min(values), max(values)) if log_y else round_ticks(min(values), max(values))
    y = _Axis(low, high, top + PLOT_HEIGHT, top, log_y)
    first, last = min([*scales, *(at for at, _ in marks)]), max([*scales, *(at for at, _ in marks)])
    x_pad = (last - first) * 0.03 or 0.5
    x = _Axis(first - x_pad, last + x_pad, LEFT, WIDTH - RIGHT)
    places = [tick for tick in round_ticks(first, last, 6)[2] if first - x_pad <= tick <= last + x_pad]
    places = places if crowded or round_x else scales
    parts += _frame(x, y, places, ticks, xlabel, f"{ylabel} (log scale)" if log_y else ylabel)
    for at, what in marks:
        parts.append(
            f'<g class="mark" stroke="#b3420a"><title>{escape(what)}</title>'
            f'<path d="M{x(at):.1f} {y.end}V{y.start}" stroke-dasharray="2 3"/></g>'
        )
    for i, (name, points) in enumerate(clean.items()):
        if points:
            parts += _series(i, name, points, x, y, legend.get(name), xlabel, crowded)
    parts.append("</svg>")
    return "\n".join(parts)


def _drawable(points: Points, log_y: bool) -> list[tuple[float, ...]]:
    """The points that have a place on the axes, from left to right."""

    def fits(x: float, *ys: float | None) -> bool:
        return math.isfinite(x) and all(y is not None and math.isfinite(y) and (y > 0 or not log_y) for y in ys)

    return sorted(point for point in points if fits(*point))


def _legend_places(names: list[str]) -> dict[str, tuple[float, int]]:
    """Where each legend entry goes: its left edge and its row; entries that do not fit start a new row."""
    places: dict[str, tuple[float, int]] = {}
    left, row = 0.0, 0
    for name in names:
        width = 34 + len(_shortened(name)) * CHARACTER
        if left and left + width > WIDTH:
            left, row = 0.0, row + 1
        places[name] = left, row
        left += width + 16
    return places


def _shortened(name: str) -> str:
    """A name that fits into one row of the legend."""
    most = int((WIDTH - 34) / CHARACTER)
    return name if len(name) <= most else name[: most - 1] + "…"


def _frame(x: _Axis, y: _Axis, scales: list[float], ticks: list[float], xlabel: str, ylabel: str) -> list[str]:
    """Horizontal grid lines, tick labels and axis labels."""
    parts = ['<g class="frame" fill="currentColor" stroke="none">']
    for tick, text in zip(ticks, _tick_texts(ticks, y.log)):
        at = y(tick)
        parts.append(
            f'<path class="grid" d="M{x.start} {at:.1f}H{x.end}" stroke="currentColor" stroke-opacity=".16" fill="none"/>'
            f'<text x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
        )
    free_from = -math.inf
    for scale in scales:
        at, label = x(scale), tick_label(scale)
        parts.append(f'<path d="M{at:.1f} {y.start}v4" stroke="currentColor" stroke-opacity=".5" fill="none"/>')
        half = len(label) * CHARACTER / 2 + 3
        if at - half > free_from:  # the tick stays, its number goes where two would overlap
            parts.append(f'<text x="{at:.1f}" y="{y.start + 18}" text-anchor="middle">{label}</text>')
            free_from = at + half
    middle = (y.start + y.end) / 2
    parts += [
        f'<text class="axis" x="{(x.start + x.end) / 2}" y="{y.start + 38}" text-anchor="middle">{escape(xlabel)}</text>',
        f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>',
        "</g>",
    ]
    return parts


def _series(
    i: int, name: str, points: Points, x: _Axis, y: _Axis, place: tuple[float, int] | None, xlabel: str, crowded: bool
) -> list[str]:
    """The line, its points with their values as tooltips, and its legend entry at ``place`` (together: hovering finds all)."""
    shift = i // len(COLOURS)  # a seventh line has the first one's colour, but not its dashes and marker
    colour, dash = COLOURS[i % len(COLOURS)], DASHES[(i + shift) % len(DASHES)]
    marker = f'<path class="marker" d="{MARKERS[(i + shift) % len(MARKERS)]}" stroke="none"/>'
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'fill="none" stroke-width="2" stroke-linejoin="round"{dashes}'
    at = [(x(px), y(py), px, py) for px, py, *_ in points]
    spans = [(x(px), *map(y, span)) for px, _, *span in points if span]
    path = " ".join(f"{ax:.1f},{ay:.1f}" for ax, ay, _, _ in at)
    parts = [f'<g class="series s{i % len(COLOURS)}" fill="{colour}" stroke="{colour}">', f'<polyline points="{path}" {line}/>']
    if place:
        left, baseline = place[0], 37 + 20 * place[1]
        parts.append(
            f'<g class="legend"><path d="M{left:.0f} {baseline - 4}h28" {line}/>'
            f'<g transform="translate({left + 14:.0f} {baseline - 4})">{marker}</g>'
            f'<text x="{left + 35:.0f}" y="{baseline}" fill="currentColor" stroke="none">{escape(_shortened(name))}</text></g>'
        )
    for ax, low, high in spans:
        parts.append(f'<path class="span" d="M{ax:.1f} {low:.1f}V{high:.1f}" fill="none" stroke-opacity=".5"/>')
    for ax, ay, px, py in at:
        parts.append(
            f'<g class="point" transform="translate({ax:.1f} {ay:.1f})">'
            f"<title>{escape(name)}, {escape(xlabel)} {tick_label(px)}: {value_label(py)}</title>"
            f'<circle class="hit" r="9" fill="transparent" stroke="none"/>{"" if crowded else marker}</g>'
        )
    parts.append("</g>")
    return parts


def tick_label(value: float) -> str:
    """A number as an axis or a heading shows it: 1, 1.5, 0.25."""
    return f"{round(value, 9):g}"


def _tick_texts(ticks: list[float], log: bool) -> list[str]:
    """Tick labels with as many decimals as the finest tick needs: 0.50 below 0.75, not 0.5."""
    plain = [tick_label(tick) for tick in ticks]
    if log or any("e" in text for text in plain):
        return plain
    places = max(len(text.partition(".")[2]) for text in plain)
    return [f"{tick:.{places}f}" if text != "0" else "0" for tick, text in zip(ticks, plain)]


def value_label(value: float) -> str:
    """A number as a caption shows it: three or more significant digits, no exponent for everyday sizes."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def round_ticks(low: float, high: float, wanted: int = 4) -> tuple[float, float, list[float]]:
    """Round tick values around ``low`` .. ``high``; the axis starts at zero when the values reach near it."""
    if 0 <= low < 0.35 * high:
        low = 0.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [k * step for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> tuple[float, float, list[float]]:
    """Ticks at 1, 2 and 5 times powers of ten, or at the powers alone when there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**k for k in range(first, last + 1) for factor in factors]
        below, above = [t for t in ticks if t <= low * 1.0001], [t for t in ticks if t >= high * 0.9999]
        ticks = [t for t in ticks if below[-1] <= t <= above[0]]
        if len(ticks) <= 7:
            break
    if len(ticks) == 1:
        ticks = [ticks[0], ticks[0] * 10]
    return ticks[0], ticks[-1], ticks


# --- heat maps as inline SVG, in one hue -----------------------------------------------------------------------------


ROW, TOP, HEAT_BOTTOM = 24, 40, 46
FAINTEST = 0.06
SHADES = 12


def heat_map(
    at: Sequence[float], rows: Mapping[str, Sequence[float | None]], *, title: str, xlabel: str, ylabel: str, unit: str
) -> str:
    """One line of cells per row as an ``<svg>`` string, a cell per place of ``at``; hovering over a cell tells its value.

    at: rising, evenly spread. rows: label -> values, the first at the bottom; None leaves a gap. unit: what the values
    are, all above 0; equal ratios are equal steps in fullness.
    """
    known = [value for values in rows.values() for value in values if value is not None]
    low, high = min(known), max(known)
    left = 22 + max(len(label) for label in rows) * CHARACTER + 8
    cell, bottom = (WIDTH - left) / len(at), TOP + ROW * len(rows)
    parts = [
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + HEAT_BOTTOM}" role="img" '
        f'aria-label="{escape(f"{title}: {unit} by {ylabel} over {xlabel}")}" '
        f'font-family="system-ui, sans-serif" font-size="{TEXT}">',
        f'<text class="plot-title" x="0" y="15" font-size="14" font-weight="600" fill="currentColor">{escape(title)}</text>',
        *_shades(low, high),
        f'<g class="heat s0" fill="{COLOURS[0]}" style="stroke: none">',
    ]
    for r, (label, values) in enumerate(rows.items()):
        top = bottom - ROW * (r + 1)
        for c, (place, value) in enumerate(zip(at, values)):
            if value is not None:
                what = f"{label}, {xlabel} {tick_label(place)}: {value_label(value)}"
                parts.append(
                    f'<rect x="{left + c * cell:.1f}" y="{top + 1}" width="{cell + 0.2:.1f}" height="{ROW - 2}" '
                    f'fill-opacity="{_opacity(value, low, high)}"><title>{escape(what)}</title></rect>'
                )
    parts += ["</g>", '<g class="frame" fill="currentColor">']
    for r, label in enumerate(rows):
        parts.append(f'<text x="{left - 8:.1f}" y="{bottom - ROW * r - 8}" text-anchor="end">{escape(label)}</text>')
    per_cell = (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else 1.0
    for tick in round_ticks(at[0], at[-1])[2] if len(at) > 1 else at:
        x = left + (0.5 + (tick - at[0]) / per_cell) * cell
        if left <= x <= WIDTH:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick_label(tick)}</text>')
    middle = (TOP + bottom) / 2
    parts += [
        f'<text x="{(left + WIDTH) / 2:.1f}" y="{bottom + 38}" text-anchor="middle">{escape(xlabel)}</text>',
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>',
        "</g></svg>",
    ]
    return "\n".join(parts)


def _opacity(value: float, low: float, high: float) -> str:
    share = math.log(value / low) / math.log(high / low) if high > low else 0.5
    return f"{FAINTEST + (1 - FAINTEST) * share:.2f}"


def _shades(low: float, high: float) -> list[str]:
    """The scale of colours, at the top right."""
    most = value_label(high)
    start = WIDTH - len(most) * CHARACTER - 6 - 7 * SHADES
    parts = [f'<g class="heat s0" fill="{COLOURS[0]}" style="stroke: none">']
    for i in range(SHADES):
        opacity = f"{FAINTEST + (1 - FAINTEST) * i / (SHADES - 1):.2f}"
        parts.append(f'<rect x="{start + 7 * i:.1f}" y="4" width="7.2" height="13" fill-opacity="{opacity}"/>')
    parts += ["</g>", '<g class="frame" fill="currentColor">']
    parts.append(f'<text x="{start - 6:.1f}" y="15" text-anchor="end">{value_label(low)}</text>')
    parts.append(f'<text x="{WIDTH}" y="15" text-anchor="end">{most}</text></g>')
    return parts
