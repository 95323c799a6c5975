"""Which cell of a sweep is best: by one number, among cells whose images are not damaged, as far as the prompts tell.

The statistics are multiple comparisons with the best (Hsu 1984, Ann. Statist. 12; Edwards & Hsu 1983, JASA 78): every
place of a reading is compared with all the others at once, so that in 19 of 20 selections the truly best place is among
those that are called possibly best, however many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dedistill.data.split import LEAST_UNITS
from dedistill.errors import UserError
from dedistill.evaluation.meters import LEVEL, RatioEstimate, interval, ratio, resamples
from dedistill.evaluation.prompts import check_prompts

CELL = ("candidate", "cfg", "skip", "steps", "method")


@dataclass(frozen=True)
class Comparison:
    """Of every place [M]: its value with an interval of its own; how much better it is than the best of the others, with
    simultaneous bounds (low <= 0 <= high); and whether it may be the best."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    difference: np.ndarray
    difference_low: np.ndarray
    difference_high: np.ndarray
    may_be_best: np.ndarray


def compare_with_best(reading: RatioEstimate, better: str) -> Comparison:
    """Compare the places of ``reading``, paired sample by sample. better: "high" or "low", which values are.

    For each place i the largest of (d*_ij - d_ij) / s_ij over the others j is bootstrapped (d: how much better j is than i,
    s: its standard error); its 95 % point c_i bounds what chance adds to every d_ij at once. A truly best place has no d_ij
    above 0, so 19 times in 20 none of them exceeds c_i s_ij; places of which one does are not called possibly best. The
    bounds of the differences follow from the same event.
    """
    sign = {"high": 1.0, "low": -1.0}[better]
    weights = resamples(len(reading.top))
    value, draws = reading.value, ratio(weights, reading)
    low, high = interval(draws, reading)
    # what each sample adds to each ratio, to first order: its derivative by the sample's weight
    pull = sign * (reading.top - value * reading.bottom) / reading.bottom.mean(0)
    ahead = sign * (value[None] - value[:, None])  # [i, j]: how much better j is than i
    if len(reading.top) < LEAST_UNITS:  # then nothing can be told apart
        chance = np.full(ahead.shape, np.inf)
    else:
        chance = np.stack([_chance(weights, pull - pull[:, [i]]) for i in range(len(value))])
    others = ~np.eye(len(value), dtype=bool)
    equal = 1e-12 * np.abs(value).max()  # sums of the same numbers differ by rounding
    may_be_best = (ahead <= chance + equal).all(1)
    rivals = others & may_be_best[None]
    smallest: dict[str, Any] = {"axis": 1, "initial": np.inf}
    lower = np.min(-ahead - chance.T, where=rivals, **smallest)
    return Comparison(
        value,
        low,
        high,
        np.min(-ahead, where=others, **smallest),
        np.where(rivals.any(1), lower.clip(max=0), 0.0),
        np.min(chance - ahead, where=others, **smallest).clip(0),
        may_be_best,
    )


def _chance(weights: np.ndarray, pulls: np.ndarray) -> np.ndarray:
    """The widths [M] that the errors of M means of ``pulls`` [N, M] exceed nowhere, 95 times in 100.

    Each resample's errors are measured in its own standard error (bootstrap-t: Efron & Tibshirani 1993, ch. 12.5), as few
    samples that differ make mean and spread err together; at least half the data's own, as a resample may hold none of them.
    Where every pull is zero so far, the next may not be: the error is that of one sample among N (nearly the rule of three).
    """
    count = len(pulls)
    error = pulls.std(0, ddof=1) / np.sqrt(count)
    error = np.where(error > 1e-9 * error.max(), error, np.abs(pulls).max() / count)
    pulls = pulls - pulls.mean(0)
    mean = weights @ pulls / count
    own = np.sqrt((weights @ pulls**2 / count - mean**2).clip(0) / (count - 1))
    own = np.maximum(own, error / 2)
    scaled = np.divide(mean, own, out=np.zeros_like(mean), where=own > 0)
    return error * np.quantile(scaled.max(1), LEVEL)


def select(
    scores: dict[str, Any],
    rows: list[dict[str, Any]],
    *,
    by: str | None = None,
    order: Sequence[str] = (),
    reference: str | None = None,
) -> dict[str, Any]:
    """Judge the cells of a sweep (``scores.json`` and the ``rows`` of ``index.json``) by ``scores["numbers"]``.

    A cell is refused when a number with a tolerance may be worse by more than it, prompt by prompt, than in the cell
    ``against`` which it is held: its own candidate's nearest CFG 1, in the most steps. The rest is compared by number
    ``by``, default the first that tells whether images show what was asked; without one nothing is chosen. order:
    candidates, those first that are taken where number and cost are equal; default as listed. reference: the one that the
    others are to be better than, so that it is never a cheaper choice among equals. Returns what selection.json holds. Raises
    UserError for a number that there is not, too few prompts, or cells of different prompts.
    """
    cells = [{key: cell[key] for key in (*CELL, "nfe") if key in cell} for cell in scores["cells"]]
    known = {n["key"]: n for n in scores["numbers"] if "image" in n}
    readings = {key: found for key, n in known.items() if (found := _reading(cells, rows, n["image"]))}
    ranking_metric = _ranking_metric(known, readings, by)
    for cell in cells:
        cell |= {"against": _mildest(cells, cell["candidate"]), "numbers": {}, "refused": []}
    for key, reading in readings.items():
        _fill(cells, known[key], reading)
    allowed = [i for i, cell in enumerate(cells) if not cell["refused"]]
    order = [*order, *(cell["candidate"] for cell in cells)]
    chosen = (
        _compare(cells, allowed, readings[ranking_metric], known[ranking_metric]["better"], order) if ranking_metric else None
    )
    return {
        "by": ranking_metric,
        "numbers": [known[key] for key in readings],
        "prompts": len({row["prompt"] for row in rows}),
        "undecided": _undecided(cells, chosen, known[ranking_metric] if ranking_metric else None),
        "reference": reference,
        "chosen": chosen,
        "cells": cells,
    }


