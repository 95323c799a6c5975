"""Meters of distillation on models whose every velocity is known: each equals its analytic value."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_form import straightness
from closed_form_models import IMAGE, LINE, ONE, PLANE, ClosedFormData, closed_form
from samplings import at

from dedistill.data.digits import load_digits
from dedistill.errors import UserError
from dedistill.evaluation.distillation import EvalSettings, _rows, measure
from dedistill.evaluation.judges import DigitJudge, precision_recall
from dedistill.evaluation.meters import RatioEstimate, guidance_meters, interval, path_meters, response
from dedistill.evaluation.sweep import Candidate
from dedistill.evaluation.validation import held_out_meters
from dedistill.flow import keyed
from dedistill.flow.solvers import sigma_grid, solve
from dedistill.objectives.base import objective_for
from dedistill.recipe.resolve import recipe_of
from dedistill.sampling.sampler import Sampling, sample, start_noise

RECIPE = recipe_of(
    {
        "run": {"name": "a", "out": "a"},
        "model": {"family": "pixel_flux", "path": "a"},
        "data": {"source": "digits"},
        "train": {"steps": 1, "batch": 4, "lr": 1e-3},
    }
)
BINS = 4


def tasks(count: int, source=None, size: int = 500):
    return objective_for(RECIPE, source or ClosedFormData(), lambda shape: 1.0).validation_batches(count, size)


def linear_paths(steps: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Euler's states [S + 1, N, 2] of the single Gaussian by its scalar recursion, and the noise [N, 2].

    (noisy - (1 - sigma) mean) is multiplied by 1 + step (sigma - (1 - sigma) s^2) / ((1 - sigma)^2 s^2 + sigma^2).
    """
    noise = start_noise(0, count, IMAGE).flatten(1).double().numpy()
    grid, mean, s2 = sigma_grid(steps), ONE.means[0].numpy(), 0.4**2
    states, factor = [noise], 1.0
    for here, there in pairwise(grid):
        factor *= 1 + (there - here) * (here - (1 - here) * s2) / ((1 - here) ** 2 * s2 + here**2)
        states.append((1 - there) * mean + factor * noise)
    return np.stack(states), noise


def test_paths_of_one_gaussian_are_measured_as_its_recursion_says():
    """Straightness, curvature and the few-step gap against Euler's scalar recursion, to float32."""
    count, steps, few = 40, 16, (1, 2, 8)
    found = path_meters(closed_form(ONE), ["0"] * count, start_noise(0, count, IMAGE), Sampling(steps=steps), few=few)
    states, noise = linear_paths(steps, count)
    chord = noise - states[-1]
    size = np.square(chord).mean()
    velocity = np.diff(states, axis=0) * -steps
    curvature = np.square(chord - velocity).mean((1, 2)) / size
    np.testing.assert_allclose(found["curvature"].value, curvature, rtol=1e-4, atol=1e-6)
    assert found["straightness"].value[0] == pytest.approx(curvature.mean(), rel=1e-5)
    reached = states[:-1] - velocity * sigma_grid(steps)[:-1, None, None]
    errors = np.square(reached - states[-1]).mean((1, 2)) / size
    np.testing.assert_allclose(found["one_step"].value, errors, rtol=1e-4, atol=1e-6)
    assert found["one_step"].value[0] == pytest.approx(found["few_steps"].value[0], rel=1e-5), "few has 1 first"
    gaps = [np.square(linear_paths(n, count)[0][-1] - states[-1]).mean() / size for n in few]
    np.testing.assert_allclose(found["few_steps"].value, gaps, rtol=1e-4, atol=1e-7)


