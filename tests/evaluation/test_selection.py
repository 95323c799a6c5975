"""Which cell is best: the chance that the truth is missed, who is refused, and what is never claimed."""

import numpy as np
import pytest
import torch
from samplings import at

from dedistill.errors import UserError
from dedistill.evaluation import numbers as sweep_numbers
from dedistill.evaluation.meters import RatioEstimate
from dedistill.evaluation.numbers import artefacts
from dedistill.evaluation.selection import compare_with_best, select

NUMBERS = [
    {"key": "accuracy", "image": "correct", "adherence": True, "label": "accuracy", "better": "high", "help": ""},
    {"key": "saturated", "image": "saturated", "tolerance": 0.02, "label": "saturated", "better": "low", "help": ""},
    {"key": "frechet", "label": "Frechet distance", "better": "low", "help": ""},
]


def simulate(rng, prompts: int, means: np.ndarray) -> RatioEstimate:
    """Normal scores whose cells share half their variance, as cells share prompts and noise."""
    shared, own = rng.normal(size=(prompts, 1)), rng.normal(size=(prompts, len(means)))
    scores = means + np.sqrt(0.5) * (shared + own)
    return RatioEstimate(scores, np.ones_like(scores))


def right_or_wrong(rng, prompts: int, chances: np.ndarray) -> RatioEstimate:
    """Readings of 0 and 1: a cell is right where a shared difficulty of the prompt is below its chance."""
    shape = prompts, len(chances)
    difficulty = np.where(rng.random(shape) < 0.7, rng.random((prompts, 1)), rng.random(shape))
    return RatioEstimate((difficulty < chances).astype(float), np.ones(shape))


def coverage(draw, prompts: int, means: np.ndarray, better: str = "high", sweeps: int = 100) -> tuple[float, float, float]:
    """How often the best is among the possibly best, how often all true differences lie in their bounds, size of the set."""
    rng, hits, bounds, size = np.random.default_rng(0), 0, 0, 0.0
    ahead = means if better == "high" else -means
    truth = np.array([ahead[i] - np.delete(ahead, i).max() for i in range(len(means))])
    for _ in range(sweeps):
        found = compare_with_best(draw(rng, prompts, means), better)
        hits += found.may_be_best[ahead.argmax()]
        bounds += ((found.difference_low <= truth + 1e-12) & (truth <= found.difference_high + 1e-12)).all()
        size += found.may_be_best.mean()
    return hits / sweeps, bounds / sweeps, size / sweeps


EQUAL, UNEQUAL = np.full(8, 0.9), np.linspace(0.6, 0.95, 8)


@pytest.mark.parametrize(
    ("draw", "prompts", "means"),
    [
        (simulate, 16, UNEQUAL),
        (right_or_wrong, 16, EQUAL),
        *(pytest.param(*row, EQUAL, marks=pytest.mark.slow) for row in ((simulate, 16), (simulate, 64), (right_or_wrong, 64))),
        pytest.param(right_or_wrong, 16, UNEQUAL, marks=pytest.mark.slow),
    ],
)
def test_the_truly_best_is_missed_once_in_twenty(draw, prompts, means):
    """Hsu 1984: of 100 sweeps, .95 less three standard errors is .885; equal means are the worst case."""
    hits, bounds, _ = coverage(draw, prompts, means)
    assert hits >= 0.885 and bounds >= 0.885


def test_the_lowest_is_best_where_low_is_better():
    hits, bounds, size = coverage(simulate, 64, np.array([1.0, 0.0, 1.0]), "low", sweeps=20)
    assert hits == 1 and bounds >= 0.8 and size == pytest.approx(1 / 3, abs=0.02)


def test_more_prompts_tell_more_cells_apart():
    sizes = [coverage(simulate, prompts, np.linspace(0, 1, 8), sweeps=20)[2] for prompts in (16, 128)]
    assert sizes[0] > sizes[1] + 0.2


