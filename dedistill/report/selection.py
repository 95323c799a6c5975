"""The page of a selection: the rule, every cell with its intervals and verdict, and what more of one number costs in others."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dedistill.errors import amount
from dedistill.io.atomic import replace_file, replace_json
from dedistill.report.pages import decimals, field, figure, render
from dedistill.report.plots import tick_label
from dedistill.report.sweep import named

UNJUDGED = (
    "Prompt adherence was not judged, so no cell is chosen: look at the images of those that are not refused, or have CLIP "
    "judge (--clip FOLDER, of any CLIPModel of transformers)."
)


def write_selection_page(folder: Path, found: dict[str, Any], title: str) -> Path:
    """Write ``selection.json`` and ``index.html`` into ``folder`` and return the page's path.

    found: what ``dedistill.evaluation.selection.select`` returns.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / "selection.json", found)
    page = folder / "index.html"
    html = render(
        "selection.html.j2",
        title=title,
        rule=rule(found),
        chosen=None if found["chosen"] is None else chosen_words(found),
        unjudged=UNJUDGED,
        price=_price(found),
        prompts=found["prompts"],
        plots=_plots(found),
        table=_table(found),
    )
    replace_file(page, html.encode())
    return page


def rule(found: dict[str, Any]) -> list[str]:
    """How was selected: who is refused, and who of the others is chosen; a sentence each."""
    numbers = {n["key"]: n for n in found["numbers"]}
    limits = [f"{n['tolerance']:g} {n['label']}" for n in numbers.values() if "tolerance" in n]
    lines = []
    if limits:
        lines = [
            f"A cell is refused if, prompt by prompt, it may be worse by more than {', '.join(limits[:-1])}"
            f"{' or ' if limits[:-1] else ''}{limits[-1]} than the same weights in their cell nearest CFG 1, in the most steps."
        ]
    if found["by"] is None:
        return lines
    ranking_metric = numbers[found["by"]]
    end = "highest" if ranking_metric["better"] == "high" else "lowest"
    unjudged = "" if ranking_metric.get("adherence") else " Prompt adherence was not judged."
    return [*lines, f"Of the others, the one of {end} {ranking_metric['label']} is chosen.{unjudged}"]


def chosen_words(found: dict[str, Any]) -> str:
    """The chosen cell, its number with its interval, and how many cells it cannot be told from; of these the cheapest one
    that is not of the reference, which they were to be better than."""
    cell, key = found["cells"][found["chosen"]], found["by"]
    label = next(n["label"] for n in found["numbers"] if n["key"] == key)
    equal = [c for c in found["cells"] if c.get("may_be_best") and c is not cell and c["candidate"] != found["reference"]]
    others = len(equal)
    ties = "no other may be the best"
    if others:
        ties = f"{amount(others, 'other cell is', 'other cells are')} possibly the best as well"
    cheapest = min([cell, *equal], key=lambda c: c["nfe"])
    cheaper = f"; the cheapest of them is {place_words(cheapest)}" if cheapest["nfe"] < cell["nfe"] else ""
    return f"{place_words(cell)}: {label} {number_words(cell, key)}; {ties}{cheaper}"


def place_words(cell: dict[str, Any]) -> str:
    skip = f", the first {cell['skip']} without CFG" if cell["skip"] else ""
    return f"{named(cell)} at CFG {tick_label(cell['cfg'])} in {amount(cell['steps'], 'step')}{skip}"


def number_words(cell: dict[str, Any], key: str) -> str:
    """Value (low to high)."""
    value = cell["numbers"][key]
    places = decimals([value["high"]])
    return f"{value['value']:.{places}f} ({value['low']:.{places}f} to {value['high']:.{places}f})"


def verdict(found: dict[str, Any], i: int) -> str:
    """What became of cell ``i``, in words."""
    cell, labels = found["cells"][i], {n["key"]: n["label"] for n in found["numbers"]}
    if cell["refused"]:
        return "refused: " + ", ".join(labels[key] for key in cell["refused"])
    if i == found["chosen"]:
        return "chosen"
    if "may_be_best" not in cell:
        return "not refused"
    return "possibly the best" if cell["may_be_best"] else "not the best"


def refused_words(found: dict[str, Any]) -> str:
    """How many cells are refused, for what, and at which scales, in one sentence; empty where none is."""
    refused = [cell for cell in found["cells"] if cell["refused"]]
    parts = []
    for n in found["numbers"]:
        if cfgs := sorted({cell["cfg"] for cell in refused if n["key"] in cell["refused"]}):
            parts.append(f"{n['label']} (CFG {', '.join(map(tick_label, cfgs))})")
    some = (
        f"{len(refused)} of {amount(len(found['cells']), 'cell is', 'cells are')} refused, as they may be worse by too much in"
    )
    return f"{some} {', '.join(parts)}." if refused else ""