def _mildest(cells: list[dict[str, Any]], candidate: str) -> int:
    """The candidate's cell nearest CFG 1, in the most steps: the same weights, prompts and noise, hardly guided."""
    own = [i for i, cell in enumerate(cells) if cell["candidate"] == candidate]
    return min(own, key=lambda i: (abs(cells[i]["cfg"] - 1), -cells[i]["steps"]))


def _ranking_metric(known: dict[str, dict[str, Any]], readings: dict[str, RatioEstimate], by: str | None) -> str | None:
    usable = [key for key in readings if known[key]["better"]]
    if by is None:
        return next((key for key in usable if known[key].get("adherence")), None)
    if by not in usable:
        raise UserError(f"--by: images were not scored by '{by}'; there are {', '.join(usable) or 'no such numbers'}", 2)
    return by


def _reading(cells: list[dict[str, Any]], rows: list[dict[str, Any]], key: str) -> RatioEstimate | None:
    """A number of images as [prompts, cells]; images that lack it in some cell do not count. None where no cell has it."""
    by_cell: dict[tuple[Any, ...], list[dict[str, Any]]] = {tuple(cell.get(k) for k in CELL): [] for cell in cells}
    for row in rows:
        by_cell[tuple(row.get(k) for k in CELL)].append(row)
    if len({tuple((row["prompt"], row["seed"]) for row in own) for own in by_cell.values()}) > 1:
        raise UserError("the cells of this sweep were made from different prompts or seeds: run the sweep again")
    values = np.array([[row.get(key, np.nan) for row in own] for own in by_cell.values()]).T
    there = np.isfinite(values).all(1)
    if not there.any():
        return None
    prompts = np.array([row["prompt"] for row in next(iter(by_cell.values()))])[there]
    names, place = np.unique(prompts, return_inverse=True)
    check_prompts(names.tolist())
    top, bottom = np.zeros((len(names), len(cells))), np.zeros((len(names), len(cells)))
    np.add.at(top, place, values[there])
    np.add.at(bottom, place, 1.0)
    return RatioEstimate(top, bottom)


def _fill(cells: list[dict[str, Any]], number: dict[str, Any], reading: RatioEstimate) -> None:
    """Each cell's value of ``number`` with its interval, and whether it may be too much worse than in the cell ``against``.

    prompts_needed: about how many would tell that it is not, where its value is within the tolerance (intervals shrink with
    the root of their number); infinite where it is not.
    """
    draws = reading.resampled()
    low, high = interval(draws, reading)
    sign = -1.0 if number["better"] == "high" else 1.0
    against = [cell["against"] for cell in cells]
    worse = sign * (reading.value - reading.value[against])
    worst = interval(sign * (draws - draws[:, against]), reading)[1]
    limit = number.get("tolerance", np.inf)
    for i, cell in enumerate(cells):
        cell["numbers"][number["key"]] = {"value": float(reading.value[i]), "low": float(low[i]), "high": float(high[i])}
        if worst[i] > limit:
            cell["refused"].append(number["key"])
            needed = len(reading.top) * ((worst[i] - worse[i]) / (limit - worse[i])) ** 2 if worse[i] < limit else np.inf
            cell["prompts_needed"] = max(cell.get("prompts_needed", 0.0), float(needed))


def _undecided(cells: list[dict[str, Any]], chosen: int | None, ranking_metric: dict[str, Any] | None) -> dict[str, Any] | None:
    """Cells better than the chosen one by ``ranking_metric`` that are refused only for what so few prompts leave open: how many
    there are, and how many prompts would decide half of them. None where there are none. Takes ``prompts_needed`` out."""
    found = [(cell, needed) for cell in cells if np.isfinite(needed := cell.pop("prompts_needed", np.inf))]
    if chosen is not None and ranking_metric:
        key, sign = ranking_metric["key"], 1 if ranking_metric["better"] == "high" else -1
        least = sign * cells[chosen]["numbers"][key]["value"]
        found = [(cell, needed) for cell, needed in found if sign * cell["numbers"][key]["value"] > least]
    if not found:
        return None
    wanted = float(np.median([needed for _, needed in found]))
    return {"cells": len(found), "prompts": int(-(-wanted // LEAST_UNITS) * LEAST_UNITS)}


def _compare(cells: list[dict[str, Any]], allowed: list[int], reading: RatioEstimate, better: str, order: list[str]) -> int:
    """Fill in how the ``allowed`` cells compare, and return the best; of equals the cheapest, then the first by ``order``."""
    found = compare_with_best(RatioEstimate(reading.top[:, allowed], reading.bottom[:, allowed]), better)
    for k, i in enumerate(allowed):
        cells[i]["may_be_best"] = bool(found.may_be_best[k])
        if len(allowed) > 1:
            names = ("difference", "difference_low", "difference_high")
            cells[i] |= {name: float(getattr(found, name)[k]) for name in names}
    sign = 1.0 if better == "high" else -1.0

    def rank(i: int) -> tuple[float, int, int]:
        return round(sign * reading.value[i], 12), -cells[i]["nfe"], -order.index(cells[i]["candidate"])

    return max(allowed, key=rank)