def test_many_steps_measure_the_exact_paths():
    """With 256 steps, straightness is the integral's, and the turning angle that between first and last velocity."""
    count = 250
    noise = start_noise(0, count, IMAGE)
    found = path_meters(closed_form(ONE), ["0"] * count, noise, Sampling(steps=256), few=(1,))
    assert found["straightness"].value[0] == pytest.approx(straightness(ONE), rel=0.1)
    assert found["straightness"].units[0] == 1, "one prompt, however many noises"
    e = noise.flatten(1).double()
    first, last = e - ONE.means, -ONE.means - ONE.stds * e
    angle = torch.rad2deg(torch.arccos(torch.cosine_similarity(first, last)))
    assert found["turning_angle"].value[0] == pytest.approx(float(angle.mean()), rel=0.02)
    gap = (ONE.means - ONE.transport(e)).square().mean() / (e - ONE.transport(e)).square().mean()
    assert found["few_steps"].value[0] == pytest.approx(float(gap), rel=0.02), "one step ends at the mean of the data"


def test_one_euler_step_misses_what_the_exact_paths_say():
    """On a mixture of three in one dimension, whose paths are known: at every sigma of 256 steps within two percent of the
    largest, by the exact velocity at the exact state."""
    count, steps = 200, 256
    noise = start_noise(0, count, (1, 1, 1))
    found = path_meters(closed_form(LINE), [""] * count, noise, Sampling(steps=steps), few=(1,))
    e, end = noise.flatten(1).double(), LINE.transport(noise.flatten(1).double())
    size, places = (e - end).square().mean(), sigma_grid(steps)[:-1]
    for i in (0, 40, 128, 200, 250):
        state, sigma = LINE.transport(e, places[i]), float(places[i])
        truth = (state - sigma * LINE.velocity(state, sigma) - end).square().mean() / size
        assert found["one_step"].value[i] == pytest.approx(float(truth), abs=0.02 * float(found["one_step"].value.max()))
    assert found["one_step"].value[-1] == pytest.approx(0, abs=1e-12)


def test_a_straight_flow_has_no_curvature_and_no_gap():
    """What reflow of the exact pairs would give needs one step."""
    found = path_meters(closed_form(ONE, straight=True), ["0"] * 20, start_noise(0, 20, IMAGE), Sampling(steps=8), few=(1, 4))
    for key in ("straightness", "few_steps", "curvature", "one_step"):
        assert found[key].value == pytest.approx(0, abs=1e-10)
    assert found["turning_angle"].value[0] == pytest.approx(0, abs=1e-3)


@pytest.fixture(scope="module")
def many_samples():
    """Their number, and meters of the exact velocity on them."""
    return 4000, held_out_meters(closed_form(), tasks(4000), BINS)


def test_the_loss_of_the_exact_velocity_is_the_floor_bin_by_bin(many_samples):
    """Within four standard errors, in all bins of sigma and over all; given the label."""
    count, found = many_samples
    sigmas = (np.arange(count) + 0.5) / count
    grid = np.linspace(0, 1, 21)
    at = [sum(float(w) * PLANE.given(k).floor(s) for k, w in enumerate(PLANE.weights)) for s in grid]
    floors = np.interp(sigmas, grid, at).reshape(BINS, -1).mean(1)
    low, high = interval_of(found["loss_by_sigma"])
    np.testing.assert_array_less(np.abs(found["loss_by_sigma"].value - floors), (high - low))
    low, high = interval_of(found["loss"])
    assert abs(found["loss"].value[0] - floors.mean()) < high[0] - low[0] < 0.06


def test_the_guidance_gap_is_the_distance_of_the_exact_fields(many_samples):
    """E |v(. | label) - v|^2 by quadrature, bin by bin."""
    count, found = many_samples
    grid = np.linspace(0, 1, 13)

    def gap(sigma: float, label: int) -> float:
        own = PLANE.given(label)
        return own.expect(sigma, lambda x: (own.velocity(x, sigma) - PLANE.velocity(x, sigma)).square().mean(1))

    at = [sum(float(w) * gap(s, k) for k, w in enumerate(PLANE.weights)) for s in grid]
    wanted = np.interp((np.arange(count) + 0.5) / count, grid, at).reshape(BINS, -1).mean(1)
    low, high = interval_of(found["guidance_by_sigma"])
    np.testing.assert_array_less(np.abs(found["guidance_by_sigma"].value - wanted), high - low)


