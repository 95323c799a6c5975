"""The page of a CFG sweep: curves, grids of images and a table, in one HTML file that needs neither network nor server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from dedistill.errors import amount
from dedistill.evaluation.sweep import read_index, read_scores
from dedistill.io.atomic import replace_file
from dedistill.io.images import replace_image
from dedistill.report.pages import (
    PHONE_SIDE,
    TINY,
    Shot,
    decimals,
    display_width,
    drop_old_thumbnails,
    field,
    figure,
    image_link,
    is_number,
    render,
    thumbnail,
)
from dedistill.report.plots import tick_label, value_label
from dedistill.sampling.images import contact_sheet

# --- the images of a sweep as grids --------------------------------------------------------------------------------


IDENTITY = ("file", "candidate", "cfg", "skip", "steps", "prompt", "seed")  # every other key of an image is a number
SHEET_SIDE = 320  # contact sheets show larger images reduced to this

PromptKey = tuple[str, int]  # the text, and how many earlier prompts of the sweep have the same text
RowKey = tuple[PromptKey, int]  # and the seed


def named(entry: dict[str, Any]) -> str:
    """The candidate of a cell or an image, with the method of those that are not made by Euler's and plain CFG."""
    return ", ".join(filter(None, (entry["candidate"], entry.get("method"))))


Place = tuple[int, int | None]  # skip, and the solver's steps where a candidate has several step counts


def places_of(entries: list[dict[str, Any]]) -> Callable[[dict[str, Any]], Place]:
    """Tells the place of a cell or an image of a sweep; without several step counts of one candidate it has only a skip."""
    found = {(entry["candidate"], entry.get("steps")) for entry in entries}
    several = len({name for name, _ in found}) < len(found)
    return lambda entry: (entry["skip"], entry.get("steps") if several else None)


def group(
    images: list[dict[str, Any]], shown: int, place: Callable[[dict[str, Any]], Place]
) -> tuple[list[RowKey], dict[tuple[str, float, Place], dict[RowKey, dict[str, Any]]]]:
    """The rows to show, and the images by candidate, scale and place, then by row."""
    grouped: dict[tuple[str, float, Place], dict[RowKey, dict[str, Any]]] = {}
    seen: dict[tuple[str, float, Place, str, int], int] = {}
    rows: dict[RowKey, None] = {}
    for entry in images:
        cell = entry["candidate"], entry["cfg"], place(entry)
        # Two prompts may have the same text ("3 seven" twice among 256): the n-th of one cell is the n-th of another.
        same = (*cell, entry["prompt"], entry["seed"])
        seen[same] = seen.get(same, 0) + 1
        row = (entry["prompt"], seen[same]), entry["seed"]
        rows[row] = None
        grouped.setdefault(cell, {})[row] = entry
    prompts = list(dict.fromkeys(prompt for prompt, _ in rows))[:shown]
    kept = sorted((row for row in rows if row[0] in set(prompts)), key=lambda row: prompts.index(row[0]))
    if len(kept) > 2 * shown:
        firsts: dict[PromptKey, RowKey] = {}
        for row in kept:
            firsts.setdefault(row[0], row)
        kept = list(firsts.values())
    return kept, grouped


def make_gallery(
    folder: Path,
    scores: dict[str, Any],
    cells: dict[float, dict[str, Any]],
    rows: list[RowKey],
    shots: dict[float, dict[RowKey, dict[str, Any]]],
) -> dict[str, Any]:
    """The grid of one candidate at one place: prompts as rows, scales as columns. cells, shots: by scale."""
    labels = {number["key"]: number["label"] for number in scores["numbers"]}
    several = len({seed for _, seed in rows}) > 1
    heads = scores["numbers"][:2]  # shown above the images, the others only in the viewer
    places = [decimals(cell.get(number["key"]) for cell in scores["cells"]) for number in heads]
    columns, scales = [], sorted(shots)
    for cfg in scales:
        cell = cells.get(cfg, {})
        numbers = [(number["label"], cell.get(number["key"])) for number in scores["numbers"]]
        images = f"{amount(cell['images'], 'image')}: " if "images" in cell else ""
        texts = [f"{value:.{n}f}" if is_number(value) else "–" for (_, value), n in zip(numbers, places)]
        columns.append({"cfg": cfg, "texts": texts, "caption": images + _caption(numbers) if cell else ""})
    lines, sizes = [], []
    for i, row in enumerate(rows):
        entries = [shots[cfg].get(row) for cfg in scales]
        line = [shot(folder, entry, labels) if entry else None for entry in entries]
        sizes += [(shot.width, shot.height) for shot in line if shot]
        (prompt, _), seed = row
        lines.append({"label": f"{prompt} (seed {seed})" if several else prompt, "key": i, "shots": line})
    size = max(sizes, default=(TINY, TINY))
    width, small = display_width(size, len(scales)), display_width(size, len(scales), PHONE_SIDE)
    return {
        "columns": columns,
        "heads": [number["label"] for number in heads],
        "rows": lines,
        "width": width,
        "small": small,
        "tiny": min(size) < TINY,
    }


