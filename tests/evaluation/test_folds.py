"""Cross-fitting: every image is held out from one run, and pooled intervals hold what the recipe would give on new images."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dedistill.cli.main import main
from dedistill.data.images.index import Sample
from dedistill.data.images.types import NOWHERE
from dedistill.data.split import CroppedImage, split
from dedistill.data.usable import look
from dedistill.errors import UserError
from dedistill.evaluation.folds import joined
from dedistill.evaluation.meters import RatioEstimate, interval
from dedistill.flow import keyed
from dedistill.recipe import load_recipe

TRIALS = 300
DRAWS = 8


def images(count: int) -> list[CroppedImage]:
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]
    return [CroppedImage(Sample(name, (name,), 9, 9, name, 0, NOWHERE), ()) for name in names]


@pytest.mark.parametrize(("count", "folds"), [(12, 2), (25, 5), (20, 20), (7, 3)])
def test_every_image_is_held_out_exactly_once(count, folds):
    """Near-duplicates in the same fold, folds of equally many different images, in any order of the images."""
    everything = images(count)
    near = [[p.sample.sha256 for p in everything[:3]]]
    parts = [split(everything, "auto", near, [k, folds]) for k in range(1, folds + 1)]
    times = Counter(p.sample.sha256 for part in parts for p in part.held)
    assert set(times.values()) <= {1} and len(times) == count
    assert all(len(part.held) + len(part.train) == count for part in parts)
    sizes = [len({part.unit(p) for p in part.held}) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    together = [{p.sample.sha256 for p in part.held} & set(near[0]) for part in parts]
    assert sorted(map(len, together))[-1] == 3
    again = split(everything[::-1], "auto", near, [1, folds])
    assert {p.sample.sha256 for p in again.held} == {p.sample.sha256 for p in parts[0].held}


def simulated(count: int, folds: int, known: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N, trials] losses of images under a predictor learnt from the other folds (their mean) and under one that was ``known``
    before, and how much the learnt ones differ from it on all images that there could be [trials]."""
    rng = keyed.generator(count, "folds", folds)
    values = rng.gamma(11, 2 / 11, (count, TRIALS))
    learnt, truth = np.empty_like(values), np.zeros(TRIALS)
    for k in range(folds):
        mean = np.delete(values, np.s_[k::folds], axis=0).mean(0)
        learnt[k::folds] = (values[k::folds] - mean) ** 2
        truth += ((2 - mean) ** 2 - (2 - known) ** 2) * len(values[k::folds]) / count
    noise = 0.2 * rng.standard_normal((2, count, TRIALS)) / DRAWS**0.5
    return learnt + noise[0], (values - known) ** 2 + noise[1], truth


@pytest.mark.parametrize(
    ("count", "folds", "known"),
    [
        *((16, 4, 0.5), (60, 2, 1.6)),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in ((16, 4, 1.6), (25, 5, 0.5), (25, 5, 1.6), (60, 2, 0.5))),
    ],
)
def test_pooled_intervals_cover_the_truth(count, folds, known):
    """At least 92.5 % of them hold how much better the K runs are on new images, however small that is."""
    found, other, truth = simulated(count, folds, known)
    own, base = (joined([RatioEstimate(x[k::folds], np.ones_like(x[k::folds])) for k in range(folds)]) for x in (found, other))

    def covered(own: RatioEstimate, base: RatioEstimate) -> float:
        low, high = interval(own.resampled() - base.resampled(), own)
        return float(np.mean((low < truth) & (truth < high)))

    plain = covered(replace(own, wider=1.0), replace(base, wider=1.0))
    print(f"| {count} in {folds} folds | {known:g} | {covered(own, base):.1%} | {plain:.1%} |")
    assert covered(own, base) >= 0.925 and plain <= covered(own, base) and (own.units == count).all()
    np.testing.assert_allclose(own.value, found.mean(0))


def test_a_recipe_over_folds(own, capsys):
    """Three runs side by side, each without a third of the images; pooled, all twelve are counted, and base and last told apart
    where they can be."""
    recipe, _ = own
    options = ["--set", "train.steps=1"]
    for k in range(1, 4):
        assert main(["train", str(recipe), *options, "--set", f"data.fold=[{k}, 3]"]) == 0
    held = [look(load_recipe(recipe, [f"data.fold=[{k}, 3]"]), lambda line: None).split.held for k in range(1, 4)]
    assert len({p.sample.sha256 for part in held for p in part}) == sum(map(len, held)) == 12
    capsys.readouterr()
    assert main(["measure", str(recipe), *options, "--folds", "3", "--candidates", "base", "last", "--samples", "48"]) == 0
    folder = recipe.parent / "run/distillation"
    found = json.loads((folder / "distillation.json").read_text())
    assert found["images"] == 12 and found["settings"]["folds"] == 3 and list(found["candidates"]) == ["base", "last"]
    assert found["candidates"]["last"]["loss"][0]["units"] == 12 and "straightness" not in found["candidates"]["last"]
    assert "Measured on 12 held-out images: with fewer than 16" in (folder / "index.html").read_text()
    one = RatioEstimate(*np.zeros((2, 12, 1)))
    assert joined([one, one]).top.shape == (24, 1)
    assert main(["measure", str(recipe), *options, "--folds", "4"]) == 1
    said = capsys.readouterr().err
    assert "fold 1 of 4" in said and f"dedistill train {recipe} --set 'data.fold=[1, 4]'" in said


def test_folds_of_a_recipe(image_recipe, capsys):
    """A run of a fold has a folder and a name of its own, once; folds that are none are refused."""
    recipe = load_recipe(image_recipe, ["data.fold=[2, 5]"])
    assert recipe.run.out.endswith("/run-fold2of5") and recipe.run.name == "tiny-images-fold2of5"
    written = Path(image_recipe).with_name("again.toml")
    assert main(["train", str(image_recipe), "--set", "data.fold=[2, 5]", "--print-recipe"]) == 0
    written.write_text(capsys.readouterr().out)
    assert load_recipe(written) == recipe
    for fold in ("[0, 2]", "[3, 2]", "[1, 1]", "[1]", "2"):
        with pytest.raises(UserError, match=r"data\.fold"):
            load_recipe(image_recipe, [f"data.fold={fold}"])
    with pytest.raises(UserError, match=r"data\.held_out: has no effect with data\.fold"):
        load_recipe(image_recipe, ["data.fold=[1, 2]", "data.held_out=0.1"])
    with pytest.raises(UserError, match="too few different images for 50 parts"):
        look(load_recipe(image_recipe, ["data.fold=[40, 50]"]), lambda line: None)
    for wrong in (["--folds", "1"], ["--folds", "3", "--data", "x"]):
        with pytest.raises(SystemExit):
            main(["measure", str(image_recipe), *wrong])
