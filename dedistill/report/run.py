"""The page of one run: its curves over the steps, the loss of each bin of sigma, and what went wrong on the way."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dedistill.errors import UserError, amount
from dedistill.io.atomic import replace_file
from dedistill.io.json_files import read_object
from dedistill.io.ownership import claim
from dedistill.recipe.objectives import PARTS
from dedistill.report.pages import field, figure, is_number, number, render
from dedistill.report.plots import heat_map
from dedistill.runs.metrics import read_rows

POINTS = 200
"""A curve of more rows is drawn as so many averages of neighbours."""
BIN_POINTS = 50
"""The same for the bins of sigma, whose losses scatter more."""
LOG_RATIO = 40
NEEDED = {"loss", "lr", "grad_norm", "applied"}
LISTED = 200
OF_PARTS = (("loss", "training loss"), ("val_loss", "held-out loss"))
CURVES = (
    (
        "loss",
        "training loss",
        "Mean of a batch. It scatters with the noise levels that were drawn; the held-out loss does not.",
    ),
    (
        "val_loss",
        "held-out loss",
        "Always the same samples, noise and sigmas; its 95 % interval from 16 images on.",
    ),
    *((f"{key}_{part}", f"{title}, {part}", "") for part in PARTS for key, title in OF_PARTS),
    ("grad_norm", "gradient norm", "Before clipping."),
    ("lr", "learning rate", ""),
    ("guidance_gap", "guidance gap", "Between velocities with and without a caption. Baked-in guidance widens it."),
    ("straightness", "straightness", "How far velocities are from the chord of their path; 0 is straight."),
    ("few_step_gap", "few-step gap", "What 4 steps miss of the full path, as a share of its squared length."),
)


class Curve:
    """The rows that have a number of one name: its steps and values, and its standard errors where all of them have one."""

    def __init__(self, key: str) -> None:
        self.error_key = f"{key}_se"
        self.steps, self.values, self.errors = array("d"), array("d"), array("d")


class Record:
    """What the page shows of a run's rows, which are read once and not kept: a million of them take some 150 MB."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.curves = {key: Curve(key) for key, *_ in CURVES}
        self.bins: dict[int, tuple[array[float], array[float]]] = {}
        """Number of bins -> steps, and losses bin by bin, NaN where none fell; the kind that came last is the last."""
        self.bad: list[dict[str, Any]] = []
        """The first LISTED rows of steps that were not applied, or from which the run went on anew."""
        self.latest = 0
        """Bins of the row before."""
        self.bad_count = self.not_applied = self.left_out = self.last_step = 0
        for row in rows:
            self._add(row)

    def _add(self, row: Mapping[str, Any]) -> None:
        step = self.last_step = row["step"]
        for key in row.keys() & self.curves.keys():
            if is_number(value := row[key]):
                curve = self.curves[key]
                curve.steps.append(step)
                curve.values.append(value)
                if curve.error_key in row and is_number(error := row[curve.error_key]):
                    curve.errors.append(error)
        if losses := row.get("sigma_loss"):
            self._add_bins(step, losses)
        applied = row.get("applied", True)
        if not applied or "quarantined" in row:
            self.bad_count += 1
            self.not_applied += not applied
            self.left_out += len(row.get("quarantined", ()))
            self.bad += [dict(row)] if len(self.bad) < LISTED else []

    def _add_bins(self, step: int, losses: list[float | None]) -> None:
        if self.latest != len(losses):  # what came last is the last of the table
            self.latest = len(losses)
            self.bins[self.latest] = self.bins.pop(self.latest, (array("d"), array("d")))
        steps, values = self.bins[self.latest]
        steps.append(step)
        values.extend([math.nan if loss is None else loss for loss in losses])


def write_run_page(run: Path) -> Path:
    """Write ``report/index.html`` into the folder of a ``run``, which may still go on or have broken off; returns its path.

    Raises UserError without recipe.json or without a row in metrics.jsonl.
    """
    recipe, record = _recipe(run / "recipe.json"), Record(_rows(run))
    if not record.last_step:
        raise UserError(f"{run / 'metrics.jsonl'}: no row yet; is '{run}' the folder of a run that has made a step?")
    html = render(
        "run.html.j2",
        title=f"Run: {recipe['run']['name']}",
        facts=_facts(recipe, record),
        plots=[plot for key, label, help in CURVES if (plot := _plot(record, key, label, help))],
        bins=_bins(record),
        table=_table(record),
        bad=[_trouble(row) for row in record.bad],
        bad_count=record.bad_count,
    )
    page = run / "report" / "index.html"
    claim(page.parent, "report", "the page's folder")
    replace_file(page, html.encode())
    return page


def _rows(run: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(run / "metrics.jsonl"):
        if not row.keys() >= NEEDED:
            missing = min(NEEDED - row.keys())
            raise UserError(
                f"{run / 'metrics.jsonl'}: the row of step {row['step']} has no {missing!r}: not the record of a run"
            )
        yield row


def _recipe(path: Path) -> dict[str, Any]:
    recipe = read_object(path, otherwise=f"is '{path.parent}' the folder of a run?")
    try:
        return {"run": {"name": recipe["run"]["name"]}, "train": {k: recipe["train"][k] for k in ("steps", "objective")}}
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: damaged ({e!r}); restore it, or take metrics.jsonl to a folder with a whole one") from e


def _facts(recipe: dict[str, Any], record: Record) -> dict[str, str]:
    steps, done = recipe["train"]["steps"], record.last_step
    return {
        "objective": recipe["train"]["objective"],
        "steps": f"{done:,} of {steps:,}" + ("" if done < steps else ", finished"),
        "steps not applied": f"{record.not_applied:,}",
        "samples left out": f"{record.left_out:,}",
    }


def _groups(rows: int, most: int) -> list[slice]:
    """Neighbouring rows together, at most ``most`` groups of nearly the same size."""
    edges = np.linspace(0, rows, min(most, rows) + 1).round().astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(edges)]