def shot(folder: Path, entry: dict[str, Any], labels: dict[str, str]) -> Shot:
    """The image of a row of index.json, whose file is relative to ``folder``; labels: what numbers are called."""
    src, (width, height) = image_link(folder, entry["file"])
    numbers = [(labels.get(key, key), value) for key, value in entry.items() if key not in IDENTITY]
    correct = entry.get("correct")
    wrong = 1 - correct if isinstance(correct, (int, float)) else 0.0
    steps = f", {amount(entry['steps'], 'step')}" if "steps" in entry else ""
    where = f"{entry['candidate']}, CFG {tick_label(entry['cfg'])}, skip {entry['skip']}{steps}, seed {entry['seed']}"
    misread = "" if wrong <= 0 else ", misread" if wrong >= 1 else ", partly misread"
    alt = f"{entry['prompt']}: {entry['candidate']} at CFG {tick_label(entry['cfg'])}{misread}"
    own = f"This image: {caption}" if (caption := _caption(numbers)) else ""
    small = thumbnail(folder, entry["file"], (width, height))
    return Shot(entry["file"], src, small, alt, entry["prompt"], where, own, width, height, max(wrong, 0.0))


def _caption(numbers: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{label} {value_label(value)}" for label, value in numbers if is_number(value))


def sheet_names(names: list[str], places: list[Place]) -> dict[tuple[str, Place], str]:
    """A file name per candidate and place; candidates that differ only in odd characters get a number."""
    plain: dict[str, str] = {}
    for name in names:
        safe = base = re.sub(r"[^\w.-]+", "_", name).strip("._") or "candidate"
        for i in range(2, len(names) + 2):
            if safe.lower() not in (used.lower() for used in plain.values()):  # some file systems ignore case
                break
            safe = f"{base}_{i}"
        plain[name] = safe
    skips = {skip for skip, _ in places}
    ends = {(s, n): (f"_skip{s}" if len(skips) > 1 else "") + (f"_steps{n}" if n else "") for s, n in places}
    return {(name, place): plain[name] + end for name in names for place, end in ends.items()}


def write_sheet(folder: Path, name: str, gallery: dict[str, Any], title: str) -> str:
    """Save the gallery as one image and return its URL."""

    def load(shot: Shot | None) -> Image.Image | None:
        if shot is None:
            return None
        with Image.open(folder / shot.file) as image:
            plain = image.convert("RGB")
        plain.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
        return plain

    rows = [(row["label"], [load(shot) for shot in row["shots"]]) for row in gallery["rows"]]
    heading = f"{title}: {gallery['name']}" + (f", skip {gallery['skip']}" if gallery["skip"] else "")
    heading += f", {amount(gallery['steps'], 'step')}" if gallery["steps"] else ""
    sheet = contact_sheet(
        rows, [f"CFG {tick_label(column['cfg'])}" for column in gallery["columns"]], title=heading, scale=None
    )
    (folder / "sheets").mkdir(exist_ok=True)
    replace_image(folder / "sheets" / f"{name}.png", sheet)
    return quote(f"sheets/{name}.png")


# --- the page of a CFG sweep -----------------------------------------------------------------------------------------


LOG_RATIO = 40  # a lower-is-better number that spans more than this factor gets a logarithmic axis


def write_sweep_page(folder: Path, *, shown: int = 8) -> Path:
    """Write ``index.html``, ``thumbs`` and ``sheets/*.png`` for the sweep in ``folder`` and return the page's path.

    The images of the first ``shown`` prompts appear, all their seeds when those are few and else the first seed.
    Raises ``UserError`` when ``index.json``, ``scores.json`` or an image is missing or not what it should be.
    """
    folder = Path(folder)
    scores, images = read_scores(folder / "scores.json"), read_index(folder / "index.json")
    for entry in [*scores["cells"], *images]:  # another method is shown as another candidate
        entry["candidate"] = named(entry)
        entry.pop("method", None)
    names = list(dict.fromkeys(entry["candidate"] for entry in [*scores["cells"], *images]))
    place_of = places_of([*scores["cells"], *images])
    places = sorted({place_of(entry) for entry in [*scores["cells"], *images]})
    rows, grouped = group(images, shown, place_of)
    galleries = []
    sheets = sheet_names(names, places)
    for place in places:
        for name in names:
            shots = {cfg: found for (who, cfg, at), found in grouped.items() if (who, at) == (name, place)}
            cells = {cell["cfg"]: cell for cell in scores["cells"] if (cell["candidate"], place_of(cell)) == (name, place)}
            gallery = {"candidate": names.index(name), "name": name, "skip": place[0], "steps": place[1]}
            gallery |= {"rows": [], "columns": []}
            if shots:
                gallery |= make_gallery(folder, scores, cells, rows, shots)
                gallery["sheet"] = write_sheet(folder, sheets[name, place], gallery, scores["title"])
            galleries.append(gallery)
    drop_old_thumbnails(folder, (s for g in galleries for row in g["rows"] for s in row["shots"] if s))
    seeds = list(dict.fromkeys(seed for _, seed in rows))
    html = render(
        "sweep.html.j2",
        title=scores["title"],
        settings=scores["settings"],
        names=names,
        skips=sorted({skip for skip, _ in places}),
        step_counts=sorted({steps for _, steps in places if steps}),
        plots=[{"skip": p[0], "steps": p[1], "plots": _plots(scores, names, p, place_of, len(places) == 1)} for p in places],
        table=_table(scores),
        marked=any(number["better"] for number in scores["numbers"]),
        judged=any("correct" in entry for entry in images),
        galleries=galleries,
        image_count=len(images),
        prompts_shown=len({prompt for prompt, _ in rows}),
        seeds=seeds,
        scales=sorted({entry["cfg"] for entry in [*scores["cells"], *images]}),
    )
    page = folder / "index.html"
    replace_file(page, html.encode())
    return page


def _plots(
    scores: dict[str, Any], names: list[str], place: Place, place_of: Callable[[dict[str, Any]], Place], alone: bool
) -> list[dict[str, Any]]:
    """One curve plot per number; the vertical axis is the same at every place, so that switching shows the change."""
    plots = []
    for number in scores["numbers"]:
        key = number["key"]
        cells = [cell for cell in scores["cells"] if is_number(cell.get(key))]
        values = [cell[key] for cell in cells]
        if not values:
            continue
        series = {
            name: [(cell["cfg"], cell[key]) for cell in cells if (cell["candidate"], place_of(cell)) == (name, place)]
            for name in names
        }
        low, high = min(values), max(values)
        plot = figure(
            series,
            title=number["label"],
            xlabel="CFG scale",
            ylabel={"high": "higher is better →", "low": "← lower is better"}.get(number["better"], number["label"]),
            log_y=number["better"] == "low" and low > 0 and high > LOG_RATIO * low,
            y_range=None if alone else (low, high),
            help=number["help"],
        )
        plots.append(plot)
    return plots


def _table(scores: dict[str, Any]) -> dict[str, Any]:
    """All cells as rows of ``{"text", "sort", "best"}``; every column has one number of decimals, so digits line up."""
    cells, numbers = scores["cells"], scores["numbers"]
    fixed = [("candidate", "candidate"), ("cfg", "CFG"), ("skip", "skip"), ("steps", "steps"), ("images", "images")]
    fixed = [(key, label) for key, label in fixed if any(cell.get(key) for cell in cells)]  # no column of zero skips
    heads = [{"label": label, "help": "", "numeric": key != "candidate"} for key, label in fixed]
    heads += [{"label": number["label"], "help": number["help"], "numeric": True} for number in numbers]
    columns = [[field(cell.get(key), tick_label) for cell in cells] for key, _ in fixed]
    for number in numbers:
        values = [cell.get(number["key"]) for cell in cells]
        finite = [value for value in values if is_number(value)]
        places = decimals(finite)
        best = {"high": max, "low": min}[number["better"]](finite) if number["better"] and finite else None
        columns.append([field(value, f"{{:.{places}f}}".format, best) for value in values])
    return {"heads": heads, "rows": list(zip(*columns))}