@pytest.mark.parametrize("baked", [0.5, 3.0])
def test_baked_guidance_is_read_off_exactly(baked):
    """With guidance w baked in, the gap is w^2 times the honest one, and the loss rises by (w - 1)^2 times it."""
    honest, distilled = (held_out_meters(closed_form(baked=w), tasks(2000), BINS) for w in (1.0, baked))
    np.testing.assert_allclose(distilled["guidance_by_sigma"].value, baked**2 * honest["guidance_by_sigma"].value, rtol=1e-4)
    rise = distilled["loss"].resampled() - honest["loss"].resampled()
    wanted = (baked - 1) ** 2 * honest["guidance"].value[0]
    low, high = interval(rise, honest["loss"])
    assert low[0] - (high[0] - low[0]) / 2 < wanted < high[0] + (high[0] - low[0]) / 2


def test_more_distillation_never_reads_as_less():
    """Guidance baked in further and further: loss and guidance gap rise at every stage, beyond their intervals."""
    stages = [held_out_meters(closed_form(baked=w), tasks(500), BINS) for w in (1.0, 1.5, 2.0, 3.0)]
    for key in ("loss", "guidance"):
        for before, after in pairwise(stages):
            assert interval(after[key].resampled() - before[key].resampled(), after[key])[0][0] > 0


def test_the_response_to_cfg_is_that_of_the_exact_images():
    """Saturation and contrast at each scale against images of the exact CFG field in float64."""
    count, cfgs = 60, (1.0, 2.0, 4.0)
    noise, prompts = start_noise(0, count, IMAGE), ["1"] * count
    found = guidance_meters(closed_form(), prompts, noise, Sampling(steps=16), cfgs=cfgs, judge=None)
    keys = {"saturated", "contrast", "blur", "shadow"}
    assert set(found) == keys | {f"response_{key}" for key in keys}
    for i, cfg in enumerate(cfgs):
        field = lambda x, s, _, cfg=cfg: PLANE.guided(x, s, 1, cfg)  # noqa: E731 - one line
        *_, exact = solve("euler", field, noise.flatten(1).double(), sigma_grid(16))
        assert found["contrast"].value[i] == pytest.approx(float(exact.std(1, correction=0).mean()), rel=1e-5)
        assert found["saturated"].value[i] == pytest.approx(float((exact.abs() > 1.1).double().mean()), abs=1e-9)
    moved = found["response_contrast"]
    assert moved.value[0] == pytest.approx(found["contrast"].value[2] - found["contrast"].value[0], abs=1e-12)


@pytest.mark.parametrize(("cfg", "skip"), [(1.0, 0), (3.0, 0), (3.0, 4), (0.0, 0), (3.0, 16)])
def test_the_sampler_follows_the_exact_cfg_field(cfg, skip):
    """Images of a whole model, mixed labels, guidance off for the first steps, against float64."""
    labels, noise, grid = [0, 1] * 10, start_noise(0, 20, IMAGE), sigma_grid(16)
    found = sample(closed_form(chunk=7), [str(k) for k in labels], noise, at(16, cfg, skip)).flatten(1)
    for label in (0, 1):
        rows = torch.tensor(labels) == label
        x = noise.flatten(1)[rows].double()
        for i, (here, there) in enumerate(pairwise(grid)):
            x = x + (there - here) * PLANE.guided(x, float(here), label, cfg if i >= skip else 1.0)
        torch.testing.assert_close(found[rows].double(), x, rtol=1e-4, atol=1e-4)


def test_batches_do_not_matter():
    """Samples are asked in the model's chunks, and come out in one order."""
    whole, parts = (held_out_meters(closed_form(), tasks(100, size=n), BINS) for n in (100, 7))
    torch.testing.assert_close(whole["loss"].top, parts["loss"].top, rtol=1e-6, atol=1e-7)
    noise = start_noise(0, 10, IMAGE)
    few = [path_meters(closed_form(chunk=n), ["0", "1"] * 5, noise, Sampling(steps=4), few=(1,))["few_steps"] for n in (256, 3)]
    torch.testing.assert_close(few[0].top, few[1].top, rtol=1e-6, atol=1e-9)


def interval_of(reading: RatioEstimate):
    return interval(reading.resampled(), reading)


