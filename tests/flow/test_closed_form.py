"""The closed form is right: against sampling, against least squares, and where two of its own answers must agree."""

import math

import numpy as np
import pytest
import torch

from dedistill.flow import keyed
from dedistill.flow.closed_form import Mixture, gaussian_mean_floor, gaussian_path, gaussian_straightness
from dedistill.flow.loss import flow_loss
from dedistill.flow.path import interpolate, velocity
from dedistill.flow.solvers import euler, sigma_grid
from dedistill.flow.timesteps import uniform


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PLANE = Mixture(
    tensor([-2.0, 0.0], [1.5, 1.0], [2.0, -1.0]), tensor(0.5, 0.3, 0.8), tensor(0.5, 0.2, 0.3), torch.tensor([0, 1, 1])
)
LINE = Mixture(tensor([-1.0], [2.0]), tensor(0.4, 0.7), tensor(0.6, 0.4), torch.tensor([0, 1]))
SINGLE = Mixture(tensor([1.5, -0.5, 2.0]), tensor(0.4), tensor(1.0), torch.tensor([0]))


def drawn(mixture: Mixture, sigma: float, count: int, seed: int = 0):
    """(data, noise, noisy, labels)."""
    data, labels = mixture.sample(np.random.default_rng(seed), count)
    noise = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal(tuple(data.shape)))
    return data, noise, interpolate(data, noise, torch.full((count,), sigma).double()), labels


@pytest.mark.parametrize("label", [None, 0, 1])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_velocity_is_the_mean_of_what_led_there(sigma, label):
    """F1, F2: over samples in a small window of noisy points, noise - data averages to it, within four standard errors."""
    data, noise, noisy, _ = drawn(PLANE.of(label), sigma, 200_000)
    at = noisy[np.random.default_rng(5).choice(400, 4)]
    for point in at:
        near = (noisy - point).norm(dim=1) < 0.05
        wanted = PLANE.velocity(noisy[near], torch.full((int(near.sum()),), sigma).double(), label)
        rest = velocity(data, noise)[near] - wanted  # the velocity moves within the window, what is left does not
        assert (rest.mean(0).abs() < 4.5 * rest.std(0) / math.sqrt(int(near.sum())) + 1e-12).all()


@pytest.mark.parametrize("label", [None, 0, 1])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.7, 0.95])
def test_loss_floor_is_the_loss_of_the_exact_velocity(sigma, label):
    """F1: by sampling, within four standard errors; and no other prediction has less."""
    data, noise, noisy, _ = drawn(PLANE.of(label), sigma, 100_000)
    times = torch.full((len(data),), sigma).double()
    exact = PLANE.velocity(noisy, times, label)
    losses = flow_loss(exact, velocity(data, noise))
    assert abs(float(losses.mean()) - PLANE.loss_floor(sigma, label)) < 4 * float(losses.std()) / math.sqrt(len(losses))
    for other in (exact * 1.05, exact + 0.05, PLANE.velocity(noisy, times, 0 if label == 1 else 1)):
        assert float(flow_loss(other, velocity(data, noise)).mean()) > float(losses.mean())


def test_a_label_never_raises_the_floor():
    """Knowing more costs nothing: the mean of the labels' floors is below that of all data, and far below in the middle."""
    for sigma in (0.1, 0.5, 0.9):
        labelled = sum(float(LINE.shares[LINE.labels == c].sum()) * LINE.loss_floor(sigma, c) for c in (0, 1))
        assert labelled <= LINE.loss_floor(sigma) + 1e-12
    assert LINE.loss_floor(0.6) > 1.2 * (0.6 * LINE.loss_floor(0.6, 0) + 0.4 * LINE.loss_floor(0.6, 1))


def test_ends_of_the_floor():
    """F1: at the noise the loss is the variance of the data, at the data that of the noise, per number."""
    data, _ = PLANE.sample(np.random.default_rng(0), 10)
    mean = (PLANE.shares[:, None] * PLANE.means).sum(0)
    spread = (PLANE.shares * (PLANE.deviations**2 + (PLANE.means - mean).square().mean(1))).sum()
    assert PLANE.loss_floor(1.0) == pytest.approx(float(spread), rel=1e-9)
    assert PLANE.loss_floor(0.0) == pytest.approx(1.0, abs=1e-9) and data.shape == (10, 2)


@pytest.mark.parametrize("label", [0, 1])
def test_exact_flow_makes_the_data(label):
    """F3: Euler with the exact velocity ends in samples with the mixture's mean and covariance."""
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((5_000, 2)))
    *_, ends = euler(lambda z, s, i: PLANE.velocity(z, torch.full((len(z),), s).double(), label), noise, sigma_grid(100))
    own = PLANE.of(label)
    mean = (own.shares[:, None] * own.means).sum(0)
    assert float((ends.mean(0) - mean).abs().max()) < 0.06
    centred = own.means - mean
    covariance = torch.diag((own.shares * own.deviations**2).sum().repeat(2)) + (own.shares * centred.T) @ centred
    assert float((torch.cov(ends.T) - covariance).abs().max()) < 0.1


