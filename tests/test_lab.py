"""The laboratory: statistics against scipy, recipes that load, documents that say what the figures say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dedistill.data.encode import open_source
from dedistill.models.model import build_model
from dedistill.objectives.base import objective_for
from dedistill.recipe import load_recipe
from lab.forest import Row, forest_plot
from lab.report import with_main_table, write_report
from lab.runs import RUNS, SPECIAL, Seed, run_recipe
from lab.tricks import FULL, SCORES, TRICKS
from lab.variance import gradient_variances
from lab.verdicts import Effect, change, effect, mean_interval, sentence, word

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "lab" / "results" / "lab.json"


def test_interval_is_students():
    values = [0.3, 0.1, 0.25, 0.18]
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert np.allclose(mean_interval(values), (np.mean(values), *known))


def test_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    spans = [mean_interval(rng.normal(1.0, 2.0, 3)) for _ in range(2000)]
    assert 0.93 < np.mean([low <= 1 <= high for _, low, high in spans]) < 0.97


@pytest.mark.parametrize(
    ("span", "key", "verdict"),
    [
        ((-3, -1), "loss", "helps"),
        ((1, 3), "loss", "hurts"),
        ((-1, 3), "loss", "no difference seen"),
        ((1, 3), "accuracy_2", "helps"),
        ((-3, -1), "accuracy_2", "hurts"),
        ((1, 3), "accuracy_1", "higher"),
        ((-3, -1), "accuracy_1", "lower"),
    ],
)
def test_words(span, key, verdict):
    assert word(Effect(0, 0, sum(span) / 2, *span), key) == verdict


def test_digits_follow_the_interval():
    assert change(Effect(0, 0, -0.01234, -0.0223, -0.0024)) == "-0.012 [-0.022, -0.002]"
    assert change(Effect(0, 0, 1.234, 0.9, 1.5)) == "+1.23 [+0.90, +1.50]"


def test_seeds_are_paired():
    """Students differ far more than what a trick does to them."""
    scores = [{"a": {"loss": s + 0.1}, "b": {"loss": float(s)}} for s in (0, 10, 20)]
    found = effect(scores, "a", "b", "loss")
    assert found.seen and np.allclose((found.low, found.high), 0.1)


@pytest.mark.parametrize("name", [*RUNS])
def test_every_run_has_a_recipe(name, tmp_path):
    recipe, base = run_recipe(Seed(tmp_path, 3, FULL), name), run_recipe(Seed(tmp_path, 3, FULL), "base")
    assert recipe.run.seed == 3
    assert (name == "base") == (recipe.model_dump(exclude={"run"}) == base.model_dump(exclude={"run"}))


def test_forest_plot_puts_zero_in_the_middle_and_escapes():
    svg = forest_plot([Row("<b>"), Row("x & y", (-0.4, -0.1, 0.4), "hurts")], title="t", xlabel="x")
    assert "&lt;b&gt;" in svg and "x &amp; y" in svg
    low, high = map(float, re.search(r'd="M([\d.]+) [\d.]+H([\d.]+)M', svg).groups())
    zero = float(re.search(r'd="M([\d.]+) [\d.]+V\d+" stroke="currentColor" stroke-opacity=".55"', svg)[1])
    mean = float(re.search(r'circle cx="([\d.]+)"', svg)[1])
    assert abs((low + high) / 2 - zero) < 0.1
    assert np.isclose((zero - mean) / (zero - low), 0.5, atol=0.01)  # the root of a quarter


def test_variances_are_those_of_gradients_taken_one_by_one(tmp_path):
    recipe = load_recipe(
        "dedistill:digits/teacher",
        ["train.batch=4", "model.new.layers=1", "model.new.single_layers=1"],
    )
    source, model = open_source(recipe.data), build_model(recipe)
    model.components.denoiser.requires_grad_(True)
    objective, losses, gradients = objective_for(recipe, source, model.shift), [], []
    for step in range(3):
        model.root.zero_grad()
        loss = objective.loss(model, objective.noisy_batch(step, np.arange(4))).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(np.concatenate([p.grad.double().numpy().ravel() for p in model.trainable().values()]))
    found = gradient_variances(model, recipe, source, 3)
    g = np.stack(gradients)
    expected = {
        "loss": np.var(losses, ddof=1),
        "norm": np.var(np.linalg.norm(g, axis=1), ddof=1),
        "gradient": ((g - g.mean(0)) ** 2).sum() / 2,
    }
    assert {k: pytest.approx(v, rel=1e-4) for k, v in expected.items()} == found
    assert all(p.grad is not None for p in model.trainable().values())


def test_documents_are_those_of_the_committed_figures(tmp_path):
    found = json.loads(FIGURES.read_text())
    assert found["scale"] == json.loads(json.dumps(FULL.__dict__)) and found["seeds"] >= 3
    page = (ROOT / "docs" / "tricks.md").read_text()
    assert with_main_table(page, found["scores"]) == page
    text = write_report(found, tmp_path).read_text()
    assert text == (ROOT / "docs" / "lab.md").read_text()
    for image in ("lab.svg", "lab_frechet.svg"):
        assert (tmp_path / "images" / image).read_text() == (ROOT / "docs" / "images" / image).read_text()


def test_every_trick_has_a_verdict():
    scores = json.loads(FIGURES.read_text())["scores"]
    for trick in TRICKS:
        assert any(c.main for c in trick.comparisons)
        assert set(trick.others) | {trick.primary} <= set(SCORES)
        assert re.search(r"helps|hurts|shows no difference", sentence(trick, scores))


@pytest.mark.slow
def test_a_tiny_laboratory_runs_and_goes_on_where_it_was(tmp_path):
    from lab.study import run_all
    from lab.tricks import Scale

    small = Scale(
        teacher=60, student=40, steps=30, starts=30, averaged=60, reflow=40, distilled_again=(5, 8, 8),
        pairs=64, prompts=16, held_out=32, batches=4,
    )  # fmt: skip
    found = run_all(tmp_path, small, 2, 2)
    write_report(found, tmp_path / "report")
    results = [*tmp_path.glob("seed*/results/*.json")]
    assert len(results) == 2 * (len(RUNS) + len(SPECIAL))
    gone = tmp_path / "seed1" / "results" / "int4.json"
    gone.unlink()
    times = {file: file.stat().st_mtime_ns for file in results if file != gone}
    again = run_all(tmp_path, small, 2, 2)
    assert again["scores"] == found["scores"]
    assert times == {file: file.stat().st_mtime_ns for file in times}
    assert torch.isfinite(torch.tensor(again["scores"][0]["base"]["loss"]))