def test_the_interval_of_a_mean_is_the_textbook_one():
    """Student's, on both sides, within the bootstrap's own noise."""
    for count, reach in ((400, 1.966), (20, 2.093)):
        x = np.random.default_rng(0).standard_normal((count, 1))
        low, high = interval_of(RatioEstimate(x, np.ones_like(x)))
        half = reach * x.std(ddof=1) / np.sqrt(count)
        assert (x.mean() - low[0], high[0] - x.mean()) == (pytest.approx(half, rel=0.12), pytest.approx(half, rel=0.12))


TRIALS = 1500


def simulated(images: int, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str], np.ndarray, float]:
    """``TRIALS`` data sets of losses [draws, TRIALS] at fixed sigmas, the images of the draws, the sigmas, the true mean.

    A loss is what its sigma asks for, times what the image is like (skewed, 30 %), plus noise of the draw.
    """
    sigma = (np.arange(draws) + 0.5) / draws
    image = rng.integers(images, size=draws) if draws > images else np.arange(draws)
    level = 0.2 + 2 * (sigma - 0.6) ** 2
    like = rng.gamma(11, 1 / 11, (images, TRIALS))
    losses = level[:, None] * like[image] + 0.1 * rng.standard_normal((draws, TRIALS))
    return losses, [str(i) for i in image], sigma, float(level.mean())


MANY = [pytest.param(images, draws, marks=pytest.mark.slow) for images, draws in ((25, 64), (200, 512), (500, 512))]


@pytest.mark.parametrize(("images", "draws"), [(16, 16), (16, 512), (60, 512), *MANY])
def test_intervals_cover_the_truth_as_often_as_they_say(images, draws):
    """95 +- 2 % of intervals hold the mean over all images that there could be, on few images drawn often and on many; if
    each draw were taken for an image, far fewer would."""
    losses, units, sigma, truth = simulated(images, draws, keyed.generator(images, "coverage"))

    def covered(units: list[str]) -> float:
        low, high = interval_of(RatioEstimate.of(losses, np.ones_like(losses), units, sigma))
        return float(np.mean((low < truth) & (truth < high)))

    by_image, by_draw = covered(units), covered([str(i) for i in range(draws)])
    print(f"| {images} ({len(set(units))} drawn) | {draws} | {by_image:.1%} | {by_draw:.1%} |")
    assert 0.93 <= by_image <= 0.97
    assert by_draw < 0.65 or draws < 8 * images


@pytest.mark.parametrize("images", [1, 2, 8, 15])
def test_with_few_images_there_is_no_interval(images):
    losses, units, sigma, _ = simulated(images, 512, keyed.generator(0, "few"))
    reading = RatioEstimate.of(losses, np.ones_like(losses), units, sigma)
    low, high = interval_of(reading)
    assert np.isnan(low).all() and np.isnan(high).all() and (reading.units == images).all()
    assert np.isfinite(reading.value).all()


def test_intervals_of_ratios_cover_the_truth():
    """95 % of intervals of a ratio of sums hold the true ratio: 300 sets of 60 skewed samples."""
    rng = keyed.generator(0, "ratios")
    bottom = rng.gamma(4, 1, (60, 300))
    low, high = interval_of(RatioEstimate(bottom * 0.5 + rng.standard_normal((60, 300)) * 0.3, bottom))
    assert 0.91 < np.mean((low < 0.5) & (high > 0.5)) < 0.98


def test_what_sigma_explains_is_no_uncertainty():
    sigma = (np.arange(64) + 0.5) / 64
    top = np.random.default_rng(0).standard_normal((64, 1)) * 0.01 + (3 * sigma**2 - sigma)[:, None]
    units, one = [str(i) for i in range(64)], np.ones_like(top)
    alike, apart = (RatioEstimate.of(top, one, units, s) for s in (None, sigma))
    assert apart.value == pytest.approx(alike.value, rel=1e-12)
    (loose, wide), (low, high) = interval_of(alike), interval_of(apart)
    assert high[0] - low[0] < 0.1 * (wide[0] - loose[0])