def averaged(record: Record, key: str, most: int = POINTS) -> list[tuple[float, ...]]:
    """(step, value), or (step, value, low, high) where a standard error was logged, of at most ``most`` groups of rows.

    A group's error is the mean of its errors: the held-out samples are the same each time, so that averaging over steps
    does not narrow it.
    """
    curve = record.curves[key]
    steps, values, errors = (np.asarray(column) for column in (curve.steps, curve.values, curve.errors))
    groups = _groups(len(steps), most)
    points: list[tuple[float, ...]] = [(float(steps[g].mean()), float(values[g].mean())) for g in groups]
    if len(errors) == len(values):
        reach = [1.96 * float(errors[g].mean()) for g in groups]
        points = [(step, value, value - r, value + r) for (step, value), r in zip(points, reach)]
    return points


def _plot(record: Record, key: str, label: str, help: str) -> dict[str, Any] | None:
    points = averaged(record, key)
    if not points:
        return None
    values = [value for _, value, *_ in points]
    marks = [(row["step"], _what(row)) for row in record.bad] if key in ("loss", "grad_norm") else []
    log = min(values) > 0 and max(values) > LOG_RATIO * min(values) and key != "lr"
    return figure({label: points}, title=label, xlabel="step", ylabel=label, help=help, log_y=log, marks=marks)


def bins_over_time(record: Record, most: int = BIN_POINTS) -> tuple[list[float], list[list[float | None]]]:
    """Steps of at most ``most`` groups of rows, and per bin of sigma the mean loss of each group; None where none fell.

    Rows with another number of bins than the last one has are left out.
    """
    if not record.bins:
        return [], []
    count, (numbers, losses) = list(record.bins.items())[-1]
    steps, table = np.asarray(numbers), np.asarray(losses).reshape(-1, count)
    groups = _groups(len(steps), most)
    means = [[_mean(table[g, b]) for g in groups] for b in range(count)]
    return [float(steps[g].mean()) for g in groups], means


def _mean(losses: np.ndarray) -> float | None:
    known = losses[~np.isnan(losses)]
    return float(known.mean()) if len(known) else None


def _bin_labels(count: int) -> list[str]:
    return [f"{b / count:.2f}–{(b + 1) / count:.2f}" for b in range(count)]


def _bins(record: Record) -> list[dict[str, Any]]:
    """The losses by sigma as lines and as a heat map; nothing where no row has them."""
    steps, means = bins_over_time(record)
    labels = _bin_labels(len(means))
    known = {label: [v for v in values if v is not None] for label, values in zip(labels, means)}
    if not any(known.values()):
        return []
    lines = {"σ " + label: [(s, v) for s, v in zip(steps, values) if v is not None] for label, values in zip(labels, means)}
    parts = {
        label: [None if not v else v / float(np.mean(known[label])) for v in values] for label, values in zip(labels, means)
    }
    title = "loss over its mean in the run"
    svg = heat_map(steps, parts, title="change by sigma", xlabel="step", ylabel="sigma", unit=title)
    cells = [(label, number(s), number(v)) for label, values in parts.items() for s, v in zip(steps, values) if v]
    heat = {"svg": Markup(svg), "title": title, "heads": ["sigma", "step", title], "rows": cells}
    heat["help"] = "Each bin's loss over its own mean in the run; fuller is higher. A bin that learns fades from left to right."
    help = "1 is noise. Noise levels differ in how much can be known, so a bin is to be compared with itself."
    return [figure(lines, title="loss by sigma", xlabel="step", ylabel="loss", help=help), heat]


def _table(record: Record) -> dict[str, Any]:
    """First, last, least and largest value of everything that was logged."""
    curves = {label: averaged(record, key) for key, label, _ in CURVES}
    steps, means = bins_over_time(record)
    for label, values in zip(_bin_labels(len(means)), means):
        curves[f"loss, σ {label}"] = [(s, v) for s, v in zip(steps, values) if v is not None]
    lines = []
    for label, points in curves.items():
        if points:
            own: list[float] = [point[1] for point in points]
            numbers = [own[0], own[-1], own[-1] - own[0], min(own), max(own)]
            lines.append([field(label), *(field(v, "{:.4g}".format) for v in numbers)])
    heads = ["number", "first", "last", "change", "least", "largest"]
    return {"heads": [{"label": h, "help": "", "numeric": h != "number"} for h in heads], "rows": lines}


def _what(row: dict[str, Any]) -> str:
    reasons = []
    if not row["applied"]:
        reasons.append("not finite, not applied" if "not_finite" in row else "a spike, not applied")
    if left_out := row.get("quarantined"):
        reasons.append(f"trained again from here without {amount(len(left_out), 'sample')}")
    return f"step {row['step']:,}: " + "; ".join(reasons)


def _trouble(row: dict[str, Any]) -> dict[str, str]:
    samples = [*row.get("quarantined", ()), *row.get("not_finite", ()), *row.get("spike", ())]
    names = ", ".join(dict.fromkeys(entry["sample"] for entry in samples))
    return {"what": _what(row), "loss": f"{row['loss']}", "norm": f"{row['grad_norm']}", "samples": names}
