"""The page of a CFG sweep: curves, pictures and a table, in one HTML file that needs neither a network nor a server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from dedistill.errors import UserError
from dedistill.report.plots import line_plot, tick_label, value_label
from dedistill.sampling.grid import contact_sheet

IDENTITY = ("file", "candidate", "cfg", "skip", "steps", "prompt", "seed")  # every other key of a picture is a number
SHEET_SIDE = 320  # contact sheets show larger pictures reduced to this
TINY = 96  # pictures with a shorter side than this are shown with hard pixel edges
PHONE_SIDE = 80  # side of a thumbnail on a phone
LOG_RATIO = 40  # a lower-is-better number that spans more than this factor gets a logarithmic axis

PromptKey = tuple[str, int]  # the text, and how many earlier prompts of the sweep have the same text
RowKey = tuple[PromptKey, int]  # and the seed


@dataclass(frozen=True)
class Shot:
    """One picture as the templates show it; ``where`` and ``numbers`` are the caption of the enlarged picture."""

    file: str
    src: str
    alt: str
    prompt: str
    where: str
    numbers: str
    width: int
    height: int
    wrong: float = 0.0  # share the judge misread


def write_sweep_page(folder: Path, *, shown: int = 8) -> Path:
    """Write ``index.html`` and ``sheets/*.png`` for the sweep in ``folder`` and return the page's path.

    The pictures of the first ``shown`` prompts appear, all their seeds when those are few and else the first seed.
    Raises ``UserError`` when ``index.json``, ``scores.json`` or a picture is missing or not what it should be.
    """
    folder = Path(folder)
    scores, pictures = _read_scores(folder / "scores.json"), _read_index(folder / "index.json")
    names = list(dict.fromkeys(entry["candidate"] for entry in [*scores["cells"], *pictures]))
    skips = sorted({entry["skip"] for entry in [*scores["cells"], *pictures]})
    rows, grouped = _group(pictures, shown)
    galleries = []
    sheet_names = _sheet_names(names, skips)
    for skip in skips:
        for name in names:
            shots = {cfg: found for (who, cfg, at), found in grouped.items() if (who, at) == (name, skip)}
            gallery = {"candidate": names.index(name), "name": name, "skip": skip, "rows": [], "columns": []}
            if shots:
                gallery |= _gallery(folder, scores, name, skip, rows, shots)
                gallery["sheet"] = _write_sheet(folder, sheet_names[name, skip], gallery, scores["title"])
            galleries.append(gallery)
    seeds = list(dict.fromkeys(seed for _, seed in rows))
    html = render(
        "sweep.html.j2",
        title=scores["title"],
        settings=scores["settings"],
        names=names,
        skips=skips,
        plots=[plot for skip in skips for plot in _plots(scores, names, skip, skips)],
        table=_table(scores),
        marked=any(number["better"] for number in scores["numbers"]),
        judged=any("correct" in entry for entry in pictures),
        galleries=galleries,
        picture_count=len(pictures),
        prompts_shown=len({prompt for prompt, _ in rows}),
        seeds=seeds,
        scales=sorted({entry["cfg"] for entry in [*scores["cells"], *pictures]}),
    )
    page = folder / "index.html"
    page.write_text(html, encoding="utf-8")
    return page


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tick"] = tick_label
    return environment


def render(template: str, **values) -> str:
    """Fill one of the page templates; everything that is not ``Markup`` is escaped, prompts above all."""
    return _environment().get_template(template).render(**values)


def picture_link(folder: Path, file: str) -> tuple[str, tuple[int, int]]:
    """The URL of a picture relative to the page in ``folder``, and its size in pixels."""
    path = folder / file
    try:
        with Image.open(path) as picture:
            size = picture.size
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture; was the folder moved without its pictures?") from None
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
    return quote(Path(file).as_posix()), size


def display_width(size: tuple[int, int], columns: int, most: int = 220) -> int:
    """The width in CSS pixels of a thumbnail: tiny pictures by a whole factor, larger ones to fill the page.

    ``most`` bounds the side of a square picture; long grids want less than the page would hold.
    """
    width, height = size
    root = math.sqrt(width * height)
    if min(size) < TINY:
        return width * max(1, int(min(max(920 / columns, 72), 128, most) / root))
    return round(min(max(920 / columns, 96), most) * width / root)


def read_json(path: Path) -> object:
    """Parse a JSON file; a missing or broken one is the user's to mend."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is {path.parent} the folder of a finished sweep?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the sweep again to write it anew") from None


def _read_scores(path: Path) -> dict:
    scores = read_json(path)
    if not isinstance(scores, dict):
        raise UserError(f"{path}: expected an object with title, settings, numbers and cells")
    for key, kind in {"title": str, "settings": dict, "numbers": list, "cells": list}.items():
        if not isinstance(scores.get(key), kind):
            raise UserError(f"{path}: {key!r} is missing or not a {kind.__name__}")
    _require(path, "numbers", scores["numbers"], {"key": str, "label": str})
    _require(path, "cells", scores["cells"], {"candidate": str, "cfg": (int, float), "skip": int})
    if not scores["cells"]:
        raise UserError(f"{path}: 'cells' is empty: the sweep made no pictures")
    for number in scores["numbers"]:
        number.setdefault("help", "")
        if number.setdefault("better", None) not in ("high", "low", None):
            raise UserError(f"{path}: number {number['key']!r}: 'better' is {number['better']!r}, not high, low or null")
    return scores


def _read_index(path: Path) -> list[dict]:
    pictures = read_json(path)
    if not isinstance(pictures, list) or not pictures:
        raise UserError(f"{path}: expected a list with one object per picture")
    kinds = {"file": str, "candidate": str, "cfg": (int, float), "skip": int, "prompt": str, "seed": int}
    _require(path, "picture", pictures, kinds)
    for entry in pictures:
        if Path(entry["file"]).is_absolute() or ".." in Path(entry["file"]).parts:
            raise UserError(f"{path}: {entry['file']!r} lies outside the sweep folder; paths must be relative to it")
    return pictures


def _require(path: Path, what: str, entries: Iterable[object], kinds: dict[str, type | tuple[type, ...]]) -> None:
    """Raise when an entry lacks one of the keys or has another kind of value there."""
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {what} {i} is not an object")
        for key, kind in kinds.items():
            if not isinstance(entry.get(key), kind) or isinstance(entry[key], bool):
                raise UserError(f"{path}: {what} {i}: {key!r} is missing or has the wrong type ({entry.get(key)!r})")


def _group(pictures: list[dict], shown: int) -> tuple[list[RowKey], dict[tuple[str, float, int], dict[RowKey, dict]]]:
    """The rows to show, and the pictures by candidate, scale and skip, then by row."""
    grouped: dict[tuple[str, float, int], dict[RowKey, dict]] = {}
    seen: dict[tuple, int] = {}
    rows: dict[RowKey, None] = {}
    for entry in pictures:
        cell = entry["candidate"], entry["cfg"], entry["skip"]
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


def _gallery(folder: Path, scores: dict, name: str, skip: int, rows: list[RowKey], shots: dict[float, dict]) -> dict:
    """The grid of one candidate at one skip: prompts as rows, scales as columns."""
    labels = {number["key"]: number["label"] for number in scores["numbers"]}
    cells = {cell["cfg"]: cell for cell in scores["cells"] if (cell["candidate"], cell["skip"]) == (name, skip)}
    several = len({seed for _, seed in rows}) > 1
    heads = scores["numbers"][:2]  # shown above the pictures, the others only in the viewer
    places = [decimals(cell.get(number["key"]) for cell in scores["cells"]) for number in heads]
    columns, scales = [], sorted(shots)
    for cfg in scales:
        cell = cells.get(cfg, {})
        numbers = [(number["label"], cell.get(number["key"])) for number in scores["numbers"]]
        pictures = f"{cell['pictures']} pictures: " if "pictures" in cell else ""
        texts = [f"{value:.{n}f}" if is_number(value) else "–" for (_, value), n in zip(numbers, places)]
        columns.append({"cfg": cfg, "texts": texts, "caption": pictures + _caption(numbers) if cell else ""})
    lines, sizes = [], []
    for i, row in enumerate(rows):
        entries = [shots[cfg].get(row) for cfg in scales]
        line = [_shot(folder, entry, labels) if entry else None for entry in entries]
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


def _shot(folder: Path, entry: dict, labels: dict[str, str]) -> Shot:
    src, (width, height) = picture_link(folder, entry["file"])
    numbers = [(labels.get(key, key), value) for key, value in entry.items() if key not in IDENTITY]
    correct = entry.get("correct")
    wrong = 1 - correct if isinstance(correct, (int, float)) else 0.0
    steps = f", {entry['steps']} steps" if "steps" in entry else ""
    where = f"{entry['candidate']}, CFG {tick_label(entry['cfg'])}, skip {entry['skip']}{steps}, seed {entry['seed']}"
    misread = "" if wrong <= 0 else ", misread" if wrong >= 1 else ", partly misread"
    alt = f"{entry['prompt']}: {entry['candidate']} at CFG {tick_label(entry['cfg'])}{misread}"
    own = f"This picture: {caption}" if (caption := _caption(numbers)) else ""
    return Shot(entry["file"], src, alt, entry["prompt"], where, own, width, height, max(wrong, 0.0))


def _caption(numbers: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{label} {value_label(value)}" for label, value in numbers if is_number(value))


def is_number(value: object) -> bool:
    """Whether a value read from JSON can be shown as a number: neither missing, nor NaN, nor true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plots(scores: dict, names: list[str], skip: int, skips: list[int]) -> list[dict]:
    """One curve plot per number; the vertical axis is the same at every skip, so that switching shows the change."""
    plots = []
    for number in scores["numbers"]:
        key = number["key"]
        cells = [cell for cell in scores["cells"] if is_number(cell.get(key))]
        values = [cell[key] for cell in cells]
        if not values:
            continue
        series = {
            name: [(cell["cfg"], cell[key]) for cell in cells if (cell["candidate"], cell["skip"]) == (name, skip)]
            for name in names
        }
        low, high = min(values), max(values)
        svg = line_plot(
            series,
            title=number["label"],
            xlabel="CFG scale",
            ylabel={"high": "higher is better →", "low": "← lower is better"}.get(number["better"], number["label"]),
            log_y=number["better"] == "low" and low > 0 and high > LOG_RATIO * low,
            y_range=(low, high) if len(skips) > 1 else None,
        )
        plots.append({"skip": skip, "svg": Markup(svg), "help": number["help"]})
    return plots


def _table(scores: dict) -> dict:
    """All cells as rows of ``{"text", "sort", "best"}``; every column has one number of decimals, so digits line up."""
    cells, numbers = scores["cells"], scores["numbers"]
    fixed = [("candidate", "candidate"), ("cfg", "CFG"), ("skip", "skip"), ("steps", "steps"), ("pictures", "pictures")]
    fixed = [(key, label) for key, label in fixed if any(cell.get(key) for cell in cells)]  # no column of zero skips
    heads = [{"label": label, "help": "", "numeric": key != "candidate"} for key, label in fixed]
    heads += [{"label": number["label"], "help": number["help"], "numeric": True} for number in numbers]
    columns = [[_field(cell.get(key), tick_label) for cell in cells] for key, _ in fixed]
    for number in numbers:
        values = [cell.get(number["key"]) for cell in cells]
        finite = [value for value in values if is_number(value)]
        places = decimals(finite)
        best = {"high": max, "low": min}[number["better"]](finite) if number["better"] and finite else None
        columns.append([_field(value, lambda v, n=places: f"{v:.{n}f}", best) for value in values])
    return {"heads": heads, "rows": list(zip(*columns))}


def decimals(values: Iterable[float | None]) -> int:
    """How many decimals a column of such numbers needs."""
    largest = max((abs(value) for value in values if is_number(value)), default=0)
    return next(count for limit, count in ((100, 1), (10, 2), (0.1, 3), (0, 4)) if largest >= limit)


def _field(value: object, text: Callable[[float], str], best: float | None = None) -> dict:
    if isinstance(value, str):
        return {"text": value, "sort": value, "best": False}
    if not is_number(value):
        return {"text": "–", "sort": "", "best": False}
    return {"text": text(value), "sort": repr(value), "best": value == best}


def _sheet_names(names: list[str], skips: list[int]) -> dict[tuple[str, int], str]:
    """A file name per candidate and skip; candidates that differ only in odd characters get a number."""
    plain: dict[str, str] = {}
    for name in names:
        safe = base = re.sub(r"[^\w.-]+", "_", name).strip("._") or "candidate"
        for i in range(2, len(names) + 2):
            if safe.lower() not in (used.lower() for used in plain.values()):  # some file systems ignore case
                break
            safe = f"{base}_{i}"
        plain[name] = safe
    return {(name, skip): plain[name] + (f"_skip{skip}" if len(skips) > 1 else "") for name in names for skip in skips}


def _write_sheet(folder: Path, name: str, gallery: dict, title: str) -> str:
    """Save the gallery as one picture and return its URL."""

    def load(shot: Shot | None) -> Image.Image | None:
        if shot is None:
            return None
        with Image.open(folder / shot.file) as picture:
            plain = picture.convert("RGB")
        plain.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
        return plain

    rows = [(row["label"], [load(shot) for shot in row["shots"]]) for row in gallery["rows"]]
    heading = f"{title}: {gallery['name']}" + (f", skip {gallery['skip']}" if gallery["skip"] else "")
    sheet = contact_sheet(
        rows, [f"CFG {tick_label(column['cfg'])}" for column in gallery["columns"]], title=heading, scale=None
    )
    (folder / "sheets").mkdir(exist_ok=True)
    sheet.save(folder / "sheets" / f"{name}.png")
    return quote(f"sheets/{name}.png")
