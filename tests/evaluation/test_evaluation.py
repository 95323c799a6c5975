"""The three answers after a run: what is measured of whom, what is kept, and what the pages say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from closed_form_models import ClosedFormData, closed_form
from samplings import at

from dedistill.errors import UserError
from dedistill.evaluation.distillation import EvalSettings, evaluate_candidate, measure, result_file
from dedistill.evaluation.evaluate import evaluate, shortlist
from dedistill.evaluation.meters import RatioEstimate
from dedistill.evaluation.prompts import read_prompts
from dedistill.evaluation.selection import select
from dedistill.evaluation.sweep import Candidate, Grid, guiders_at, read_scores
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.recipe import load_recipe
from dedistill.report.evaluation import three_answers, write_evaluation
from dedistill.report.selection import rule, undecided_words, verdict, write_selection_page

RECIPE = load_recipe("dedistill:digits/teacher")
PROMPTS = [f"{i % 2}" + " " * i for i in range(16)]
"""Different texts that are one of two labels to the closed form."""


class Candidates:
    """Closed forms by the guidance that is baked into them, with a record of who was opened."""

    def __init__(self):
        self.opened: list[str] = []

    def make(self, name: str, baked: float, weights: str = "w") -> Candidate:
        def load():
            self.opened.append(name)
            return closed_form(baked=baked)

        return Candidate(name, f"{name} {weights}", 3, load, average=name.startswith("average"))

    def run(self, last: str = "w") -> list[Candidate]:
        averages = [self.make(f"average {i}", 1 + 1e-9 * i) for i in range(5)]
        return [self.make("base", 3.0), *averages, self.make("average bad", 4.0), self.make("last", 1.0, last)]


def eval_settings(**changes) -> EvalSettings:
    asked = {"samples": 32, "steps": 3, "few": (1, 2), "cfgs": (1.0, 3.0), **changes}
    return EvalSettings(recipe=RECIPE, source=ClosedFormData(), judge=None, prompts=PROMPTS, **asked)


GRID = Grid(guiders_at((1.0, 3.0)), tuple(PROMPTS), (0,))


def evaluated(out: Path, candidates: Candidates, last: str = "w") -> dict:
    return evaluate([candidates.run(last)], eval_settings(), GRID, out, names="t", say=lambda line: None)


def test_results_are_stored_exactly_and_by_what_was_measured(tmp_path):
    """The same weights and settings open nothing; with other weights, other settings or a damaged file it is measured again."""
    c = Candidates()
    first = evaluate_candidate(c.make("a", 2.0), eval_settings(), tmp_path)
    again = evaluate_candidate(c.make("a", 2.0), eval_settings(), tmp_path)
    assert c.opened == ["a"] and again.places == first.places and again.image == first.image
    assert again.readings.keys() == first.readings.keys()
    for key, reading in first.readings.items():
        stored = again.readings[key]
        assert np.array_equal(stored.top, reading.top) and np.array_equal(stored.bottom, reading.bottom)
        assert np.array_equal(stored.resampled(), reading.resampled(), equal_nan=True)
    evaluate_candidate(c.make("a", 2.0, "other"), eval_settings(), tmp_path)
    evaluate_candidate(c.make("a", 2.0, "other"), eval_settings(samples=48), tmp_path)
    file = result_file(tmp_path, "a", "paths")
    file.write_bytes(file.read_bytes().replace(b"0.", b"1.", 1))
    evaluate_candidate(c.make("a", 2.0, "other"), eval_settings(samples=48), tmp_path)
    assert c.opened == ["a"] * 4


def test_results_of_an_earlier_version_are_read(tmp_path):
    """It called curvature "bend", the turning angle "turning" and the shape of images "picture"."""
    c = Candidates()
    first = measure([c.make("a", 2.0)], eval_settings(), reference=None, title="t", results=tmp_path, say=lambda line: None)
    for file in tmp_path.iterdir():
        table = read_checksummed(file)
        table["picture"] = table.pop("image")
        for part in (table["places"], table["readings"]):
            part |= {old: part.pop(new) for new, old in (("curvature", "bend"), ("turning_angle", "turning")) if new in part}
        file.write_bytes(checksummed(table))
    again = measure([c.make("a", 2.0)], eval_settings(), reference=None, title="t", results=tmp_path, say=lambda line: None)
    assert again == first and c.opened == ["a"]


def test_other_held_out_samples_are_other_settings():
    class Other(ClosedFormData):
        def draw(self, *arguments, **options):
            batch = super().draw(*arguments, **options)
            return replace(batch, latents=batch.latents + 1e-3)

    assert replace(eval_settings(), source=Other()).identity != eval_settings().identity == eval_settings().identity


def test_measuring_twice_opens_nothing(tmp_path):
    c = Candidates()
    options = {"reference": None, "title": "t", "results": tmp_path, "say": lambda line: None}
    first = measure([c.make("a", 1.0), c.make("b", 2.0)], eval_settings(), **options)
    assert c.opened == ["a", "b"]
    assert measure([c.make("a", 1.0), c.make("b", 2.0)], eval_settings(), **options) == first and c.opened == ["a", "b"]


def test_the_shortlist_spreads_over_averages_that_may_be_best():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(64, 1))
    names = ["base", "average bad", *(f"average {i}" for i in range(5)), "last"]
    run = [Candidates().make(name, 1.0) for name in names]
    losses = {name: RatioEstimate(noise + 1e-3 * rng.normal(size=(64, 1)), np.ones((64, 1))) for name in names}
    losses["average bad"] = RatioEstimate(noise + 1, np.ones((64, 1)))
    order = sorted((n for n in names if n.startswith("average") and n != "average bad"), key=lambda n: losses[n].value[0])
    chosen = [c.name for c in shortlist(run, losses)]
    assert set(chosen) == {"base", "last", order[0], order[2], order[4]}
    assert chosen == [n for n in names if n in chosen], "in their own order"
    alone = [run[0], run[-1]]
    assert shortlist(alone, losses) == alone


@pytest.mark.parametrize(
    ("by", "why"),
    [
        ("beauty", "there is no such number"),
        ("contrast", "neither end of it is better"),
        ("recall", "single images have no such number"),
        ("accuracy", "it needs a judge of digits"),
        ("clip", "it needs --clip"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused_before_anything_is_opened(tmp_path, by, why):
    c = Candidates()
    with pytest.raises(UserError, match=f"--by {by}: {why}; choose one of saturated, shadow, blur$") as caught:
        evaluate([c.run()], eval_settings(), GRID, tmp_path, names="t", by=by, say=lambda line: None)
    assert caught.value.exit_code == 2 and c.opened == [] and not list(tmp_path.iterdir())


def test_evaluation_without_a_judge(tmp_path):
    """Nothing is invented: no cell is chosen, and that is said; the weights are ranked by held-out loss."""
    c = Candidates()
    found = evaluated(tmp_path, c)
    answers, page = write_evaluation(tmp_path, found, "t")
    assert found["selection"]["by"] is None and "Prompt adherence was not judged" in answers[2]["answer"]
    assert [row["candidate"] for row in found["losses"] if not row["may_be_best"]] == ["base", "average bad"]
    assert "less distilled than base: guidance gap" in answers[0]["answer"]
    assert answers[1]["answer"].startswith("By held-out loss") and "average bad" not in answers[1]["answer"]
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["answers"] == answers and summary["chosen"] is None
    html = page.read_text()
    for link in ("distillation/index.html", "selection/index.html", "sweep/index.html", "evaluation.json"):
        assert f'href="{link}"' in html and (tmp_path / link).is_file()
    assert (tmp_path / "selection/selection.json").is_file() and (tmp_path / "distillation/distillation.json").is_file()
    again = Candidates()
    assert evaluated(tmp_path, again) == found and again.opened == []
    evaluated(tmp_path, again, last="other")
    assert again.opened.count("last") == len(again.opened) > 0


def score_files(accuracy: dict[tuple[str, float], float]) -> tuple[list[dict], list[dict], list[dict]]:
    """numbers, cells and rows of a sweep: made-up accuracies of (candidate, cfg), right where a prompt is easier than that."""
    cells = [{"candidate": name, **at(8, cfg).facts, "nfe": at(8, cfg).nfe()} for name, cfg in accuracy]
    rows = []
    for cell, share in zip(cells, accuracy.values()):
        burnt = 0.1 if cell["cfg"] > 2 else 0.01
        rows += [{**cell, "prompt": f"{p}", "seed": 0, "correct": float(p < 40 * share), "saturated": burnt} for p in range(40)]
    numbers = [
        {"key": "accuracy", "image": "correct", "adherence": True, "label": "accuracy", "better": "high", "help": ""},
        {"key": "saturated", "image": "saturated", "tolerance": 0.02, "label": "<burnt>", "better": "low", "help": ""},
    ]
    return numbers, cells, rows


def scored(accuracy: dict[tuple, float]) -> dict:
    numbers, cells, rows = score_files(accuracy)
    return select({"numbers": numbers, "cells": cells}, rows)


def test_scores_of_an_earlier_version_are_judged_alike(tmp_path):
    """It wrote "picture" where "image" stands now, and "passes" for "nfe"; unread, no number would be left to choose by."""
    accuracy = {("base", 1.0): 0.3, ("last", 1.0): 0.85, ("last", 3.0): 1.0}
    numbers, cells, rows = score_files(accuracy)
    earlier = [{"picture" if key == "image" else key: value for key, value in n.items()} for n in numbers]
    file = tmp_path / "scores.json"
    old = [{"passes" if key == "nfe" else key: value for key, value in cell.items()} for cell in cells]
    file.write_text(json.dumps({"title": "t", "settings": {}, "numbers": earlier, "cells": old}))
    assert select(read_scores(file), rows) == scored(accuracy)


def test_selection_page_says_rule_and_verdicts(tmp_path):
    found = scored({("base", 1.0): 0.3, ("last", 1.0): 0.85, ("last", 2.0): 0.9, ("last", 3.0): 1.0})
    assert [verdict(found, i) for i in range(4)] == ["not the best", "possibly the best", "chosen", "refused: <burnt>"]
    assert "worse by more than 0.02 <burnt> than the same weights in their cell nearest CFG 1" in rule(found)[0]
    html = write_selection_page(tmp_path, found, "T").read_text()
    assert "Chosen: last at CFG 2 in 8 steps: accuracy 0.900" in html and "1 other cell is possibly the best as well" in html
    assert "the cheapest of them is last at CFG 1 in 8 steps" in html
    assert "refused: &lt;burnt&gt;" in html and "<burnt>" not in html
    beside = "<td>0.0100 (0.0100 to 0.0100)</td><td>0.0100 (0.0100 to 0.0100)</td>"
    assert beside in html and '<th scope="col">last at CFG 1 in 8 steps</th>' in html and html.count("<li>") == 2
    heads = re.findall(r'data-sort="\w+">([^<]+)<', html)
    assert heads[heads.index("verdict") + 1] == "ahead of the others"
    kept = json.loads((tmp_path / "selection.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert kept == json.loads(json.dumps(found))


def test_answers_with_a_choice():
    """The weights that were chosen by images, beside those that the loss cannot tell from its best."""
    row = {"value": 0.1, "low": 0.09, "high": 0.11}
    gone = {"difference": -0.4, "difference_low": -0.5, "difference_high": -0.3, "verdict": "lower"}
    meters = {"base": {"guidance": [row], "loss": [row]}, "last": {"guidance": [row | gone], "loss": [row | gone]}}
    losses = [
        {"candidate": name, **row, "average": False, "may_be_best": name == "last", "looked_at": True}
        for name in ("base", "last")
    ]
    losses[0]["value"] = 0.2
    found = {
        "losses": losses,
        "distillation": {"candidates": meters, "reference": "base"},
        "selection": scored({("base", 1.0): 0.3, ("last", 2.0): 0.9}),
    }
    how_distilled, which, how = (item["answer"] for item in three_answers(found))
    assert "last is less distilled than base" in how_distilled and "lower by 0.300 to 0.500" in how_distilled
    assert which == "last; by its images, no other may be the best; by held-out loss last is best, no other may be the best."
    found["selection"] = scored({("base", 1.0): 0.3, ("last", 1.0): 0.5, ("last", 2.0): 0.9})
    beside = three_answers(found)[2]["answer"]
    assert beside.endswith(" Beside last at CFG 1 in 8 steps: <burnt> 0.0100 (0.0100 to 0.0100) against 0.0100.")
    assert (
        how.startswith("last at CFG 2 in 8 steps: accuracy 0.900")
        and "It has <burnt> 0.0100 (0.0100 to 0.0100)." in how
        and "refused" not in how
    )


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_of_a_file_as_editors_write_it(tmp_path, mark, end):
    prompts = ("ein Fuchs im Schnee ❄", "one\u2028line", "and\x85this")
    (tmp_path / "p.txt").write_bytes(mark + end.join(prompts).encode() + end.encode())
    assert read_prompts(str(tmp_path / "p.txt"), None) == prompts


def noisy_scores(prompts: int, excess: float, spread: float) -> dict:
    """base and last at CFG 1 and 2: at 2 last is right more often, and more saturated by ``excess``, with so much spread."""
    noise = np.random.default_rng(0).normal(size=prompts)
    noise = (noise - noise.mean()) / noise.std()
    cells = [{"candidate": n, **at(8, cfg).facts, "nfe": at(8, cfg).nfe()} for n in ("base", "last") for cfg in (1.0, 2.0)]
    rows = []
    for cell in cells:
        strong = cell["cfg"] == 2
        right = 0.9 if strong and cell["candidate"] == "last" else 0.6
        burnt = 0.01 + strong * (excess + spread * noise)
        rows += [{**cell, "prompt": f"{p}", "seed": 0, "correct": float(p % 10 < 10 * right)} for p in range(prompts)]
        for row, value in zip(rows[-prompts:], burnt):
            row["saturated"] = float(value)
    return select({"numbers": score_files({("a", 1.0): 1.0})[0], "cells": cells}, rows, reference="base")


@pytest.mark.parametrize(("excess", "spread", "needed"), [(0.01, 0.035, (48, 80)), (0.015, 0.03, (128, 208))])
def test_few_prompts_say_how_many_would_decide(excess, spread, needed):
    """What is refused for uncertainty alone is not refused with as many prompts as were said to be needed."""
    few = noisy_scores(24, excess, spread)
    assert few["cells"][3]["refused"] == ["saturated"] and few["cells"][few["chosen"]]["cfg"] == 1
    assert undecided_words(few).startswith(f"24 prompts cannot decide; about {few['undecided']['prompts']} needed")
    assert needed[0] <= few["undecided"]["prompts"] <= needed[1]
    many = noisy_scores(few["undecided"]["prompts"], excess, spread)
    assert not many["cells"][3]["refused"] and many["undecided"] is None and undecided_words(many) == ""
    assert noisy_scores(24, 0.2, 0.01)["undecided"] is None, "what is certainly too much is no matter of prompts"


def test_equal_averages_are_one_answer_and_the_base_is_none():
    """Ten names say no more than "all 10 averages"; that the base was not beaten is said, not offered as a choice."""
    names = ["base", *(f"alpha_{i}" for i in range(10)), "last"]
    accuracy = {(name, cfg): 0.5 for name in names for cfg in (1.0, 2.0, 3.0)}
    numbers, cells, rows = score_files(accuracy)
    row = {"value": 0.1, "low": 0.09, "high": 0.11, "difference": 0.0, "difference_low": -0.1, "difference_high": 0.1}
    meters = {name: {key: [row | {"verdict": "no difference seen"}] for key in ("guidance", "loss")} for name in names}
    losses = [{"candidate": n, **row, "average": "_" in n, "may_be_best": True, "looked_at": True} for n in names[::-1]]
    found = {
        "losses": losses,
        "distillation": {"candidates": meters, "reference": "base"},
        "selection": select({"numbers": numbers, "cells": cells}, rows, order=names[::-1], reference="base"),
    }
    _, which, how = (item["answer"] for item in three_answers(found))
    equals = "indistinguishable from it: all 10 averages; that it is better than base is not shown"
    assert which == f"last; by its images, {equals}; by held-out loss last is best, {equals}."
    assert "base" not in how and how.endswith(
        "12 of 36 cells are refused, as they may be worse by too much in <burnt> (CFG 3)."
    )
    for loss in losses[3:5]:
        loss["may_be_best"] = False
    assert "loss last is best, indistinguishable from it: 8 of the 10 averages;" in three_answers(found)[1]["answer"]
