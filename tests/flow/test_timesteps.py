"""From a uniform draw to sigma: densities against their closed forms, shift, and strata over the whole batch."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from dedistill.data.digits import load_digits
from dedistill.flow import path as ts
from dedistill.objectives.base import Objective, objective_for
from dedistill.recipe.schema import Timesteps

P = np.arange(1, 20_000) / 20_000


def draw(seed, step, batch, *, density, params, shift=1.0, stratify=True):
    """sigma [batch] of a step, as objectives put it together."""
    return ts.shift_sigma(ts.DENSITIES[density](ts.probabilities(seed, "sigma", step, batch, stratify), **params), shift)


def logit_normal_cdf(sigma, mean=0.0, std=1.0):
    """logit(sigma) ~ N(mean, std^2)."""
    return stats.norm.cdf((logit(sigma) - mean) / std)


def cosmap_cdf(sigma):
    """The integral of pi(t) = 2 / (pi - 2 pi t + 2 pi t^2) from 0."""
    return (np.arctan(2 * sigma - 1) + math.pi / 4) * 2 / math.pi


def mode_by_paper(u, scale):
    """The paper's map, which falls from 1 to 0 in u."""
    return 1 - u - scale * (np.cos(math.pi * u / 2) ** 2 - 1 + u)


BETA = {"alpha": 2.0, "beta": 2.0}
CLOSED = [
    ("uniform", {}, lambda s: s),
    ("logit_normal", {"mean": 0.0, "std": 1.0}, logit_normal_cdf),
    ("logit_normal", {"mean": 1.0, "std": 0.5}, lambda s: logit_normal_cdf(s, 1.0, 0.5)),
    ("beta", BETA, stats.beta(2, 2).cdf),
    ("beta", {"alpha": 3.0, "beta": 2.0}, stats.beta(3, 2).cdf),
    ("beta", {"alpha": 0.7, "beta": 1.4}, stats.beta(0.7, 1.4).cdf),
    ("cosmap", {}, cosmap_cdf),
    ("u_shaped", {"alpha": 4.0}, lambda s: 0.5 + np.sinh(4 * (s - 0.5)) / (2 * np.sinh(2))),
    ("u_shaped", {"alpha": 0.5}, lambda s: 0.5 + np.sinh(0.5 * (s - 0.5)) / (2 * np.sinh(0.25))),
]
ALL = [*[(name, params) for name, params, _ in CLOSED], *[("mode", {"scale": s}) for s in (-1.0, 0.0, 0.81, 1.29, 1.75)]]


@pytest.mark.parametrize(("density", "params", "cdf"), CLOSED)
def test_inverse_cdf_inverts_the_closed_form(density, params, cdf):
    """cdf(inverse(p)) = p."""
    np.testing.assert_allclose(cdf(ts.DENSITIES[density](P, **params)), P, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("density", "params", "cdf"), CLOSED)
def test_draws_follow_the_closed_form(density, params, cdf):
    """KS below .01 with independent draws, below 1e-3 (really 1 / N) with strata, at 1e5 draws."""
    distance = {}
    for stratify in (True, False):
        sigma = draw(0, 0, 100_000, density=density, params=params, stratify=stratify)
        distance[stratify] = stats.kstest(sigma, cdf).statistic
    assert distance[False] < 0.01 and distance[True] < 2e-5


@pytest.mark.parametrize(("density", "params"), ALL)
def test_every_density_rises_from_zero_to_one(density, params):
    """Strictly monotone, inside [0, 1], finite at the smallest and largest p."""
    sigma = ts.DENSITIES[density](P, **params)
    assert sigma.dtype == np.float64 and np.all(np.diff(sigma) > 0)
    ends = ts.DENSITIES[density](np.array([0.0, 2.0**-54, 1 - 2.0**-53, 1.0]), **params)
    assert np.all(np.isfinite(ends)) and ends.min() >= 0 and ends.max() <= 1
    assert ends[0] == 0 and ends[-1] == pytest.approx(1, abs=1e-15)


