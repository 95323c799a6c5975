"""The page of one run: its curves over the steps, the loss of each bin of sigma, and what went wrong on the way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dedistill.errors import UserError, amount
from dedistill.io.json_files import read_object
from dedistill.io.ownership import claim
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
    ("grad_norm", "gradient norm", "Before clipping."),
    ("lr", "learning rate", ""),
    ("guidance_gap", "guidance gap", "Between velocities with and without a caption. Baked-in guidance widens it."),
    ("straightness", "straightness", "How far velocities are from the chord of their path; 0 is straight."),
    ("few_step_gap", "few-step gap", "What 4 Euler steps miss of the full path, as a share of its squared length."),
)


def write_run_page(run: Path) -> Path:
    """Write ``report/index.html`` into the folder of a ``run``, which may still go on or have broken off; returns its path.

    Raises UserError without recipe.json or without a row in metrics.jsonl.
    """
    recipe, rows = _recipe(run / "recipe.json"), read_rows(run / "metrics.jsonl")
    if not rows:
        raise UserError(f"{run / 'metrics.jsonl'}: no row yet; is '{run}' the folder of a run that has made a step?")
    for row in rows:
        if missing := NEEDED - row.keys():
            raise UserError(
                f"{run / 'metrics.jsonl'}: the row of step {row['step']} has no {min(missing)!r}: not the record of a run"
            )
    bad = [row for row in rows if not row["applied"] or "quarantined" in row]
    html = render(
        "run.html.j2",
        title=f"Run: {recipe['run']['name']}",
        facts=_facts(recipe, rows, bad),
        plots=[plot for key, label, help in CURVES if (plot := _plot(rows, key, label, help, bad))],
        bins=_bins(rows),
        table=_table(rows),
        bad=[_trouble(row) for row in bad[:LISTED]],
        bad_count=len(bad),
    )
    page = run / "report" / "index.html"
    claim(page.parent, "report", "the page's folder")
    page.write_text(html, encoding="utf-8")
    return page


def _recipe(path: Path) -> dict[str, Any]:
    recipe = read_object(path, otherwise=f"is '{path.parent}' the folder of a run?")
    try:
        return {"run": {"name": recipe["run"]["name"]}, "train": {k: recipe["train"][k] for k in ("steps", "objective")}}
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: damaged ({e!r}); restore it, or take metrics.jsonl to a folder with a whole one") from e


def _facts(recipe: dict[str, Any], rows: list[dict[str, Any]], bad: list[dict[str, Any]]) -> dict[str, str]:
    steps, done = recipe["train"]["steps"], rows[-1]["step"]
    return {
        "objective": recipe["train"]["objective"],
        "steps": f"{done:,} of {steps:,}" + ("" if done < steps else ", finished"),
        "steps not applied": f"{sum(not row['applied'] for row in bad):,}",
        "samples left out": f"{sum(len(row.get('quarantined', ())) for row in bad):,}",
    }


def _groups(rows: list[dict[str, Any]], most: int) -> list[list[dict[str, Any]]]:
    """Neighbouring rows together, at most ``most`` groups of nearly the same size."""
    edges = np.linspace(0, len(rows), min(most, len(rows)) + 1).round().astype(int)
    return [rows[a:b] for a, b in pairwise(edges)]


def _mean(group: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in group]))


def averaged(rows: list[dict[str, Any]], key: str, most: int = POINTS) -> list[tuple[float, ...]]:
    """(step, value), or (step, value, low, high) where a standard error was logged, of at most ``most`` groups of rows.

    A group's error is the mean of its errors: the held-out samples are the same each time, so that averaging over steps
    does not narrow it.
    """
    groups = _groups([row for row in rows if is_number(row.get(key))], most)
    points: list[tuple[float, ...]] = [(_mean(group, "step"), _mean(group, key)) for group in groups]
    if all(is_number(row.get(key + "_se")) for group in groups for row in group):
        reach = [1.96 * _mean(group, key + "_se") for group in groups]
        points = [(step, value, value - r, value + r) for (step, value), r in zip(points, reach)]
    return points


def _plot(rows: list[dict[str, Any]], key: str, label: str, help: str, bad: list[dict[str, Any]]) -> dict[str, Any] | None:
    points = averaged(rows, key)
    if not points:
        return None
    values = [value for _, value, *_ in points]
    marks = [(row["step"], _what(row)) for row in bad] if key in ("loss", "grad_norm") else []
    log = min(values) > 0 and max(values) > LOG_RATIO * min(values) and key != "lr"
    return figure({label: points}, title=label, xlabel="step", ylabel=label, help=help, log_y=log, marks=marks)


def bins_over_time(rows: list[dict[str, Any]], most: int = BIN_POINTS) -> tuple[list[float], list[list[float | None]]]:
    """Steps of at most ``most`` groups of rows, and per bin of sigma the mean loss of each group; None where none fell.

    Rows with another number of bins than the last one has are left out.
    """
    logged = [row for row in rows if row.get("sigma_loss")]
    count = len(logged[-1]["sigma_loss"]) if logged else 0
    groups = _groups([row for row in logged if len(row["sigma_loss"]) == count], most) if logged else []
    columns = [
        [[row["sigma_loss"][b] for row in group if row["sigma_loss"][b] is not None] for b in range(count)] for group in groups
    ]
    means = [[float(np.mean(column[b])) if column[b] else None for column in columns] for b in range(count)]
    return [_mean(group, "step") for group in groups], means


def _bin_labels(count: int) -> list[str]:
    return [f"{b / count:.2f}–{(b + 1) / count:.2f}" for b in range(count)]


def _bins(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses by sigma as lines and as a heat map; nothing where no row has them."""
    steps, means = bins_over_time(rows)
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


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """First, last, least and largest value of everything that was logged."""
    curves = {label: averaged(rows, key) for key, label, _ in CURVES}
    steps, means = bins_over_time(rows)
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
