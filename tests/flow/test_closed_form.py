"""The closed form against itself, calculus and quadrature; then solvers, guidance, reflow and strata against it."""

import math

import numpy as np
import pytest
import torch
from closed_form import Mixture, straightness
from scipy import integrate, stats

from dedistill.flow.guidance import UNCONDITIONAL, ClassifierFree
from dedistill.flow.path import flow_loss, interpolate, probabilities, velocity
from dedistill.flow.solvers import sigma_grid, solve

LINE = Mixture.of([0.3, 0.5, 0.2], [[-1.5], [0.4], [2.0]], [[0.3], [0.5], [0.2]], [0, 1, 1])
PLANE = Mixture.of([0.4, 0.6], [[-1.0, 0.5], [1.2, -0.3]], [[0.4, 0.7], [0.5, 0.3]], [0, 1])
ONE = Mixture.of([1.0], [[1.5, -0.5]], [[0.4, 0.9]], [0])
SIGMAS = [0.05, 0.3, 0.5, 0.8, 1.0]


def normal(count: int, dims: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def end(field, noise: torch.Tensor, steps: int) -> torch.Tensor:
    *_, data = solve("euler", field, noise, sigma_grid(steps))
    return data


def exact_end(field, noise: torch.Tensor) -> torch.Tensor:
    """The ODE's end to twelve digits, by scipy's eighth-order Runge-Kutta."""

    def flat(sigma: float, x: np.ndarray) -> np.ndarray:
        return field(torch.from_numpy(x).reshape(noise.shape), sigma, 0).numpy().ravel()

    found = integrate.solve_ivp(flat, (1, 0), noise.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(found.y[:, -1]).reshape(noise.shape)


@pytest.mark.parametrize("mixture", [LINE, PLANE, ONE], ids=["line", "plane", "one"])
@pytest.mark.parametrize("sigma", SIGMAS[:-1])
def test_velocity_moves_the_density(mixture, sigma):
    """The continuity equation d log p / d sigma + v . grad log p + div v = 0, by differentiation."""
    x = normal(20, mixture.means.shape[1]).requires_grad_()
    s = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    log_density = mixture.log_density(x, s)
    v = mixture.velocity(x, s)
    score = torch.autograd.grad(log_density.sum(), x, retain_graph=True)[0]
    divergence = sum(torch.autograd.grad(v[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(x.shape[1]))
    in_time = torch.stack([torch.autograd.grad(value, s, retain_graph=True)[0] for value in log_density])
    torch.testing.assert_close(in_time + (v * score).sum(1) + divergence, torch.zeros(20).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mixture", [LINE, PLANE, ONE], ids=["line", "plane", "one"])
def test_velocity_and_score_say_the_same(mixture):
    """velocity = -(noisy + sigma grad log p) / (1 - sigma); one sigma for all, or one each."""
    x = normal(5, mixture.means.shape[1]).requires_grad_()
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    score = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)[0]
    s = sigma[:, None]
    torch.testing.assert_close(mixture.velocity(x, sigma), -(x + s * score) / (1 - s), rtol=1e-10, atol=1e-10)
    each = torch.cat([mixture.velocity(x[i : i + 1], float(sigma[i])) for i in range(5)])
    torch.testing.assert_close(mixture.velocity(x, sigma), each, rtol=0, atol=1e-14)


def test_velocity_is_the_mean_of_what_made_the_sample():
    """E[noise - data | noisy] by integrating over the data behind a noisy value."""
    sigma, x = 0.6, 0.7

    def density(data: float) -> float:
        prior = sum(w * stats.norm.pdf(data, m, s) for w, m, s in zip(LINE.weights, LINE.means[:, 0], LINE.stds[:, 0]))
        return float(prior * stats.norm.pdf((x - (1 - sigma) * data) / sigma))

    def total(f) -> float:
        return integrate.quad(f, -5, 5, limit=200, epsabs=1e-13)[0]

    wanted = total(lambda d: density(d) * ((x - (1 - sigma) * d) / sigma - d)) / total(density)
    assert float(LINE.velocity(torch.tensor([[x]]).double(), sigma)) == pytest.approx(wanted, abs=1e-9)


def test_pure_noise_and_pure_data():
    """At sigma 1 the velocity is noise - E data, at 0 it is - data, whatever the mixture."""
    x = normal(7, 2)
    mean = (PLANE.weights[:, None] * PLANE.means).sum(0)
    torch.testing.assert_close(PLANE.velocity(x, 1.0), x - mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(PLANE.velocity(x, 0.0), -x, rtol=0, atol=1e-13)


def test_labels_part_the_data():
    """p = sum over labels of P(label) p(. | label), and so do the velocities, weighed by the posterior."""
    x, sigma = normal(9, 1), 0.4
    share = {label: float(LINE.weights[LINE.labels == label].sum()) for label in (0, 1)}
    joint = torch.stack([math.log(share[k]) + LINE.given(k).log_density(x, sigma) for k in (0, 1)])
    torch.testing.assert_close(joint.logsumexp(0), LINE.log_density(x, sigma))
    mixed = sum(joint.softmax(0)[k, :, None] * LINE.given(k).velocity(x, sigma) for k in (0, 1))
    torch.testing.assert_close(mixed, LINE.velocity(x, sigma))


@pytest.mark.parametrize("cfg", [0.0, 1.0, 3.0])
def test_guided_field_is_that_of_the_sharpened_density(cfg):
    """CFG is the velocity whose score is grad log p(x)^(1 - cfg) p(x | label)^cfg (arXiv 2207.12598, sec. 3.2)."""
    x, sigma = normal(12, 2).requires_grad_(), 0.35
    tilted = (1 - cfg) * PLANE.log_density(x, sigma) + cfg * PLANE.given(1).log_density(x, sigma)
    score = torch.autograd.grad(tilted.sum(), x)[0]
    torch.testing.assert_close(PLANE.guided(x, sigma, 1, cfg), -(x + sigma * score) / (1 - sigma), rtol=1e-9, atol=1e-9)


def test_draws_have_the_moments_of_the_mixture():
    data, labels = PLANE.draw(0, 40_000)
    mean = (PLANE.weights[:, None] * PLANE.means).sum(0)
    square = (PLANE.weights[:, None] * (PLANE.means**2 + PLANE.stds**2)).sum(0)
    torch.testing.assert_close(data.mean(0), mean, rtol=0, atol=0.025)
    torch.testing.assert_close(data.square().mean(0), square, rtol=0, atol=0.04)
    assert float((labels == 1).double().mean()) == pytest.approx(0.6, abs=0.01)
    assert torch.equal(PLANE.draw(0, 50)[0], PLANE.draw(0, 50)[0]) and not torch.equal(PLANE.draw(1, 50)[0], data[:50])


@pytest.mark.parametrize("sigma", [0.02, 0.5, 1.0])
def test_one_gaussian_is_transported_linearly(sigma):
    """Mean + deviation noise at every sigma solves the ODE."""
    noise, step = normal(30, 2), 1e-5
    there = [ONE.transport(noise, s) for s in (sigma - step, sigma, sigma + step)]
    torch.testing.assert_close((there[2] - there[0]) / (2 * step), ONE.velocity(there[1], sigma), rtol=0, atol=1e-7)
    torch.testing.assert_close(ONE.transport(noise), ONE.means + ONE.stds * noise, rtol=0, atol=1e-14)


def test_in_one_dimension_samples_keep_their_quantile():
    """The quantile map is the ODE's, and takes noise to the mixture's own distribution; far tails included."""
    noise = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]
    torch.testing.assert_close(LINE.transport(noise), exact_end(lambda x, s, _: LINE.velocity(x, s), noise), rtol=0, atol=1e-8)
    below = sum(w * stats.norm.cdf(LINE.transport(noise), m, s) for w, m, s in zip(LINE.weights, LINE.means, LINE.stds))
    np.testing.assert_allclose(below, stats.norm.cdf(noise), atol=1e-12)
    torch.testing.assert_close(LINE.transport(noise, 1.0), noise, rtol=0, atol=1e-12)
    assert LINE.transport(torch.tensor([[20.0]]).double()).isfinite().all()


@pytest.mark.parametrize("mixture", [LINE, PLANE, ONE], ids=["line", "plane", "one"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_floor_is_what_the_exact_velocity_reaches_and_nothing_beats(mixture, sigma):
    """The exact velocity's loss is the floor, within four standard errors; others lose what they differ by."""
    data, _ = mixture.draw(3, 40_000)
    noise = normal(*data.shape, seed=1)
    s = torch.full((len(data),), sigma, dtype=torch.float64)
    noisy, target = interpolate(data, noise, s), velocity(data, noise)
    losses = (mixture.velocity(noisy, sigma) - target).square().mean(1)
    error = float(losses.std()) / len(data) ** 0.5
    floor = mixture.floor(sigma)
    assert float(losses.mean()) == pytest.approx(floor, abs=4 * error + 1e-12)
    zero = float(target.square().mean())
    assert floor < zero
    off = (mixture.velocity(noisy, sigma) + 0.3 - target).square().mean(1) - losses
    assert float(off.mean()) == pytest.approx(0.09, abs=4 * float(off.std()) / len(data) ** 0.5)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_floor_by_quadrature_is_the_formula_of_one_gaussian(sigma):
    """A Gaussian written as two equal ones has the floor of the one: quadrature against s^2 / variance."""
    twice = Mixture.of([0.3, 0.7], [[1.5, -0.5]] * 2, [[0.4, 0.9]] * 2, [0, 1])
    assert twice.floor(sigma) == pytest.approx(ONE.floor(sigma), abs=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0])
def test_floor_falls_with_the_label(sigma):
    """Knowing the label can only help, and helps by the mean squared distance of the two velocities."""
    given = [PLANE.given(k) for k in (0, 1)]
    gap = [g.expect(sigma, lambda x, g=g: (g.velocity(x, sigma) - PLANE.velocity(x, sigma)).square().mean(1)) for g in given]
    known = sum(float(w) * g.floor(sigma) for w, g in zip(PLANE.weights, given))
    assert PLANE.floor(sigma) - known == pytest.approx(float(PLANE.weights @ torch.tensor(gap, dtype=torch.float64)), abs=1e-9)


def test_in_float32_the_loss_is_the_same_floor():
    """The project's own loss on the exact velocity."""
    data, _ = LINE.draw(0, 20_000)
    noise, s = normal(20_000, 1), torch.full((20_000,), 0.5)
    noisy, target = interpolate(data, noise, s), velocity(data, noise)
    assert float(flow_loss(LINE.velocity(noisy, 0.5), target).mean()) == pytest.approx(LINE.floor(0.5), rel=0.05)


@pytest.mark.parametrize("steps", [128, 256])
def test_euler_has_order_one_on_a_mixture(steps):
    """Half the step, half the error, against the exact quantile map."""
    noise = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    exact = LINE.transport(noise)
    errors = [(end(lambda x, s, _: LINE.velocity(x, s), noise, n) - exact).abs().mean() for n in (steps, 2 * steps)]
    assert float(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("steps", [128])
def test_guided_euler_has_order_one(steps):
    """On the CFG field, against an eighth-order solution."""
    noise = normal(20, 2)

    def field(x, s, _):
        return PLANE.guided(x, s, 1, 3.0)

    exact = exact_end(field, noise)
    errors = [(end(field, noise, n) - exact).abs().mean() for n in (steps, 2 * steps)]
    assert float(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_skipped_guidance_is_the_plain_field_first_and_the_guided_one_after():
    """K steps without guidance end where the plain ODE is at sigma = 1 - k / steps, then follow the guided one."""
    noise, steps, skip = normal(20, 2), 1024, 256

    def field(x, s, i):
        guided = UNCONDITIONAL in ClassifierFree(3.0, skip).branches(sigma_grid(steps), i)
        return PLANE.guided(x, s, 1, 3.0 if guided else 1.0)

    states = list(solve("euler", field, noise, sigma_grid(steps)))
    turn = PLANE.given(1).transport(noise, 0.75)
    torch.testing.assert_close(states[skip], turn, rtol=0, atol=8e-3)

    def later(sigma: float, x: np.ndarray) -> np.ndarray:
        return PLANE.guided(torch.from_numpy(x).reshape(20, 2), sigma, 1, 3.0).numpy().ravel()

    rest = integrate.solve_ivp(later, (0.75, 0), turn.numpy().ravel(), rtol=1e-10, atol=1e-10).y[:, -1].reshape(20, 2)
    np.testing.assert_allclose(states[-1], rest, atol=2e-2)
    assert float((states[-1] - turn).abs().max()) > 0.1


def test_reflow_of_the_exact_pairs_is_straight():
    """Flow matching on a Gaussian's own pairs (noise, mean + s noise) has a floor of zero and needs one Euler step."""
    noise = normal(500, 2)
    ends = ONE.transport(noise)
    sigma = torch.linspace(0.01, 1, 500, dtype=torch.float64)
    noisy, target = interpolate(ends, noise, sigma), velocity(ends, noise)

    def straight(x, s, _):
        """The only line through x at s that joins some noise to its own end."""
        s = torch.as_tensor(s, dtype=torch.float64).reshape(-1, 1)
        own = (x - (1 - s) * ONE.means) / (s + (1 - s) * ONE.stds)
        return own - (ONE.means + ONE.stds * own)

    torch.testing.assert_close(straight(noisy, sigma, 0), target, rtol=0, atol=1e-11)
    torch.testing.assert_close(end(straight, noise, 1), ends, rtol=0, atol=1e-12)
    assert float((end(lambda x, s, _: ONE.velocity(x, s), noise, 1) - ends).square().mean()) > 0.1
    assert straightness(ONE) > 0.01


def test_straightness_is_the_integral_over_exact_paths():
    """The integral of |chord - velocity|^2 / |chord|^2 along transported noise."""
    noise = normal(10_000, 2)
    chord = noise - ONE.transport(noise)
    grid = np.linspace(0, 1, 101)
    curvature = [float((chord - ONE.velocity(ONE.transport(noise, s), s)).square().mean()) for s in grid]
    assert np.trapezoid(curvature, grid) / float(chord.square().mean()) == pytest.approx(straightness(ONE), rel=0.05)


def test_strata_lower_the_variance_of_the_loss_and_not_its_mean():
    """Over many steps the mean loss per step has the same expectation, and far less spread with strata.

    The loss of a sample is its floor at its sigma, which isolates the part of the variance that sigma brings.
    """
    table = np.array([ONE.floor(s) for s in np.linspace(0, 1, 2001)])

    def steps(stratify: bool) -> np.ndarray:
        sigma = np.stack([probabilities(0, "sigma", i, 16, stratify) for i in range(400)])
        return np.interp(sigma, np.linspace(0, 1, 2001), table).mean(1)

    plain, strata = steps(False), steps(True)
    exact = np.trapezoid(table, dx=1 / 2000)
    for drawn in (plain, strata):
        assert drawn.mean() == pytest.approx(exact, abs=4 * drawn.std() / 20)
    assert strata.var() < plain.var() / 50


@pytest.mark.parametrize(
    "arguments",
    [
        ([0.5, 0.4], [[0.0], [1.0]], [[1.0], [1.0]], [0, 1]),
        ([0.5, 0.5], [[0.0], [1.0]], [[1.0], [0.0]], [0, 1]),
        ([1.0], [[0.0]], [[1.0, 1.0]], [0]),
        ([1.0], [[0.0]], [[1.0]], [0, 1]),
    ],
)
def test_what_is_no_mixture_is_refused(arguments):
    with pytest.raises(ValueError, match="weights"):
        Mixture.of(*arguments)


def test_what_has_no_closed_form_is_refused():
    with pytest.raises(ValueError, match="no transport in closed form"):
        PLANE.transport(normal(1, 2))
    with pytest.raises(ValueError, match="no component has label 9"):
        PLANE.given(9)
    with pytest.raises(ValueError, match="quadrature in 3"):
        Mixture.of([0.5, 0.5], [[0.0] * 3] * 2, [[1.0] * 3] * 2, [0, 1]).floor(0.5)
    with pytest.raises(ValueError, match="single component"):
        straightness(PLANE)
