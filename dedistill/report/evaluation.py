"""The first page after a run: three answers with their intervals, the images they are about, and where the rest stands."""

from pathlib import Path
from typing import Any

from dedistill.errors import amount
from dedistill.evaluation.evaluate import MOST_AVERAGES
from dedistill.evaluation.selection import CELL
from dedistill.evaluation.sweep import read_index
from dedistill.io.atomic import replace_file, replace_json
from dedistill.report.distillation import few_words, interval_words, write_distillation_page
from dedistill.report.pages import decimals, display_width, drop_old_thumbnails, field, render
from dedistill.report.selection import (
    UNJUDGED,
    chosen_words,
    number_words,
    place_words,
    refused_words,
    rule,
    undecided_words,
    write_selection_page,
)
from dedistill.report.sweep import shot, write_sweep_page

SHOWN = 8


def write_evaluation(out: Path, found: dict[str, Any], names: str) -> tuple[list[dict[str, str]], Path]:
    """Write all pages of what ``dedistill.evaluation.evaluate.evaluate`` found; its sweep is in ``out`` already.

    names: of the runs. Returns the three answers, and the path of the first page; evaluation.json stands beside it.
    """
    write_sweep_page(out / "sweep")
    write_distillation_page(out / "distillation", found["distillation"])
    write_selection_page(out / "selection", found["selection"], f"Selection: {names}")
    answers, title = three_answers(found), f"Evaluation: {names}"
    first = cautions(found)
    summary = {
        "title": title,
        "cautions": first,
        "answers": answers,
        "losses": found["losses"],
        "chosen": _chosen(found["selection"]),
    }
    replace_json(out / "evaluation.json", summary)
    columns, rows = _images(out, found)
    drop_old_thumbnails(out, (s for row in rows for s in row["shots"]))
    page = out / "index.html"
    shots = [s for row in rows for s in row["shots"]]
    size = max((s.width, s.height) for s in shots)
    html = render(
        "evaluation.html.j2",
        title=title,
        cautions=first,
        answers=answers,
        rule=rule(found["selection"]),
        most=MOST_AVERAGES,
        intervals=any(row["low"] is not None for row in found["losses"]),
        other="the choice" if found["selection"]["chosen"] is not None else columns[-1],
        columns=columns,
        rows=rows,
        width=display_width(size, 4),
        small=display_width(size, 4, 120),
        tiny=any(s.src == s.small for s in shots),
        misread=any(s.wrong for s in shots),
        base=any(row["candidate"].split()[-1] == "base" for row in found["losses"]),
        losses=_loss_table(found["losses"]),
    )
    replace_file(page, html.encode())
    return answers, page


def three_answers(found: dict[str, Any]) -> list[dict[str, str]]:
    """{"question", "answer"}: how distilled still, which average, how to sample."""
    return [
        {"question": "How distilled is it still?", "answer": _distilled(found)},
        {"question": "Which weights?", "answer": _which(found)},
        {"question": "How to sample?", "answer": _how(found)},
    ]


def cautions(found: dict[str, Any]) -> list[str]:
    """What a reader must know before the answers: what so few prompts, or prompts that were trained on, cannot tell."""
    said = [undecided_words(found["selection"]), few_words(found["distillation"])]
    if found["trained"]:
        some = amount(found["trained"], "prompt is a caption that was", "prompts are captions that were")
        said.append(f"{some} trained on: images of other prompts may be worse.")
    return [words for words in said if words]


def _chosen(selection: dict[str, Any]) -> dict[str, Any] | None:
    if selection["chosen"] is None:
        return None
    cell = selection["cells"][selection["chosen"]]
    return {key: cell[key] for key in CELL if key in cell}


