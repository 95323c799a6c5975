"""Networks that predict noise, data or v, read as velocities: known answers in float64."""

import pytest
import torch

from dedistill.flow.parameterization import to_velocity, variance_preserving
from dedistill.flow.path import interpolate, velocity

GENERATOR = torch.Generator().manual_seed(0)
DATA, NOISE = (torch.randn(6, 3, 4, generator=GENERATOR) for _ in range(2))
SIGMA = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.9, 0.93])
NOISY = interpolate(DATA, NOISE, SIGMA)
T = SIGMA[:, None, None]
R = ((1 - T) ** 2 + T**2).sqrt()
TRUE = {
    "velocity": NOISE - DATA,
    "negative_velocity": DATA - NOISE,
    "epsilon": NOISE,
    "x0": DATA,
    "v": ((1 - T) * NOISE - T * DATA) / R,
}


@pytest.mark.parametrize("kind", TRUE)
def test_a_true_prediction_gives_the_true_velocity(kind):
    found = to_velocity(kind, TRUE[kind], NOISY, SIGMA, 0.95)
    torch.testing.assert_close(found, velocity(DATA, NOISE), rtol=0, atol=3e-5)


def test_a_ddim_step_is_an_euler_step():
    """x = z / r is the variance-preserving sample; DDIM without noise (arXiv 2010.02502, eq. 12) from one to the next."""
    guess = torch.randn(6, 3, 4, generator=GENERATOR)
    there = SIGMA * 0.6
    x = variance_preserving(NOISY, SIGMA)
    torch.testing.assert_close(x, (1 - T) / R * DATA + T / R * NOISE)
    s = there[:, None, None]
    rs = ((1 - s) ** 2 + s**2).sqrt()
    data = (x - T / R * guess) / ((1 - T) / R)
    ddim = (1 - s) / rs * data + s / rs * guess
    euler = NOISY + (s - T) * to_velocity("epsilon", guess, NOISY, SIGMA, 0.95)
    torch.testing.assert_close(variance_preserving(euler, there), ddim, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_above_the_highest_sigma_the_data_that_it_sees_give_the_direction(kind):
    """Finite where there is nothing but noise, and nothing jumps where the network's range ends."""
    highest = 0.9
    noisy, guess = NOISE[:3], torch.randn(3, 3, 4, generator=GENERATOR)
    at, above, end = (to_velocity(kind, guess, noisy, torch.full((3,), s), highest) for s in (0.9, 0.9 + 1e-6, 1.0))
    torch.testing.assert_close(at, above, rtol=1e-4, atol=1e-4)
    assert end.isfinite().all()
    seen = noisy - end  # the data at sigma = 1
    torch.testing.assert_close(seen, noisy - highest * at, rtol=1e-4, atol=1e-4)


def test_what_has_no_answer_is_refused():
    ones = torch.ones(6)
    with pytest.raises(ValueError, match="a highest sigma"):
        to_velocity("epsilon", NOISE, NOISY, ones)
    with pytest.raises(ValueError, match="no direction"):
        to_velocity("x0", DATA, NOISY, 0 * ones)
