"""Power-law averages: the width and its exponent, the update, and what two stored ones give."""

import numpy as np
import pytest

from dedistill.errors import UserError
from dedistill.posthoc.profiles import WIDEST, Profile, coefficients, exponent, share_of_new, walk_error, width

STEPS = 4000
STORED = (0.05, 0.10)


@pytest.fixture(scope="module")
def walk() -> np.ndarray:
    """A random walk of many numbers, [steps, numbers]."""
    return np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 256)), axis=0)


def track(walk: np.ndarray, sigma: float, at: list[int], every: int = 1) -> dict[int, np.ndarray]:
    """The average as training tracks it, updated each ``every`` steps, at the times ``at``."""
    mean, before, found = np.zeros(walk.shape[1]), 0, {}
    for step in range(every, STEPS + 1, every):
        mean = mean + share_of_new(exponent(sigma), before, step) * (walk[step - 1] - mean)
        before = step
        if step in at:
            found[step] = mean
    return found


@pytest.fixture(scope="module")
def stored(walk) -> dict[float, dict[int, np.ndarray]]:
    return {sigma: track(walk, sigma, [STEPS * k // 32 for k in range(1, 33)]) for sigma in STORED}


def rebuilt(stored: dict, sigma: float, count: int, step: int = STEPS) -> tuple[np.ndarray, float, np.ndarray]:
    """(average of width ``sigma`` at ``step`` from ``count`` snapshots of each width, its expected error, the weights)."""
    steps = [STEPS * k // count for k in range(1, count + 1) if STEPS * k // count <= step]
    profiles = [Profile(t, exponent(s)) for s in STORED for t in steps]
    target = Profile(step, exponent(sigma))
    weights = coefficients(profiles, target)
    value = sum(w * stored[s][t] for w, (s, t) in zip(weights, [(s, t) for s in STORED for t in steps]))
    return value, walk_error(weights, profiles, target), weights


def error(found: np.ndarray, wanted: np.ndarray, last: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - last))


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.9722), (0.1, 6.9372), (0.15, 3.5579), (0.2, 1.8262)])
def test_known_exponents(sigma, gamma):
    assert exponent(sigma) == pytest.approx(gamma, abs=5e-5)


@pytest.mark.parametrize("sigma", [0.001, 0.01, 0.05, 0.1, 0.2, 0.28, 0.2886])
def test_width_and_exponent_are_inverse(sigma):
    assert width(exponent(sigma)) == pytest.approx(sigma, rel=1e-9)
    assert exponent(width(exponent(sigma))) == pytest.approx(exponent(sigma), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.0, -0.1, WIDEST, 0.29, 1.0, float("nan")])
def test_a_width_that_no_average_has_is_refused(sigma):
    """.2887 is that of the plain mean."""
    with pytest.raises(UserError, match=r"sigma_rel.*between 0 and 0\.2887"):
        exponent(sigma)


@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.1, 0.25])
def test_the_update_makes_the_profile(sigma):
    """Tracked on unit vectors, the weights of the steps have the width asked for and the power's mean."""
    weights = track(np.eye(STEPS), sigma, [STEPS])[STEPS]
    times = np.arange(1, STEPS + 1) / STEPS
    mean = float((weights * times).sum())
    assert weights.sum() == pytest.approx(1, abs=1e-12) and weights.min() >= 0
    assert float(np.sqrt((weights * (times - mean) ** 2).sum())) == pytest.approx(sigma, rel=2e-3)
    assert mean == pytest.approx((exponent(sigma) + 1) / (exponent(sigma) + 2), abs=2e-4)


@pytest.mark.parametrize("every", [10, 100])
def test_updates_far_apart_count_their_time(every):
    """With the interval as it is, an update each hundred steps keeps width and mean age; taken as 1 it would not."""
    weights = track(np.eye(STEPS), 0.1, [STEPS], every)[STEPS]
    times = np.arange(1, STEPS + 1) / STEPS
    mean = float((weights * times).sum())
    assert float(np.sqrt((weights * (times - mean) ** 2).sum())) == pytest.approx(0.1, abs=0.0015)
    assert mean == pytest.approx(0.888, abs=0.015)
    wrong, mean_of_wrong = 0.0, 0.0
    for step in range(every, STEPS + 1, every):
        share = share_of_new(exponent(0.1), step - 1, step)
        mean_of_wrong += share * (step / STEPS - mean_of_wrong)
        wrong = share
    assert wrong < 0.003 and mean_of_wrong < mean - 0.04 * every / 10


@pytest.mark.parametrize(("count", "wanted"), [(4, 4.5e-2), (8, 7.4e-3), (16, 8.5e-4), (32, 8.4e-5)])
def test_reconstruction_of_a_random_walk(walk, stored, count, wanted):
    """Width .15 from the averages of .05 and .10."""
    direct = track(walk, 0.15, [STEPS])[STEPS]
    value, expected, weights = rebuilt(stored, 0.15, count)
    assert error(value, direct, walk[-1]) == pytest.approx(wanted, rel=0.15)
    assert expected == pytest.approx(wanted, rel=0.15) and weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("sigma", [0.02, 0.03, 0.075, 0.2, 0.25])
def test_the_expected_error_is_the_error(walk, stored, sigma, count):
    """Outside the tracked widths it grows, and is known beforehand: .03 is poor."""
    direct = track(walk, sigma, [STEPS])[STEPS]
    value, expected, _ = rebuilt(stored, sigma, count)
    assert error(value, direct, walk[-1]) == pytest.approx(expected, rel=0.15)
    if (sigma, count) == (0.03, 8):
        assert expected == pytest.approx(7e-2, rel=0.15)


@pytest.mark.parametrize("sigma", STORED)
@pytest.mark.parametrize("count", [2, 8, 32])
def test_a_tracked_width_is_itself(walk, stored, sigma, count):
    """Exactly the stored average."""
    value, expected, weights = rebuilt(stored, sigma, count)
    np.testing.assert_allclose(value, stored[sigma][STEPS], atol=1e-9)
    assert expected < 1e-7 and np.isclose(weights, 1).sum() == 1


def test_an_earlier_time(walk, stored):
    """As of step 2000, from what there was by then."""
    direct = track(walk, 0.15, [2000])[2000]
    value, expected, _ = rebuilt(stored, 0.15, 32, step=2000)
    assert error(value, direct, walk[1999]) == pytest.approx(expected, rel=0.15) and expected < 1e-3


def test_later_averages_are_not_used():
    """They hold weights that the target must not."""
    with pytest.raises(ValueError, match="later"):
        coefficients([Profile(10, 5.0), Profile(20, 5.0)], Profile(15, 5.0))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_weights_add_up_to_one(count):
    """At few snapshots a plain least-squares solution does not."""
    for sigma in (0.03, 0.15, 0.25):
        profiles = [Profile(t, exponent(s)) for s in STORED for t in np.linspace(STEPS / count, STEPS, count)]
        assert coefficients(profiles, Profile(STEPS, exponent(sigma))).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("gap", [1, 10, 1000])
def test_the_share_of_new_weights_is_exact_late_in_a_run(gap):
    """At step 10^9 the share is 1e-8 gamma: 1 - beta would lose half its digits."""
    now, gamma = 10**9, exponent(0.1)
    assert share_of_new(gamma, now - gap, now) == pytest.approx((gamma + 1) * gap / now, rel=1e-5)
    assert share_of_new(gamma, 0, 1) == 1
