"""Meters of single images: what they see of injected faults, known answers, invariances."""

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from dedistill.data.digits import load_digits
from dedistill.evaluation.numbers import artefacts, blur, clipped, colour, diversity, shadow
from dedistill.flow import keyed
from lab import artefacts as benchmark
from lab.artefact_faults import COLLAPSES, FAULTS, METERS, handwritten, photographs

DIGITS = handwritten(load_digits(0.0), 120)


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return photographs(64, 85)


def between(x: np.ndarray) -> np.ndarray:
    return -diversity(torch.from_numpy(x))


@pytest.mark.parametrize("fault", METERS)
@pytest.mark.parametrize("what", ["photographs", "digits"])
def test_a_meter_sees_its_fault(what, fault, photos):
    """Paired detection curves: chance without the fault, rising with it, nearly always right at its strongest."""
    if what == "digits" and fault == "colour":
        pytest.skip("grey")
    x, f = photos if what == "photographs" else DIGITS[0], FAULTS[fault]
    strengths = (f.strengths[0], f.strengths[2], f.strengths[-1])
    rows = benchmark.curves(benchmark.of_images(x), f.apply, strengths, {fault: METERS[fault]})[fault]
    none, some, most = (row["paired"]["auc"][0] for row in rows)
    assert 0.35 < none < 0.65 and none < some <= most + 0.01
    assert most > (0.88 if fault == "colour" else 0.95)
    assert rows[0]["paired"]["seen"][0] < 0.15 and rows[0]["paired"]["seen"][1] < rows[0]["paired"]["seen"][2]


@pytest.mark.parametrize("way", COLLAPSES)
def test_diversity_sees_seeds_that_collapse(way):
    apply, take = COLLAPSES[way][0], benchmark.of_groups(*DIGITS)
    rows = benchmark.curves(take, lambda g, s, rng: apply(g, s), (0, 1), {"diversity": between})["diversity"]
    none, most = (row["unpaired"]["auc"][0] for row in rows)
    assert 0.3 < none < 0.7 and most > 0.99


def test_detection_is_counted_right():
    """Known answers: AUC of shifted normals is Phi(d / sqrt 2); a constant is chance and never seen; better is 1."""
    rng = keyed.generator(0, "test")
    clean, faulty = rng.standard_normal((4, 400)), rng.standard_normal(400) + 1
    found = benchmark.judged(clean, faulty, folds=True)
    assert found["auc"][1] < 0.760 < found["auc"][2] and found["seen"][1] < 0.259 < found["seen"][2]
    flat = benchmark.judged(0 * clean, 0 * faulty, folds=False)
    assert flat["auc"] == [0.5, 0.5, 0.5] and flat["seen"][0] == 0
    assert benchmark.judged(clean, faulty + 99, folds=True)["auc"] == [1, 1, 1]


def test_meters_ignore_orientation_and_neighbours_in_the_batch(photos):
    for name, meter in METERS.items():
        value = meter(photos)
        for turned in (photos[..., ::-1], photos[..., ::-1, :], photos.transpose(0, 1, 3, 2)):
            np.testing.assert_allclose(meter(np.ascontiguousarray(turned)), value, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(meter(photos[3:4]), value[3:4], atol=1e-12, err_msg=name)


def test_twice_the_resolution(photos):
    """Shadow, colour and diversity are those of the image, blur is one of its pixels."""
    double = photos.repeat(2, 2).repeat(2, 3)
    np.testing.assert_allclose(shadow(double), shadow(photos), atol=1e-12)
    np.testing.assert_allclose(colour(double), colour(photos), atol=1e-12)
    seeds = torch.from_numpy(photos[:8].reshape(4, 2, 3, 64, 64))
    both = diversity(seeds), diversity(seeds.repeat_interleave(2, 3).repeat_interleave(2, 4))
    np.testing.assert_allclose(*both, atol=1e-12)
    assert (blur(zoom(photos[:9], (1, 1, 2, 2), order=1)) > blur(photos[:9])).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_even_images_have_finite_numbers(channels):
    made = torch.stack([torch.full((channels, 8, 16), value) for value in (-1.0, 0.3, 1.0, 7.0, torch.nan, torch.inf)])
    found = artefacts(made)
    assert found.keys() == {"blur", "shadow", "clipped"} | ({"colour"} if channels == 3 else set())
    assert (found["blur"] == 1).all() and (found["shadow"] == 0).all()
    assert found["clipped"].tolist() == [1, 0, 1, 1, 0, 1]
    assert np.allclose(found.get("colour", 0), 0)


def test_blur_is_cretes():
    """The published formula, written out pixel by pixel."""
    x = keyed.generator(0, "crete").random((7, 9))
    answers = []
    for f in (x, x.T):
        rows, columns = f.shape
        mean = [
            [np.mean([f[min(max(i + k, 0), rows - 1), j] for k in range(-2, 3)]) for j in range(columns)] for i in range(rows)
        ]
        pairs = [(i, j) for i in range(1, rows) for j in range(columns)]
        d = {(i, j): abs(f[i, j] - f[i - 1, j]) for i, j in pairs}
        v = {(i, j): max(0, d[i, j] - abs(mean[i][j] - mean[i - 1][j])) for i, j in pairs}
        answers.append((sum(d.values()) - sum(v.values())) / sum(d.values()))
    assert blur(x[None, None]) == pytest.approx([max(answers)], abs=1e-12)


def test_known_answers():
    x = np.zeros((1, 1, 8, 8))
    x[..., 2:5, 2:5] = 1
    assert clipped(x) == pytest.approx([1 / 64]), "only the middle of a 3 x 3 patch has four burnt neighbours"
    assert clipped(0.99 * x) == 0
    halves = np.full((1, 3, 8, 8), -1.0)
    halves[:, 0, :, :4] = halves[:, 1, :, 4:] = 1
    assert colour(halves) == pytest.approx([2.3]), "red - green is +-2, their mean less blue is 1"
    lit = np.full((1, 1, 32, 32), 0.6)
    lit[..., 16:] = -0.6
    assert shadow(lit) == pytest.approx([1 - (0.575 + 0.02) / (0.8 + 0.02)]), (
        "half has a quarter of the light; light reaches 4 px"
    )
    checked = np.where(np.indices((32, 32)).sum(0) % 2, 0.6, -0.6)[None, None]
    assert shadow(checked) < 1e-9, "dark things between bright ones are no shadow"


def test_diversity_is_the_mean_distance_of_pairs():
    """Root mean square distance over sqrt(2) contrast; 0 for copies, 1 for unrelated noise; gain does not matter."""
    x = keyed.generator(0, "seeds").standard_normal((5, 2, 1, 32, 32)) / 8
    pairs = [np.square(x[i, 0] - x[j, 0]).mean() for i in range(5) for j in range(i)]
    assert diversity(torch.from_numpy(x))[0] == pytest.approx(np.sqrt(np.mean(pairs) / (2 * x[:, 0].var((1, 2, 3)).mean())))
    assert diversity(torch.from_numpy(x)) == pytest.approx([1, 1], abs=0.02)
    assert diversity(torch.from_numpy(x / 2)) == pytest.approx(diversity(torch.from_numpy(x)))
    assert diversity(torch.from_numpy(x[:1]).repeat(3, 1, 1, 1, 1)) == pytest.approx([0, 0])
    assert diversity(torch.zeros(3, 1, 1, 8, 8)) == [0]
