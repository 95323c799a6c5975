"""The page of a CFG sweep: curves, pictures and a table, in one HTML file that needs neither a network nor a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dedistill.report.pages import decimals, drop_old_thumbnails, field, figure, is_number, render
from dedistill.report.plots import tick_label
from dedistill.report.sweep_files import read_index, read_scores
from dedistill.report.sweep_gallery import Place, group, make_gallery, places_of, sheet_names, write_sheet

LOG_RATIO = 40  # a lower-is-better number that spans more than this factor gets a logarithmic axis


def write_sweep_page(folder: Path, *, shown: int = 8) -> Path:
    """Write ``index.html``, ``thumbs`` and ``sheets/*.png`` for the sweep in ``folder`` and return the page's path.

    The pictures of the first ``shown`` prompts appear, all their seeds when those are few and else the first seed.
    Raises ``UserError`` when ``index.json``, ``scores.json`` or a picture is missing or not what it should be.
    """
    folder = Path(folder)
    scores, pictures = read_scores(folder / "scores.json"), read_index(folder / "index.json")
    names = list(dict.fromkeys(entry["candidate"] for entry in [*scores["cells"], *pictures]))
    place_of = places_of([*scores["cells"], *pictures])
    places = sorted({place_of(entry) for entry in [*scores["cells"], *pictures]})
    rows, grouped = group(pictures, shown, place_of)
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


def _plots(scores: dict, names: list[str], place: Place, place_of: Callable[[dict], Place], alone: bool) -> list[dict]:
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


def _table(scores: dict) -> dict:
    """All cells as rows of ``{"text", "sort", "best"}``; every column has one number of decimals, so digits line up."""
    cells, numbers = scores["cells"], scores["numbers"]
    fixed = [("candidate", "candidate"), ("cfg", "CFG"), ("skip", "skip"), ("steps", "steps"), ("pictures", "pictures")]
    fixed = [(key, label) for key, label in fixed if any(cell.get(key) for cell in cells)]  # no column of zero skips
    heads = [{"label": label, "help": "", "numeric": key != "candidate"} for key, label in fixed]
    heads += [{"label": number["label"], "help": number["help"], "numeric": True} for number in numbers]
    columns = [[field(cell.get(key), tick_label) for cell in cells] for key, _ in fixed]
    for number in numbers:
        values = [cell.get(number["key"]) for cell in cells]
        finite = [value for value in values if is_number(value)]
        places = decimals(finite)
        best = {"high": max, "low": min}[number["better"]](finite) if number["better"] and finite else None
        columns.append([field(value, lambda v, n=places: f"{v:.{n}f}", best) for value in values])
    return {"heads": heads, "rows": list(zip(*columns))}
