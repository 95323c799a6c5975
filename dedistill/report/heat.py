"""Heat maps as inline SVG, in one hue: fuller is more, in a light and in a dark page."""

import math
from collections.abc import Sequence
from html import escape

from dedistill.report.plots import CHARACTER, COLOURS, TEXT, WIDTH, round_ticks, tick_label, value_label

ROW, TOP, BOTTOM = 24, 40, 46
FAINTEST = 0.06
SHADES = 12


def heat_map(
    at: Sequence[float], rows: dict[str, Sequence[float | None]], *, title: str, xlabel: str, ylabel: str, unit: str
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
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" '
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