def test_the_draws_of_an_image_are_one_unit():
    """Each sample ten times is no more than once, whatever its place in the list."""
    rng = np.random.default_rng(0)
    top, bottom = rng.standard_normal((20, 3)), rng.random((20, 3)) + 0.5
    once = RatioEstimate.of(top, bottom, [f"image {i:02}" for i in range(20)])
    order = rng.permutation(200)
    often = RatioEstimate.of(*(np.repeat(x, 10, 0)[order] for x in (top, bottom)), np.repeat(np.arange(20), 10)[order])
    np.testing.assert_allclose(often.resampled(), once.resampled(), rtol=1e-10)
    assert (often.units == 20).all()


def test_pairs_cancel_what_samples_share():
    """Two readings of the same samples draw the same ones: a constant difference has no uncertainty at all."""
    top = np.random.default_rng(0).standard_normal((50, 1))
    a, b = (RatioEstimate(x, np.ones_like(x)).resampled() for x in (top, top + 0.01))
    np.testing.assert_allclose(b - a, 0.01, atol=1e-12)


def test_samples_without_a_number_do_not_count():
    """A prompt without digits has no accuracy."""
    reading = RatioEstimate(np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    moved = RatioEstimate(*response(reading.top, reading.bottom))
    assert reading.value.tolist() == [0.5, 1.0] and moved.value.tolist() == [0.5]
    assert np.isnan(RatioEstimate(np.zeros((3, 1)), np.zeros((3, 1))).value).all()


def test_the_mean_fidelity_is_the_precision():
    """arXiv 1904.06991: shares of single images add up to the precision of the set, which noise has none of."""
    source = load_digits(0.0)
    judge = DigitJudge(source)
    images = source.draw(source.slots(0, 0, 50)).latents
    assert judge.realistic(images).mean() > 0.85
    mixed = images.clone()
    mixed[::2] = start_noise(0, 25, (1, 8, 16))
    shares = judge.realistic(mixed)
    features = judge.pca.transform(judge._digits(mixed))
    assert shares.mean() == pytest.approx(precision_recall(features, judge.real[:800])[0])
    assert shares[1::2].mean() > 0.85 and shares[::2].mean() < 0.1


def eval_settings(**changes) -> EvalSettings:
    source = ClosedFormData()
    asked = {"samples": 64, "steps": 4, "few": (1, 2), "cfgs": (1.0, 3.0), **changes}
    return EvalSettings(recipe=RECIPE, source=source, judge=None, **({"prompts": source.prompts(0, 12)} | asked))


def candidates(**baked: float) -> list[Candidate]:
    return [Candidate(name, name, 4, lambda w=w: closed_form(baked=w)) for name, w in baked.items()]


def test_candidates_are_compared_with_the_reference():
    """Every number of every candidate, in the order given, with differences to the one that was named."""
    said = []
    found = measure(candidates(b=2.0, a=1.0, c=1.0), eval_settings(), reference="a", title="t", say=said.append)
    assert [*found["candidates"]] == ["b", "a", "c"] and found["reference"] == "a" and len(said) == 3
    b, a, c = found["candidates"].values()
    assert set(b) == {m["key"] for m in found["meters"]} and "correct" not in b
    assert "verdict" not in a["loss"][0] and c["loss"][0]["difference"] == 0
    assert b["guidance"][0]["verdict"] == "higher" and c["guidance"][0]["verdict"] == "no difference seen"
    assert [row["at"] for row in a["few_steps"]] == [1, 2] and [row["at"] for row in a["contrast"]] == [1.0, 3.0]
    assert [row["at"] for row in a["curvature"]] == [1, 0.75, 0.5, 0.25] and len(a["loss_by_sigma"]) == 8
    for rows in (*a.values(), *b.values()):
        assert all(row["low"] is None or row["low"] <= row["value"] <= row["high"] for row in rows)
    assert found["distinct_prompts"] == 2 and {row["low"] for row in a["straightness"]} == {None}
    assert a["loss"][0]["units"] == found["images"] >= 16 and b["straightness"][0]["verdict"] is None


def test_a_difference_that_is_certain_and_tiny_is_not_called_one():
    rng = np.random.default_rng(0)
    top, one = 1 + 0.1 * rng.standard_normal((60, 1)), np.ones((60, 1))
    for factor, verdict in ((1.005, "by less than 1%"), (0.995, "by less than 1%"), (1.02, "higher"), (0.98, "lower")):
        (row,) = _rows(RatioEstimate(top * factor, one), RatioEstimate(top, one), None, False)
        assert row["verdict"] == verdict and row["difference_low"] * row["difference_high"] > 0


@pytest.mark.parametrize("images", [1, 15, 16])
def test_under_sixteen_images_nothing_is_called_higher(images):
    top, one = np.linspace(1, 2, images)[:, None], np.ones((images, 1))
    (row,) = _rows(RatioEstimate(3 * top, one), RatioEstimate(top, one), None, False)
    assert row["units"] == images and row["value"] == pytest.approx(4.5 if images > 1 else 3)
    assert (row["verdict"], row["low"] is None) == ((None, True) if images < 16 else ("higher", False))


def test_a_single_scale_has_no_response(tmp_path):
    options = {"reference": None, "title": "t", "results": tmp_path, "say": lambda line: None}
    found = measure(candidates(a=1.0), eval_settings(cfgs=(2.0,)), **options)
    assert set(found["candidates"]["a"]) == {m["key"] for m in found["meters"]} >= {"saturated", "contrast"}
    assert not any("response" in m["key"] for m in found["meters"])


@pytest.mark.parametrize(
    ("candidates", "reference", "message"),
    [
        (candidates(a=1.0) * 2, None, "two candidates share a name: a, a"),
        (candidates(a=1.0), "b", "--reference: no candidate 'b'; there are a"),
        (candidates(a=1.0, b=float("nan")), None, "b: loss: not every sample has a finite number"),
    ],
)
def test_what_cannot_be_compared_is_refused(candidates, reference, message):
    with pytest.raises(UserError, match=message):
        measure(candidates, eval_settings(), reference=reference, title="t", say=lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 15}, "--samples: 15 are too few for intervals; at least 16"),
        ({"prompts": ["0"]}, "--prompts: 1 is too few for intervals; at least 2"),
    ],
)
def test_too_few_samples_have_no_interval(changes, message):
    with pytest.raises(UserError, match=message):
        measure(candidates(a=1.0), eval_settings(**changes), reference=None, title="t", say=lambda line: None)


