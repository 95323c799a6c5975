"""The pictures of a sweep as grids: prompts as rows, scales as columns, one grid per candidate and skip."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from dedistill.report.pages import PHONE_SIDE, TINY, Shot, decimals, display_width, is_number, picture_link, thumbnail
from dedistill.report.plots import tick_label, value_label
from dedistill.sampling.grid import contact_sheet

IDENTITY = ("file", "candidate", "cfg", "skip", "steps", "prompt", "seed")  # every other key of a picture is a number
SHEET_SIDE = 320  # contact sheets show larger pictures reduced to this

PromptKey = tuple[str, int]  # the text, and how many earlier prompts of the sweep have the same text
RowKey = tuple[PromptKey, int]  # and the seed


Place = tuple[int, int | None]  # skip, and the solver's steps where a candidate has several step counts


def places_of(entries: list[dict]) -> Callable[[dict], Place]:
    """Tells the place of a cell or a picture of a sweep; without several step counts of one candidate it has only a skip."""
    found = {(entry["candidate"], entry.get("steps")) for entry in entries}
    several = len({name for name, _ in found}) < len(found)
    return lambda entry: (entry["skip"], entry.get("steps") if several else None)


def group(
    pictures: list[dict], shown: int, place: Callable[[dict], Place]
) -> tuple[list[RowKey], dict[tuple[str, float, Place], dict[RowKey, dict]]]:
    """The rows to show, and the pictures by candidate, scale and place, then by row."""
    grouped: dict[tuple[str, float, Place], dict[RowKey, dict]] = {}
    seen: dict[tuple, int] = {}
    rows: dict[RowKey, None] = {}
    for entry in pictures:
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


def make_gallery(folder: Path, scores: dict, cells: dict[float, dict], rows: list[RowKey], shots: dict[float, dict]) -> dict:
    """The grid of one candidate at one place: prompts as rows, scales as columns. cells, shots: by scale."""
    labels = {number["key"]: number["label"] for number in scores["numbers"]}
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


def shot(folder: Path, entry: dict, labels: dict[str, str]) -> Shot:
    """The picture of a row of index.json, whose file is relative to ``folder``; labels: what numbers are called."""
    src, (width, height) = picture_link(folder, entry["file"])
    numbers = [(labels.get(key, key), value) for key, value in entry.items() if key not in IDENTITY]
    correct = entry.get("correct")
    wrong = 1 - correct if isinstance(correct, (int, float)) else 0.0
    steps = f", {entry['steps']} steps" if "steps" in entry else ""
    where = f"{entry['candidate']}, CFG {tick_label(entry['cfg'])}, skip {entry['skip']}{steps}, seed {entry['seed']}"
    misread = "" if wrong <= 0 else ", misread" if wrong >= 1 else ", partly misread"
    alt = f"{entry['prompt']}: {entry['candidate']} at CFG {tick_label(entry['cfg'])}{misread}"
    own = f"This picture: {caption}" if (caption := _caption(numbers)) else ""
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


def write_sheet(folder: Path, name: str, gallery: dict, title: str) -> str:
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
    heading += f", {gallery['steps']} steps" if gallery["steps"] else ""
    sheet = contact_sheet(
        rows, [f"CFG {tick_label(column['cfg'])}" for column in gallery["columns"]], title=heading, scale=None
    )
    (folder / "sheets").mkdir(exist_ok=True)
    sheet.save(folder / "sheets" / f"{name}.png")
    return quote(f"sheets/{name}.png")
