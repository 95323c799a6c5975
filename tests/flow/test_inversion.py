"""RF-inversion on one Gaussian, whose velocity and ends are known, in float64."""

import pytest
import torch

from dedistill.flow.inversion import edited, inverted
from dedistill.flow.solvers import sigma_grid

MEAN, STD = 0.3, 0.5
X0, Y1 = (torch.tensor([[value]], dtype=torch.float64) for value in (1.1, -0.4))
NOISE = (1.1 - MEAN) / STD
"""What x0 = 1.1 comes from exactly: 1.6."""
SHIFT = 3.1582


def velocity(z, sigma, i):
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (z - (1 - sigma) * MEAN)


def never(z, sigma, i):
    raise AssertionError("the model was called")


def forth(steps, gamma, shift=1.0, field=velocity):
    return inverted(field, X0, Y1, sigma_grid(steps, shift), gamma)


def back(state, steps, eta, stop=1.0, solver="euler", field=velocity):
    share = lambda i: eta if i < stop * steps else 0.0  # noqa: E731
    return edited(solver, field, state, X0, sigma_grid(steps), share)


@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("shift", [1.0, SHIFT])
def test_full_shares_end_where_they_lead(steps, shift):
    """Without a call of the model; a shift does not matter."""
    torch.testing.assert_close(forth(steps, 1.0, shift, never), Y1, rtol=0, atol=1e-15)
    for solver in ("euler", "heun", "dpmpp_2m", "unipc"):
        torch.testing.assert_close(back(Y1, steps, 1.0, solver=solver, field=never), X0, rtol=0, atol=1e-15)


def test_the_models_own_path_finds_the_noise():
    found = [float(forth(steps, 0.0)) for steps in (28, 56)]
    assert found == pytest.approx([1.517473, 1.558213], abs=1e-6)
    assert (found[0] - NOISE) / (found[1] - NOISE) == pytest.approx(1.975, abs=1e-3)


def test_round_trips_close_in_first_order():
    errors = [abs(float(back(forth(n, 0.0), n, 0.0) - X0)) for n in (28, 56, 112, 224)]
    assert errors == pytest.approx([8.04e-2, 4.12e-2, 2.09e-2, 1.05e-2], rel=5e-3)


@pytest.mark.parametrize(
    ("eta", "stop", "error"),
    [
        *[(0, 1, 0.9221), (0.25, 1, 0.3354), (0.5, 1, 0.0971), (0.75, 1, 0.0173), (0.9, 1, 0.0030), (1, 1, 0.0)],
        *[(0.9, 0, 0.9221), (0.9, 0.25, 0.8083), (0.9, 0.5, 0.6013), (0.9, 0.75, 0.2706)],
    ],
)
def test_how_near_the_image_comes_back(eta, stop, error):
    assert abs(float(back(forth(28, 0.5), 28, eta, stop) - X0)) == pytest.approx(error, abs=5e-5)


def test_the_network_is_told_the_sigma_that_is_stepped():
    """Told i / N on a shifted grid, it would find .8970 in place of 1.4346."""
    assert float(forth(28, 0.0, SHIFT)) == pytest.approx(1.4346, abs=5e-5)
    sigmas = sigma_grid(28, SHIFT)
    mixed = inverted(lambda z, sigma, i: velocity(z, i / 28, i), X0, Y1, sigmas, 0.0)
    assert float(mixed) == pytest.approx(0.8970, abs=5e-5)