def undecided_words(found: dict[str, Any]) -> str:
    """What a reader must know first where so few prompts decide nothing; empty otherwise."""
    if (undecided := found["undecided"]) is None:
        return ""
    better = "" if found["chosen"] is None else "better "
    return (
        f"{found['prompts']} prompts cannot decide; about {undecided['prompts']} needed (--prompts {undecided['prompts']}): "
        f"{amount(undecided['cells'], f'{better}cell is', f'{better}cells are')} refused only for what so few leave open."
    )


def _price(found: dict[str, Any]) -> dict[str, Any] | None:
    """The chosen cell's numbers beside those of the cell it is held against; None without a choice."""
    if found["chosen"] is None:
        return None
    cell = found["cells"][found["chosen"]]
    against = found["cells"][cell["against"]]
    pair = [cell] if cell is against else [cell, against]
    rows = [
        {
            "label": n["label"],
            "texts": [number_words(own, n["key"]) for own in pair],
            "limit": f"{n['tolerance']:g}" if "tolerance" in n else "–",
        }
        for n in found["numbers"]
        if n["better"]
    ]
    return {"places": [place_words(own) for own in pair], "rows": rows}


def _plots(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every number over CFG; then the chosen one over each that has a limit, which is the price of it."""
    numbers = {n["key"]: n for n in found["numbers"]}
    wanted = [n for n in numbers.values() if n["better"]]
    plots = [
        figure(
            _series(found, lambda cell: cell["cfg"], n["key"]),
            title=n["label"],
            xlabel="CFG scale",
            ylabel=_direction(n),
            help=n["help"],
        )
        for n in wanted
    ]
    if (ranking_metric := numbers.get(found["by"])) is None:
        return plots
    for n in wanted:
        if "tolerance" in n and n is not ranking_metric:
            across = _series(found, partial(_rounded, n["key"]), ranking_metric["key"])
            title = f"{ranking_metric['label']} against {n['label']}"
            plots.append(
                figure(
                    across,
                    title=title,
                    xlabel=n["label"],
                    ylabel=ranking_metric["label"],
                    round_x=True,
                    help="Every cell is a point.",
                )
            )
    return plots


def _rounded(key: str, cell: dict[str, Any]) -> float:
    return round(cell["numbers"][key]["value"], 3)


def _direction(number: dict[str, Any]) -> str:
    return "higher is better →" if number["better"] == "high" else "← lower is better"


def _series(found: dict[str, Any], x: Callable[[dict[str, Any]], float], key: str) -> dict[str, list[tuple[float, ...]]]:
    """Per candidate, and per skip and steps where there are several, points with their intervals."""
    several = {k: len({cell[k] for cell in found["cells"]}) > 1 for k in ("skip", "steps")}
    series: dict[str, list[tuple[float, ...]]] = {}
    for cell in found["cells"]:
        name = named(cell) + "".join(f", {k} {cell[k]}" for k in several if several[k])
        value = cell["numbers"][key]
        series.setdefault(name, []).append((x(cell), value["value"], value["low"], value["high"]))
    return series


def _table(found: dict[str, Any]) -> dict[str, Any]:
    """All cells as a sortable table: place, cost, verdict, difference to the best of the others, numbers."""
    cells, numbers = found["cells"], [n for n in found["numbers"] if n["better"]]
    heads = [("candidate", False), ("CFG", True), ("skip", True), ("steps", True), ("NFE", True), ("verdict", False)]
    helps = {"NFE": "Network evaluations for one image.", "skip": "First steps without CFG."}
    columns = [[field(named(cell)) for cell in cells]]
    columns += [[field(cell[key], tick_label) for cell in cells] for key in ("cfg", "skip", "steps", "nfe")]
    columns.append([field(verdict(found, i)) for i in range(len(cells))])
    if found["by"]:
        for label, part in (("ahead of the others", "difference"), ("from", "difference_low"), ("to", "difference_high")):
            heads.append((label, True))
            columns.append(_column([cell.get(part) for cell in cells]))
    for n in numbers:
        for label, part in ((n["label"], "value"), ("from", "low"), ("to", "high")):
            heads.append((label, True))
            columns.append(_column([cell["numbers"][n["key"]][part] for cell in cells]))
    columns_heads = [{"label": label, "numeric": numeric, "help": helps.get(label, "")} for label, numeric in heads]
    return {"heads": columns_heads, "rows": list(zip(*columns))}


def _column(values: list[float | None]) -> list[dict[str, Any]]:
    places = decimals(values)
    return [field(value, lambda v: f"{v:z.{places}f}") for value in values]