def subject(found: dict[str, Any]) -> str:
    """The candidate that the answers are about: the chosen one, else the one of lowest held-out loss that was looked at."""
    selection, reference = found["selection"], found["distillation"]["reference"]
    if selection["chosen"] is not None and selection["cells"][selection["chosen"]]["candidate"] != reference:
        return selection["cells"][selection["chosen"]]["candidate"]
    rest = [row for row in found["losses"] if row["looked_at"] and row["candidate"] != reference]
    return min(rest, key=lambda row: row["value"])["candidate"] if rest else reference


def _distilled(found: dict[str, Any]) -> str:
    meters, name, reference = found["distillation"]["candidates"], subject(found), found["distillation"]["reference"]
    if name == reference:
        numbers = ", ".join(f"{label} {_meter(meters[name], key)}" for key, label in _SUMMARY)
        return f"{name} has {numbers}; there is nothing to compare it with."
    verdicts = {key: meters[name][key][0]["verdict"] for key, _ in _SUMMARY}
    if verdicts["guidance"] is None:
        values = [f"{label} {_value(meters[name], key)} against {_value(meters[reference], key)}" for key, label in _SUMMARY]
        return f"Too few were measured to tell whether {name} is less distilled than {reference}: {'; '.join(values)}."
    seen = {"lower": "less distilled", "higher": "more distilled"}
    words = seen.get(verdicts["guidance"], "not measurably less distilled")
    compared = [
        f"{label} {_meter(meters[name], key)} against {_meter(meters[reference], key)}, {_difference(meters[name][key][0])}"
        for key, label in _SUMMARY
    ]
    return f"By the guidance gap {name} is {words} than {reference}: {'; '.join(compared)}."


_SUMMARY = (("guidance", "guidance gap"), ("loss", "held-out loss"))


def _value(readings: dict[str, Any], key: str) -> str:
    return f"{readings[key][0]['value']:.{decimals([readings[key][0]['value']])}f}"


def _meter(readings: dict[str, Any], key: str) -> str:
    row = readings[key][0]
    places = decimals([row["high"] if row["high"] is not None else row["value"]])
    return f"{row['value']:.{places}f} ({interval_words(row, places)})"


def _difference(row: dict[str, Any]) -> str:
    if row["verdict"] is None:
        return "too few to compare"
    if row["verdict"] not in ("higher", "lower"):
        return f"different {row['verdict']}" if row["verdict"].startswith("by") else row["verdict"]
    low, high = sorted(abs(row[key]) for key in ("difference_low", "difference_high"))
    places = decimals([high])
    return f"{row['verdict']} by {low:.{places}f} to {high:.{places}f}"


def _which(found: dict[str, Any]) -> str:
    losses, selection = found["losses"], found["selection"]
    best = min(losses, key=lambda row: row["value"])
    alike = [row["candidate"] for row in losses if row["may_be_best"]]
    by_loss = f"by held-out loss {best['candidate']} is best, {_equals(found, best['candidate'], alike)}"
    if best["low"] is None:
        by_loss = f"the held-out loss of {best['candidate']} is lowest, on too few images to say whether it is best"
    by_loss = by_loss if len(losses) > 1 else "it is the only candidate"
    if selection["chosen"] is None:
        return f"{by_loss[0].upper()}{by_loss[1:]}."
    name = selection["cells"][selection["chosen"]]["candidate"]
    alike = list(dict.fromkeys(cell["candidate"] for cell in selection["cells"] if cell.get("may_be_best")))
    return f"{name}; by its images, {_equals(found, name, alike)}; {by_loss}."


def _equals(found: dict[str, Any], name: str, alike: list[str]) -> str:
    """Who of ``alike`` cannot be told from ``name``. The reference is not offered as an equal: it is what they started from."""
    reference = found["distillation"]["reference"]
    averages = [row["candidate"] for row in found["losses"] if row["average"]]
    equal = [other for other in alike if other not in (name, reference)]
    several = [other for other in equal if other in averages]
    if len(several) > 2:
        others = "other averages" if name in averages else "averages"
        rest = len(averages) - (name in averages)
        count = f"all {rest}" if len(several) == rest else f"{len(several)} of the {rest}"
        equal = [other for other in equal if other not in averages] + [f"{count} {others}"]
    words = f"indistinguishable from it: {', '.join(equal)}" if equal else "no other may be the best"
    if reference in alike and reference != name:
        words = f"{words if equal else 'no other is as good'}; that it is better than {reference} is not shown"
    return words