def test_many_cells_are_compared_at_once():
    """15 equal cells: comparing each with the winner alone, at 5 %, would drop a given cell far more often."""
    rng, alone, together = np.random.default_rng(1), 0, 0
    for _ in range(40):
        reading = simulate(rng, 32, np.zeros(15))
        gap = reading.top[:, reading.value.argmax()] - reading.top[:, 0]
        alone += gap.mean() > 1.645 * gap.std(ddof=1) / np.sqrt(32)
        together += not compare_with_best(reading, "high").may_be_best[0]
    assert alone >= 12 and together <= 6


def test_equal_and_single_cells():
    """Cells with the same numbers are all possibly best, whatever the rounding; a cell alone is the best there is."""
    column = np.random.default_rng(0).random((20, 1))
    found = compare_with_best(RatioEstimate(np.repeat(column, 3, 1), np.ones((20, 3))), "high")
    assert found.may_be_best.all() and found.difference_low.max() <= 0 <= found.difference_high.min()
    assert compare_with_best(RatioEstimate(column, np.ones((20, 1))), "low").may_be_best.tolist() == [True]


def sweep_of(cells: dict[tuple, tuple[float, float]], prompts: int = 40, seeds=(0,)) -> tuple[dict, list[dict]]:
    """scores.json and index.json of cells (candidate, cfg, skip, steps): (accuracy, saturated)."""
    rng, rows = np.random.default_rng(0), []
    difficulty = rng.random((len(seeds), prompts))
    for (name, cfg, skip, steps), (accuracy, burnt) in cells.items():
        for s, seed in enumerate(seeds):
            for p in range(prompts):
                place = {"candidate": name, "cfg": cfg, "skip": skip, "steps": steps, "prompt": f"{p}", "seed": seed}
                rows.append({**place, "correct": float(difficulty[s, p] < accuracy), "saturated": burnt})
    places = [{"candidate": n, **at(s, c, k).facts, "nfe": at(s, c, k).nfe()} for n, c, k, s in cells]
    return {"numbers": NUMBERS, "cells": places}, rows


GUIDED = {
    ("base", 1.0, 0, 16): (0.5, 0.01),
    ("base", 4.0, 0, 16): (1.0, 0.3),
    ("last", 1.0, 0, 16): (0.6, 0.0),
    ("last", 2.0, 0, 16): (0.9, 0.019),
    ("last", 2.0, 4, 16): (0.9, 0.019),
    ("last", 3.0, 0, 16): (1.0, 0.021),
}


def test_the_best_is_chosen_among_cells_that_are_not_burnt():
    """Accuracy rises with CFG while images burn: the limit is the same weights' level at CFG 1 plus the tolerance."""
    found = select(*sweep_of(GUIDED))
    assert found["by"] == "accuracy" and [cell["against"] for cell in found["cells"]] == [0, 0, 2, 2, 2, 2]
    assert [cell["refused"] for cell in found["cells"]] == [[], ["saturated"], [], [], [], ["saturated"]]
    assert found["chosen"] == 4 and found["cells"][4]["nfe"] == 28, "of equals the cheaper one"
    assert [cell.get("may_be_best") for cell in found["cells"]] == [False, None, False, True, True, None]
    assert [n["key"] for n in found["numbers"]] == ["accuracy", "saturated"]
    assert select(*sweep_of(GUIDED), by="saturated")["chosen"] == 2


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_the_level_of_one_candidate_refuses_nothing_of_another(level):
    """A base that is burnt throughout, or never, says nothing about what guidance does to other weights."""
    damaged = GUIDED | {("base", 1.0, 0, 16): (0.5, level), ("base", 4.0, 0, 16): (1.0, level + 0.1)}
    plain, found = select(*sweep_of(GUIDED)), select(*sweep_of(damaged))
    assert [c["refused"] for c in found["cells"]] == [c["refused"] for c in plain["cells"]]
    assert found["chosen"] == plain["chosen"]


