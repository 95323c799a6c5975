"""The page of a data set: what its images and captions are like, what is left out, and what comes twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dedistill.data.images.index import Index
from dedistill.errors import amount
from dedistill.io.atomic import replace_file, replace_json
from dedistill.report.pages import Shot, render, save_small

SIDE = 384
PER_SOURCE = 24
COLUMNS = 8
GROUPS = 40
PER_GROUP = 8
LISTED = 500


def write_scan_page(folder: Path, index: Index, facts: dict[str, Any]) -> Path:
    """Write ``index.html``, ``scan.json`` and small copies of the images shown into ``folder``; return the page's path.

    ``facts`` are those of ``dedistill.data.images.scan.scan``. Shown are 24 images of each source, evenly spread over it, and
    the first 40 groups of near-duplicates.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    groups = [group[:PER_GROUP] for group in facts["near_duplicates"][:GROUPS]]
    html = render(
        "scan.html.j2",
        title="Data: " + ", ".join(source["name"] for source in facts["sources"]),
        facts=facts,
        charts=_charts(facts),
        galleries=[(s.title, _rows(folder, index, _spread(index, n), facts["unit"])) for n, s in enumerate(index.sources)],
        groups=[[_shot(folder, index, i) for i in group] for group in groups],
        columns=COLUMNS,
        listed=LISTED,
    )
    replace_json(folder / "scan.json", facts)
    page = folder / "index.html"
    replace_file(page, html.encode())
    return page


def _charts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Bar charts: (label, count, share of the largest) by line."""
    charts = [
        ("Size", "Side in pixels of a square with as many pixels.", facts["sides"]),
        ("Caption length", f"In {facts['unit']}" + _counted(facts["unit"]), facts["lengths"]),
    ]
    for resolution, rows in facts["buckets"].items():
        note = f"Nearest bucket, width x height. Too small for it: {amount(facts['too_small'][resolution], 'image')}."
        charts.append((f"Buckets at {resolution}", note, [(f"{w} x {h}", count) for h, w, count in rows]))
    drawn = []
    for title, note, bars in charts:
        filled = [i for i, (_, count) in enumerate(bars) if count]
        bars = bars[min(filled) : max(filled) + 1] if filled else []
        most = max((count for _, count in bars), default=1)
        drawn.append({"title": title, "note": note, "bars": [(label, count, count / most) for label, count in bars]})
    return drawn


def _counted(unit: str) -> str:
    return ", with the end mark." if unit == "tokens" else " (no tokenizer was given; tokens are more)."


def _spread(index: Index, source: int) -> list[int]:
    mine = [i for i, sample in enumerate(index.samples) if sample.source == source]
    return [mine[k * len(mine) // PER_SOURCE] for k in range(PER_SOURCE)] if len(mine) > PER_SOURCE else mine


def _rows(folder: Path, index: Index, shown: list[int], unit: str) -> list[list[Shot]]:
    shots = [_shot(folder, index, i) for i in shown]
    return [shots[start : start + COLUMNS] for start in range(0, len(shots), COLUMNS)]


def _shot(folder: Path, index: Index, i: int) -> Shot:
    """A small copy of sample i, named by its hash: no name of the user's becomes a path."""
    sample = index.samples[i]
    file = f"images/{sample.sha256[:24]}.webp"
    width, height = save_small(index.image(i), folder / file, SIDE)
    where = f"{sample.name}, {sample.width} x {sample.height}"
    captions = " | ".join(sample.captions)
    return Shot(file, file, file, captions or sample.name, captions, where, "", width, height)