def test_logit_normal_numbers():
    """Density 1.5958 at .5 and variance .04338 for (0, 1)."""
    h = 1e-6
    low, high = ts.logit_normal(np.array([0.5 - h, 0.5 + h]), 0.0, 1.0)
    assert 2 * h / (high - low) == pytest.approx(1.5958, abs=1e-4)
    assert ts.logit_normal(P, 0.0, 1.0).var() == pytest.approx(0.04338, abs=2e-5)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75, ts.MODE_SCALE_MAX])
def test_mode_is_the_papers_map_turned_round(scale):
    """f(0) = 1, f(1) = 0; ours rises, so p = 1 - u."""
    np.testing.assert_allclose(ts.mode(P, scale), mode_by_paper(1 - P, scale), rtol=0, atol=1e-15)
    assert np.all(np.diff(ts.mode(P, scale)) > 0)


def test_mode_scale_zero_is_uniform():
    np.testing.assert_allclose(ts.mode(P, 0.0), P, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [-1.001, 1.7520, 3.0, math.nan])
def test_mode_out_of_range_raises(scale):
    """Monotone for -1 <= s <= 2 / (pi - 2) = 1.7519 only."""
    assert pytest.approx(1.7519, abs=5e-5) == ts.MODE_SCALE_MAX
    with pytest.raises(ValueError, match="outside"):
        ts.mode(P, scale)


def test_mode_beyond_its_range_would_not_be_monotone():
    """The limits are where the paper's map turns back, not a matter of taste."""
    for scale in (-1.05, ts.MODE_SCALE_MAX + 0.05):
        assert np.any(np.diff(mode_by_paper(1 - P, scale)) < 0)


@pytest.mark.parametrize(("shape", "distance"), [(2.0, 0.0212), (2.35, 0.0045)])
def test_beta_is_near_logit_normal(shape, distance):
    """KS(Beta(2,2), logit-normal(0,1)) = .0212; the best symmetric match is Beta(2.35, 2.35), .0045."""
    sigma = ts.beta(P, shape, shape)
    assert np.abs(logit_normal_cdf(sigma) - P).max() == pytest.approx(distance, abs=5e-5)


def test_tails_of_beta_and_logit_normal():
    """P(sigma > .9) 2.8 % and 1.4 %; P(sigma > .98) .118 % and .005 %."""
    p = np.arange(1, 1_000_000) / 1_000_000
    b, n = ts.beta(p, 2.0, 2.0), ts.logit_normal(p, 0.0, 1.0)
    assert [round(100 * np.mean(x > 0.9), 1) for x in (b, n)] == [2.8, 1.4]
    assert [round(100 * np.mean(x > 0.98), 3) for x in (b, n)] == [0.118, 0.005]


@pytest.mark.parametrize(("alpha", "beta", "mean"), [(2, 2, 0.5), (3, 2, 0.6), (2, 1, 2 / 3)])
def test_beta_leans_towards_noise_only_with_alpha_above_beta(alpha, beta, mean):
    assert ts.beta(P, alpha, beta).mean() == pytest.approx(mean, abs=1e-4)


SHIFTS = [(256, 1.6487), (1024, 1.8776), (2304, 2.3319), (4096, 3.1582), (9216, 7.5132)]


@pytest.mark.parametrize(("tokens", "shift"), SHIFTS)
def test_dynamic_shift_numbers(tokens, shift):
    """256, 512, 768, 1024 and 1536 pixels."""
    assert ts.dynamic_shift(tokens) == pytest.approx(shift, abs=5e-5)


def test_dynamic_shift_with_the_other_constant():
    """1.15 (BFL, diffusers) gives 3.1582 at 1024 pixels, 1.16 (other trainers) 3.1899."""
    assert ts.dynamic_shift(4096, maximum=1.16) == pytest.approx(3.1899, abs=5e-5)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 3.1582])