def _how(found: dict[str, Any]) -> str:
    selection = found["selection"]
    limited = [n for n in selection["numbers"] if "tolerance" in n]
    if selection["chosen"] is not None:
        cell = selection["cells"][selection["chosen"]]
        price = _price(selection, cell, [n for n in limited if n["key"] != selection["by"]])
        return f"{chosen_words(selection)}.{price} {refused_words(selection)}".rstrip()
    name = subject(found)
    fine = [place_words(c) for c in selection["cells"] if c["candidate"] == name and not c["refused"]]
    return f"{UNJUDGED} Not refused: {'; '.join(fine) or f'no cell of {name}'}. {refused_words(selection)}".rstrip()


def _price(selection: dict[str, Any], cell: dict[str, Any], numbers: list[dict[str, Any]]) -> str:
    """The ``numbers`` of a cell beside those of the cell it is held against."""
    against = selection["cells"][cell["against"]]
    if not numbers:
        return ""
    own = [f"{n['label']} {number_words(cell, n['key'])}" for n in numbers]
    if against is cell:
        return f" It has {', '.join(own)}."
    pairs = [f"{text} against {number_words(against, n['key']).split()[0]}" for text, n in zip(own, numbers)]
    return f" Beside {place_words(against)}: {', '.join(pairs)}."


def _images(out: Path, found: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The chosen cell beside the reference's mildest; without a choice, the subject's most guided that is not refused."""
    selection, reference = found["selection"], found["distillation"]["reference"]
    cells, chosen = selection["cells"], selection["chosen"]
    home = next(cells[cell["against"]] for cell in cells if cell["candidate"] == reference)
    if chosen is None:
        own = [i for i, cell in enumerate(cells) if cell["candidate"] == subject(found)]
        chosen = min(own, key=lambda i: (bool(cells[i]["refused"]), -cells[i]["cfg"]))
    pair = [home] if cells[chosen] is home else [home, cells[chosen]]
    labels = {n["image"]: n["label"] for n in selection["numbers"]}
    by_cell: dict[tuple[Any, ...], list[dict[str, Any]]] = {tuple(cell.get(key) for key in CELL): [] for cell in pair}
    for row in read_index(out / "sweep" / "index.json"):
        if (place := tuple(row.get(key) for key in CELL)) in by_cell:
            by_cell[place].append(row | {"file": f"sweep/{row['file']}"})
    rows = [
        {"label": entries[0]["prompt"], "key": i, "shots": [shot(out, entry, labels) for entry in entries]}
        for i, entries in enumerate(list(zip(*by_cell.values()))[:SHOWN])
    ]
    return [place_words(cell) for cell in pair], rows


def _loss_table(losses: list[dict[str, Any]]) -> dict[str, Any]:
    places = decimals(row["value"] for row in losses)
    heads = [
        ("candidate", False),
        ("held-out loss", True),
        ("from", True),
        ("to", True),
        ("verdict", False),
        ("images", False),
    ]
    best = min(row["value"] for row in losses)
    rows = [
        [
            field(row["candidate"]),
            *(field(row[key], lambda v: f"{v:.{places + 1}f}") for key in ("value", "low", "high")),
            field("lowest" if row["value"] == best else "possibly the best" if row["may_be_best"] else "not the best"),
            field("made" if row["looked_at"] else "not made"),
        ]
        for row in losses
    ]
    return {"heads": [{"label": label, "numeric": numeric, "help": ""} for label, numeric in heads], "rows": rows}