def test_single_gaussian_follows_its_path():
    """F3: at every sigma, and it is the path's derivative."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 3)))
    for sigma in (0.1, 0.5, 0.9):
        here = gaussian_path(SINGLE.means[0], 0.4, noise, sigma)
        ahead, behind = (gaussian_path(SINGLE.means[0], 0.4, noise, sigma + d) for d in (1e-6, -1e-6))
        exact = SINGLE.velocity(here, torch.full((8,), sigma).double())
        torch.testing.assert_close(exact, (ahead - behind) / 2e-6, rtol=0, atol=1e-7)
    torch.testing.assert_close(gaussian_path(SINGLE.means[0], 0.4, noise, 1.0), noise)


@pytest.mark.parametrize("cfg", [0.0, 1.0, 3.0, 7.0])
def test_guidance_between_gaussians_moves_the_mean(cfg):
    """Where data of a label and all data are Gaussians of one deviation, guidance has a closed end as well."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 1)))
    label, everything = Mixture(tensor([2.0]), tensor(0.5), tensor(1.0), torch.tensor([1])), tensor(0.5)
    field = Mixture(everything[None], tensor(0.5), tensor(1.0), torch.tensor([0]))
    moved = everything + cfg * (label.means[0] - everything)
    for sigma in (0.2, 0.8):
        times, here = torch.full((16,), sigma).double(), gaussian_path(moved, 0.5, noise, sigma)
        guided = field.velocity(here, times) + cfg * (label.velocity(here, times) - field.velocity(here, times))
        wanted = Mixture(moved[None], tensor(0.5), tensor(1.0), torch.tensor([0])).velocity(here, times)
        torch.testing.assert_close(guided, wanted)


def test_guided_field_is_linear_in_its_scale():
    """cfg 0 is all data, 1 the label; each further unit adds the same again."""
    noisy, times = torch.randn(32, 2, dtype=torch.float64), torch.full((32,), 0.6).double()
    zero, one, four = (PLANE.guided(noisy, times, 1, cfg) for cfg in (0.0, 1.0, 4.0))
    torch.testing.assert_close(zero, PLANE.velocity(noisy, times))
    torch.testing.assert_close(one, PLANE.velocity(noisy, times, 1))
    torch.testing.assert_close(four - zero, 4 * (one - zero))


@pytest.mark.parametrize("deviation", [0.2, 1.0, 2.5])
def test_straightness_and_mean_floor(deviation):
    """Against the integrals over sigma that they are."""
    sigmas = (np.arange(20_000) + 0.5) / 20_000
    variance = (1 - sigmas) ** 2 * deviation**2 + sigmas**2
    turning = (sigmas - (1 - sigmas) * deviation**2) / np.sqrt(variance)  # d sqrt(variance) / d sigma
    assert gaussian_straightness(deviation) == pytest.approx(float(((1 - deviation - turning) ** 2).mean()), abs=1e-6)
    assert gaussian_mean_floor(deviation) == pytest.approx(float((deviation**2 / variance).mean()), rel=1e-6)
    single = Mixture(tensor([0.0]), tensor(deviation), tensor(1.0), torch.tensor([0]))
    assert np.mean([single.loss_floor(float(s)) for s in sigmas[50::100]]) == pytest.approx(deviation * math.pi / 2, rel=1e-3)


def test_strata_estimate_the_mean_floor_with_less_variance():
    """B-rows: one draw in each of 16 equal shares against 16 free draws, over the exact loss of sigma."""
    loss = lambda p: 0.25 / ((1 - uniform(p)) ** 2 * 0.25 + uniform(p) ** 2)  # noqa: E731
    free = keyed.uniforms(0, "free", 0, (2000, 16))
    strata = (np.arange(16) + keyed.uniforms(0, "strata", 0, (2000, 16))) / 16
    exact, ends = gaussian_mean_floor(0.5), [loss(p).mean(1) for p in (free, strata)]
    assert all(abs(e.mean() - exact) < 4 * e.std() / math.sqrt(2000) for e in ends)
    assert ends[1].var() < ends[0].var() / 50


def test_posterior_far_out_does_not_overflow():
    far = tensor([1e4, -1e4], [0.0, 0.0])
    found = PLANE.posterior(far, tensor(0.01, 0.01))
    assert bool(found.isfinite().all()) and found.sum(1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"deviations": tensor(0.5, 0.0, 1.0)},
        {"shares": tensor(0.5, 0.2, 0.2)},
        {"labels": torch.tensor([0, 1])},
        {"means": tensor(1.0, 2.0, 3.0)},
    ],
)
def test_what_is_no_mixture(wrong):
    with pytest.raises(ValueError, match=r"\[K\]|positive"):
        Mixture(**({f: getattr(PLANE, f) for f in ("means", "deviations", "shares", "labels")} | wrong))


def test_unknown_label_and_too_many_dimensions():
    with pytest.raises(ValueError, match="no component has the label 7"):
        PLANE.velocity(tensor([0.0, 0.0]), tensor(0.5), 7)
    high = Mixture(torch.eye(3).double(), tensor(1.0, 1.0, 1.0), tensor(0.5, 0.25, 0.25), torch.tensor([0, 0, 1]))
    assert high.loss_floor(0.5, 1) > 0
    with pytest.raises(ValueError, match="1 or 2 dimensions, not 3"):
        high.loss_floor(0.5)
