"""The page of what dedistill measure found: one table of verdicts, curves with intervals, every number."""

from pathlib import Path
from typing import Any

from dedistill.data.split import LEAST_UNITS
from dedistill.errors import amount
from dedistill.io.atomic import replace_file, replace_json
from dedistill.report.pages import decimals, field, figure, render
from dedistill.report.plots import tick_label

LOG = ("few_steps",)
"""Meters whose values span powers of ten."""


def write_distillation_page(folder: Path, found: dict[str, Any]) -> Path:
    """Write ``distillation.json`` and ``index.html`` into ``folder`` and return the page's path.

    found: what ``dedistill.evaluation.distillation.measure`` returns.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / "distillation.json", found)
    names = [*found["candidates"]]
    page = folder / "index.html"
    html = render(
        "distillation.html.j2",
        title=found["title"],
        settings=found["settings"],
        few=few_words(found),
        reference=found["reference"],
        names=names,
        summary=[row for meter in found["meters"] if _in_summary(meter) for row in _summary(meter, found)],
        plots=[_plot(meter, found) for meter in found["meters"] if meter["axis"]],
        numbers=_numbers(found),
    )
    replace_file(page, html.encode())
    return page


def few_words(found: dict[str, Any]) -> str:
    """What a reader must know where there are too few images or prompts for intervals; empty otherwise."""
    counts = ((found["images"], "held-out image"), (found["distinct_prompts"], "different prompt"))
    few = [amount(count, what) for count, what in counts if count is not None and count < LEAST_UNITS]
    if not few:
        return ""
    return (
        f"Measured on {' and '.join(few)}: with fewer than {LEAST_UNITS} no interval is given and nothing is called higher or "
        "lower, since other images could say otherwise. Hold out more (data.held_out), each image once "
        "(a run for each data.fold, then dedistill measure --folds), or give more prompts (--prompts)."
    )


def _in_summary(meter: dict[str, Any]) -> bool:
    return meter["axis"] is None or meter["key"] == "few_steps"


def _summary(meter: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """A line per place of a meter, with a cell per candidate."""
    by_name = {name: rows[meter["key"]] for name, rows in found["candidates"].items()}
    lines = []
    for cells in zip(*by_name.values()):
        places = decimals(cell["value"] for cell in cells)
        at = cells[0].get("at")
        unit = f", {amount(at, 'step')}" if at is not None else ""
        texts = [
            {
                "value": f"{cell['value']:.{places}f}",
                "interval": interval_words(cell, places),
                "verdict": cell.get("verdict"),
            }
            for cell in cells
        ]
        lines.append({"label": meter["label"] + unit, "help": meter["help"], "cells": texts})
    return lines


def interval_words(row: dict[str, Any], places: int) -> str:
    """From where to where, or why that is not said."""
    if row["low"] is None:
        return f"no interval: {row['units']} different"
    return f"{row['low']:.{places}f} to {row['high']:.{places}f}"


def _plot(meter: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    series = {
        name: [
            (round(row["at"], 3), row["value"], *((row["low"], row["high"]) if row["low"] is not None else ()))
            for row in rows[meter["key"]]
        ]
        for name, rows in found["candidates"].items()
    }
    label, log = meter["label"], meter["key"] in LOG
    return figure(series, title=label, xlabel=meter["axis"], ylabel=label, help=meter["help"], log_y=log)


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Every value as a sortable table: meter, place, candidate, value and interval, difference and interval."""
    lines = []
    keys = ("value", "low", "high", "difference", "difference_low", "difference_high")
    for meter in found["meters"]:
        for name, rows in found["candidates"].items():
            for row in rows[meter["key"]]:
                at = f"{meter['axis']} {tick_label(row['at'])}" if "at" in row else ""
                lines.append([*map(field, (meter["label"], at, name)), *(field(row.get(k), "{:.4g}".format) for k in keys)])
    heads = ["meter", "at", "candidate", "value", "from", "to", "difference", "from", "to"]
    return {"heads": [{"label": h, "help": "", "numeric": i > 2} for i, h in enumerate(heads)], "rows": lines}