def test_guidance_that_shadows_is_refused():
    """Sharpened, darkened images of one candidate: the meter itself, in the tolerance that selection gives it."""
    even = np.random.default_rng(0).uniform(0.2, 0.8, (20, 1, 64, 64))
    falling = 1 - 0.7 * np.linspace(0, 1, 64)
    cells = [{"candidate": "last", **at(8, cfg).facts, "nfe": 8} for cfg in (1.0, 2.0, 6.0)]
    rows = []
    for cell, light in zip(cells, (1.0, 0.9, falling)):
        found = artefacts(torch.from_numpy(2 * even * light - 1))
        rows += [{**cell, "prompt": f"{p}", "seed": 0, "shadow": found["shadow"][p]} for p in range(20)]
    found = select({"numbers": sweep_numbers.NUMBERS, "cells": cells}, rows)
    assert [cell["refused"] for cell in found["cells"]] == [[], [], ["shadow"]]


def test_of_equals_the_cheapest_then_the_first_by_the_given_order():
    cells = {("a", 1.0, 0, 16): (0.9, 0.0), ("b", 1.0, 0, 8): (0.9, 0.0), ("c", 1.0, 0, 8): (0.9, 0.0)}
    assert [select(*sweep_of(cells), order=order)["chosen"] for order in ((), "cba", "abc", "acb")] == [1, 2, 1, 2]
    worse = cells | {("c", 1.0, 0, 8): (0.8, 0.0)}
    assert select(*sweep_of(worse), order="cba")["chosen"] == 1, "the number comes first"


@pytest.mark.parametrize("order", [(8, 16), (16, 8)])
def test_cells_are_held_against_the_most_steps_in_whatever_order(order):
    found = select(*sweep_of({("base", 1.0, 0, n): (0.5, 0.0) for n in order}))
    assert {found["cells"][cell["against"]]["steps"] for cell in found["cells"]} == {16}


def test_areas_without_drawing_refuse_nothing():
    """A fifth of the area of real digits lies at an end of the range: neither end of the number is better."""
    clipped = next(n for n in sweep_numbers.NUMBERS if n["key"] == "clipped")
    assert "tolerance" not in clipped and clipped["better"] is None


def test_without_a_judge_nothing_is_chosen():
    scores, rows = sweep_of({("base", 1.0, 0, 4): (0.5, 0.0), ("base", 3.0, 0, 4): (1.0, 0.1)})
    for row in rows:
        del row["correct"]
    found = select(scores, rows)
    assert found["by"] is None and found["chosen"] is None and found["cells"][1]["refused"] == ["saturated"]
    assert "may_be_best" not in found["cells"][0]


def test_seeds_of_one_prompt_go_together():
    """Sixteen images of a prompt that are alike are one piece of evidence: the interval is that of one of them."""
    cells = {("base", 1.0, 0, 4): (0.5, 0.0), ("last", 1.0, 0, 4): (0.6, 0.0)}
    scores, rows = sweep_of(cells)
    many = [{**row, "seed": seed} for row in rows for seed in range(16)]
    once, often = (select(scores, r)["cells"][0]["numbers"]["accuracy"] for r in (rows, many))
    assert once == pytest.approx(often)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s, r: None, {"by": "frechet"}, "--by: images were not scored by 'frechet'; there are accuracy, saturated"),
        (lambda s, r: r.pop(), {}, "different prompts or seeds"),
        (lambda s, r: [row.update(prompt="same") for row in r], {}, "--prompts: 1 different prompt is too few to choose by"),
    ],
)
def test_what_cannot_be_selected_is_refused(change, options, message):
    scores, rows = sweep_of({("base", 1.0, 0, 4): (0.5, 0.0), ("last", 1.0, 0, 4): (0.6, 0.0)})
    change(scores, rows)
    with pytest.raises(UserError, match=message):
        select(scores, rows, **options)
