"""Forest plots as inline SVG: a row per comparison, its difference as a dot, its interval as a line."""

from collections.abc import Sequence
from html import escape
from math import copysign, sqrt
from typing import NamedTuple

ROW, TEXT, PLOT = 22, 12, 330
CHARACTER = 6.3
NONE, GOOD, BAD = "#6b7280", "#00855f", "#c2410c"
COLOURS = {"helps": GOOD, "hurts": BAD}


class Row(NamedTuple):
    """A comparison; without ``span`` it is a heading. verdict: a word, told beside the dot and by its colour."""

    label: str
    span: tuple[float, float, float] | None = None
    """(low, mean, high)"""
    verdict: str = ""


def forest_plot(rows: Sequence[Row], *, title: str, xlabel: str, paper: str | None = None) -> str:
    """An ``<svg>`` string. The axis has a square-root scale on both sides of zero: small effects show beside large ones.

    paper: background colour, for an image that stands alone; None: the page's own, and text in the page's own colour.
    """
    ink = "currentColor" if paper is None else "#1f2328"
    left = max(len(row.label) for row in rows) * CHARACTER + 14
    words = max(len(row.verdict) for row in rows) * CHARACTER + 16
    width, top = left + PLOT + words + 10, 44
    height = top + ROW * len(rows) + 48
    reach = max(abs(edge) for row in rows if row.span for edge in row.span)

    def x(value: float) -> float:
        return left + PLOT / 2 * (1 + copysign(sqrt(abs(value) / reach), value) * 0.97)

    parts = [
        f'<svg class="forest" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        f'aria-label="{escape(f"{title}: {xlabel}")}" font-family="system-ui, sans-serif" font-size="{TEXT}" fill="{ink}">'
    ]
    if paper:
        parts.append(f'<rect width="100%" height="100%" fill="{paper}"/>')
    parts.append(f'<text x="8" y="20" font-size="15" font-weight="600">{escape(title)}</text>')
    bottom = top + ROW * len(rows)
    for tick in _ticks(reach):
        strong = ".55" if tick == 0 else ".14"
        parts.append(f'<path d="M{x(tick):.1f} {top - 8}V{bottom}" stroke="{ink}" stroke-opacity="{strong}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle" font-size="11">{tick:g}</text>')
    parts.append(f'<text x="{left + PLOT / 2:.0f}" y="{bottom + 36}" text-anchor="middle">{escape(xlabel)}</text>')
    for i, row in enumerate(rows):
        parts += _row(row, top + ROW * i + ROW / 2, x, left, ink)
    return "\n".join([*parts, "</svg>"])


def _row(row: Row, y: float, x, left: float, ink: str) -> list[str]:
    weight = "" if row.span else ' font-weight="600"'
    anchor = f'x="{left - 12:.0f}" text-anchor="end"' if row.span else 'x="8"'
    parts = [f'<text {anchor} y="{y + 4:.1f}"{weight}>{escape(row.label)}</text>']
    if row.span:
        low, mean, high = row.span
        colour = COLOURS.get(row.verdict, NONE)
        parts.append(
            f'<g stroke="{colour}" fill="{colour}"><title>{escape(row.label)}: {mean:+.4g} [{low:+.4g}, {high:+.4g}]</title>'
            f'<path d="M{x(low):.1f} {y}H{x(high):.1f}M{x(low):.1f} {y - 4}v8M{x(high):.1f} {y - 4}v8" '
            'stroke-width="2" fill="none"/>'
            f'<circle cx="{x(mean):.1f}" cy="{y}" r="4" stroke="none"/></g>'
            f'<text x="{left + PLOT + 8:.0f}" y="{y + 4:.1f}">{escape(row.verdict)}</text>'
        )
    return parts


def _ticks(reach: float) -> list[float]:
    """Zero, and powers of ten and their halves on both sides, where the square-root scale leaves room for them."""
    power = 10.0 ** int(f"{reach:e}".split("e")[1])
    sizes = [s for s in (5 * power, 2 * power, power, power / 2, power / 10, power / 50) if s <= reach]
    kept: list[float] = []
    for size in sizes:
        if all(sqrt(k / reach) - sqrt(size / reach) > 0.22 for k in kept) and sqrt(size / reach) > 0.15:
            kept.append(size)
    return [*(-k for k in kept), 0.0, *reversed(kept)]