def test_a_model_that_predicts_nothing_is_refused():
    """A fresh network leaves the noise as it is: there is no path to measure."""

    def nothing():
        model = closed_form()
        model.family.velocity = lambda parts, denoiser, noisy, *_: torch.zeros_like(noisy)
        return model

    with pytest.raises(UserError, match="a: straightness: paths have no length; the model predicts velocities of 0"):
        measure([Candidate("a", "a", 4, nothing)], eval_settings(), reference=None, title="t", say=lambda line: None)


def test_a_number_that_no_sample_has_is_left_out():
    """Prompts without digits: the page goes without accuracy, and keeps the others."""

    class Judge:
        def correct(self, images, prompts):
            return np.full(len(images), np.nan)

        def realistic(self, images):
            return np.ones(len(images))

    q = replace(eval_settings(), judge=Judge())
    found = measure(candidates(a=1.0), q, reference=None, title="t", say=lambda line: None)
    numbers = found["candidates"]["a"]
    assert numbers["realistic"][0]["value"] == 1 and not {"correct", "response_correct"} & numbers.keys()
    assert "correct" not in {m["key"] for m in found["meters"]}


def test_images_of_another_shape_are_refused():
    def wide():
        model = closed_form()
        model.components.sample_shape = (2, 1, 2)
        return model

    with pytest.raises(UserError, match="a and b make images of different shapes"):
        measure(
            [*candidates(a=1.0), Candidate("b", "b", 4, wide)],
            eval_settings(),
            reference=None,
            title="t",
            say=lambda line: None,
        )
    with pytest.raises(UserError, match="the held-out samples have 1 channels, the model's 2"):
        measure([Candidate("b", "b", 4, wide)], eval_settings(), reference=None, title="t", say=lambda line: None)
