"""Straightness, few-step gap and the error of one Euler step on mixtures: each is what the exact paths say."""

import math

import numpy as np
import pytest
import torch
from closed_form import Mixture, exact_paths, mean_straightness
from closed_form_models import LINE, PLANE, closed_form
from torch import Tensor

from dedistill.evaluation.meters import RatioEstimate, path_meters
from dedistill.flow.solvers import sigma_grid, solve
from dedistill.sampling.sampler import Sampling, start_noise

TWO = Mixture.of([0.5, 0.5], [[-1.0], [1.0]], [[0.1], [0.1]], [0, 1])
RARE = Mixture.of([0.9, 0.1], [[-0.5], [2.5]], [[0.4], [0.3]], [0, 1])
RING = Mixture.of([0.5, 0.3, 0.2], [[1.5, 0.0], [-0.8, 1.2], [-0.8, -1.2]], [[0.3, 0.3], [0.2, 0.5], [0.4, 0.2]], [0, 0, 0])
FEW, COARSE = (1, 2, 4), 48
MIXTURES = {
    "three on a line": (LINE, ""),
    "two of the three": (LINE, "1"),
    "two alike": (TWO, ""),
    "a rare one": (RARE, ""),
    "two in a plane": (PLANE, ""),
    "three in a plane": (RING, ""),
}


def spread(count: int) -> Tensor:
    """Noise [count, 1, 1, 1]: the middles of equal shares of the normal distribution."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float().reshape(-1, 1, 1, 1)


def read(mixture: Mixture, label: str, noise: Tensor, solver: str = "heun") -> list[dict[str, RatioEstimate]]:
    """With ``COARSE`` steps and with twice as many."""
    model, prompts = closed_form(mixture), [label] * len(noise)
    return [path_meters(model, prompts, noise, Sampling(solver=solver, steps=n), few=FEW) for n in (COARSE, 2 * COARSE)]


@pytest.mark.parametrize("name", MIXTURES)
def test_meters_come_to_what_the_exact_paths_say(name):
    """Two numbers of steps tell where a meter goes with ever more: to a thousandth, on the very noise that was asked."""
    mixture, label = MIXTURES[name]
    dims = mixture.means.shape[1]
    noise = spread(300) if dims == 1 else start_noise(0, 150, (1, 1, 2))
    own, e, grid = mixture.given(int(label)) if label else mixture, noise.flatten(1).double(), sigma_grid(COARSE)
    states, energy = exact_paths(own.velocity, e, grid)
    if dims == 1:
        torch.testing.assert_close(states[-1], own.transport(e), rtol=0, atol=1e-8)
    chord = float((e - states[-1]).square().mean())
    coarse, fine = read(mixture, label, noise)

    def limit(key: str) -> np.ndarray:  # Heun's paths are of second order
        return (4 * fine[key].value - coarse[key].value) / 3

    assert limit("straightness")[0] == pytest.approx(float(energy.mean()) / chord - 1, rel=1e-3)
    if dims == 1:  # over all noise, by the densities and quantiles alone: no path is followed
        assert limit("straightness")[0] == pytest.approx(mean_straightness(own), rel=0.01)
    short = [[*solve("heun", lambda x, s, _: own.velocity(x, s), e, sigma_grid(n))][-1] for n in FEW]
    gaps = [float((x - states[-1]).square().mean()) / chord for x in short]
    np.testing.assert_allclose(limit("few_steps"), gaps, rtol=1e-3)
    left = [x - s * own.velocity(x, float(s)) - states[-1] for x, s in zip(states[:-1], grid[:-1])]
    errors = np.array([float(x.square().mean()) for x in left]) / chord
    # the mean velocity of a step is of first order in its width
    one_step = 2 * fine["one_step"].value[::2] - coarse["one_step"].value
    np.testing.assert_allclose(one_step, errors, rtol=0, atol=5e-3 * errors.max())
    assert errors[0] == pytest.approx(gaps[0], rel=1e-9), "from noise, one Euler step is the sampler's only one"


def test_two_points_are_reached_as_is_known():
    """-1 and 1, however little they are spread: noise goes to its sign, and its first step to 0. So one step misses by
    1 / E(|e| - 1)^2 = 1 / (2 - 2 sqrt(2 / pi)) of the path, 2.474."""
    points = Mixture.of([0.5, 0.5], [[-1.0], [1.0]], [[1e-3], [1e-3]], [0, 1])
    _, fine = read(points, "", spread(1000), "euler")
    known = 1 / (2 - 2 * math.sqrt(2 / math.pi))
    assert fine["few_steps"].value[0] == pytest.approx(known, rel=0.01)
    assert fine["one_step"].value[0] == pytest.approx(known, rel=0.01)
    assert fine["one_step"].value[-1] == pytest.approx(0, abs=1e-12)