def test_shift_moves_the_logit(shift):
    """logit(sigma') = logit(sigma) + ln s; 1 / s undoes it; the median of U(0, 1) goes to s / (1 + s)."""
    moved = ts.shift_sigma(P, shift)
    np.testing.assert_allclose(logit(moved), logit(P) + math.log(shift), rtol=0, atol=1e-11)
    np.testing.assert_allclose(ts.shift_sigma(moved, 1 / shift), P, rtol=0, atol=1e-14)
    drawn = draw(0, 0, 10_001, density="uniform", params={}, shift=shift)
    assert np.median(drawn) == pytest.approx(shift / (1 + shift), abs=1e-4)
    assert ts.shift_sigma(np.array([0.0, 1.0]), shift).tolist() == [0.0, pytest.approx(1, abs=1e-15)]


def test_median_numbers_of_the_shift():
    """.75 at 3, .7595 at 3.1582."""
    assert ts.shift_sigma(0.5, 3.0) == 0.75
    assert ts.shift_sigma(0.5, 3.1582) == pytest.approx(0.7595, abs=5e-5)


def test_shift_is_applied_once():
    """Twice would be the square of it."""
    once = draw(0, 0, 64, density="uniform", params={}, shift=3.0)
    plain = draw(0, 0, 64, density="uniform", params={}, shift=1.0)
    np.testing.assert_allclose(logit(once) - logit(plain), math.log(3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_shift_must_be_positive(shift):
    with pytest.raises(ValueError, match="must be positive"):
        ts.shift_sigma(P, shift)


@pytest.mark.parametrize("batch", [1, 7, 8, 35, 56, 64, 1000])
def test_exactly_one_draw_per_stratum(batch):
    for step in range(5):
        p = ts.probabilities(0, "sigma", step, batch, stratify=True)
        assert p.min() > 0 and p.max() < 1
        assert sorted(np.floor(p * batch)) == list(range(batch))


@pytest.mark.parametrize(("density", "params", "cdf"), CLOSED)
def test_strata_survive_density_and_shift(density, params, cdf):
    """Any quantile function, then the shift, still one sigma in each of N equally likely bands."""
    for step in range(5):
        sigma = draw(0, step, 56, density=density, params=params, shift=3.0)
        assert sorted(np.floor(cdf(ts.shift_sigma(sigma, 1 / 3)) * 56)) == list(range(56))


def test_unstratified_draws_leave_strata_empty():
    p = [ts.probabilities(0, "sigma", step, 56, stratify=False) for step in range(50)]
    filled = np.mean([len(set(np.floor(x * 56))) for x in p]) / 56
    assert filled == pytest.approx(1 - (1 - 1 / 56) ** 56, abs=0.02)


@pytest.fixture(scope="module")
def many_steps():
    """p of 8 slots over 10,000 steps."""
    return np.stack([ts.probabilities(0, "sigma", step, 8, stratify=True) for step in range(10_000)])


def test_marginal_of_every_slot_is_uniform(many_steps):
    """No slot, hence no rank and no place in a batch, is bound to a band of noise."""
    for slot in many_steps.T:
        assert stats.kstest(slot, "uniform").statistic < 1.95 / 100  # 1 in 1000


def test_slot_and_sigma_are_uncorrelated(many_steps):
    """Over 10,000 steps, between slot and sigma, and between a slot's neighbours in time."""
    slots = np.tile(np.arange(8), (len(many_steps), 1))
    assert abs(np.corrcoef(slots.ravel(), many_steps.ravel())[0, 1]) < 4 / many_steps.size**0.5
    for slot in many_steps.T:
        assert abs(np.corrcoef(slot[1:], slot[:-1])[0, 1]) < 0.04


def test_permutation_differs_between_steps(many_steps):
    """Every stratum visits every slot equally often, in an order that changes from step to step."""
    strata = np.floor(many_steps * 8).astype(int)
    assert np.mean(np.all(strata[1:] == strata[:-1], axis=1)) < 1e-3
    counts = np.stack([np.bincount(slot, minlength=8) for slot in strata.T])
    assert stats.chisquare(counts, axis=1).pvalue.min() > 1e-3


def test_places_inside_the_strata_are_independent(many_steps):
    """Not one u for all (systematic sampling)."""
    inside = many_steps * 8 % 1
    assert np.abs(np.corrcoef(inside.T) - np.eye(8)).max() < 0.05
    assert stats.kstest(inside.ravel(), "uniform").statistic < 1.95 / inside.size**0.5


@pytest.mark.parametrize(("batch", "factor"), [(8, 5), (56, 50)])
@pytest.mark.parametrize("g", [lambda s: s, lambda s: 0.4 + (2 * s - 1) ** 2], ids=["sigma", "u-shaped"])
def test_strata_lower_the_variance_of_a_batch_mean(batch, factor, g):
    """At least 5 times at N = 8 and 50 times at N = 56 (Beta(2,2))."""
    variance = {}
    for stratify in (True, False):
        options = {"density": "beta", "params": BETA, "stratify": stratify}
        variance[stratify] = np.var([g(draw(0, step, batch, **options)).mean() for step in range(1500)])
    assert variance[False] / variance[True] > factor


def objective(batch: int, seed: int = 0) -> Objective:
    """The real objective over the digits, from the few recipe values it reads."""
    recipe = SimpleNamespace(
        run=SimpleNamespace(seed=seed),
        train=SimpleNamespace(objective="flow", batch=batch, huber=None, lpips=None),
        data=SimpleNamespace(caption_dropout=0.1, image_dropout=None),
        timesteps=Timesteps(density="beta", **BETA),
    )
    return objective_for(recipe, load_digits(0.0), lambda shape: 1.0)


@pytest.mark.parametrize("cuts", [[], [12], [6, 12, 18], [5, 10, 15, 20], [1, 23], list(range(1, 24))], ids=len)
def test_micro_batches_and_ranks_share_one_vector(cuts):
    """Strata belong to the optimizer step; how its slots are shared out, evenly or not, changes no sigma."""
    step, batch = 3, 24
    whole = draw(0, step, batch, density="beta", params=BETA).astype(np.float32)
    questions = objective(batch)
    tasks = [questions.noisy_batch(step, positions) for positions in np.split(np.arange(batch), cuts)]
    assert np.array_equal(np.concatenate([t.sigma.numpy() for t in tasks]), whole)
    for a, b in itertools.pairwise(tasks):
        assert not np.isin(a.sigma.numpy(), b.sigma.numpy()).any()


def test_resumed_run_draws_the_same_step():
    """A function of (seed, step), whatever was drawn before."""
    slots = np.arange(16)
    fresh, used = objective(16), objective(16)
    for step in range(3):
        used.noisy_batch(step, slots)
    sigma = fresh.noisy_batch(3, slots).sigma
    assert np.array_equal(used.noisy_batch(3, slots).sigma, sigma)
    assert not np.array_equal(fresh.noisy_batch(4, slots).sigma, sigma)
    assert not np.array_equal(objective(16, seed=1).noisy_batch(3, slots).sigma, sigma)


def test_validation_midpoints():
    """One sigma in the middle of each interval, in a fixed order that is not sorted."""
    sigma = ts.midpoints(0, 40)
    np.testing.assert_allclose(np.sort(sigma), (np.arange(40) + 0.5) / 40)
    assert np.any(np.diff(sigma) < 0) and np.array_equal(sigma, ts.midpoints(0, 40))
    assert not np.array_equal(sigma, ts.midpoints(1, 40))


def test_extreme_logit_normal_stays_finite():
    """No NaN however far the density leans."""
    for mean in (-50.0, 50.0, 800.0):
        sigma = ts.logit_normal(np.array([2.0**-54, 0.5, 1 - 2.0**-53]), mean, 4.0)
        assert np.all(np.isfinite(sigma)) and sigma[1] == pytest.approx(expit(mean))
