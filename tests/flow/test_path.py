"""The straight path and its conversions, as identities in float64."""

import pytest
import torch

from dedistill.flow import path

SHAPES = [(4,), (3, 5), (2, 3, 4, 6)]
F64 = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=SHAPES, ids=str)
def sample(request):
    """data, noise and sigma of a batch, sigma away from both ends."""
    g = torch.Generator().manual_seed(0)
    shape = request.param
    data, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return data, noise, 0.05 + 0.9 * torch.rand(shape[0], generator=g, dtype=torch.float64)


def test_sigma_one_is_exactly_noise(sample):
    """Pure noise at sigma = 1, pure data at sigma = 0, to the last bit."""
    data, noise, _ = sample
    for precision in (torch.float64, torch.float32, torch.bfloat16):
        d, n = data.to(precision), noise.to(precision)
        assert torch.equal(path.interpolate(d, n, torch.ones(len(d))), n)
        assert torch.equal(path.interpolate(d, n, torch.zeros(len(d))), d)


def test_velocity_is_the_derivative_along_sigma(sample):
    """One sign and one time axis: d noisy / d sigma = noise - data."""
    data, noise, sigma = sample
    h = 1e-3
    slope = (path.interpolate(data, noise, sigma + h) - path.interpolate(data, noise, sigma - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(data, noise), slope, rtol=0, atol=1e-10)


def test_time_points_to_noise():
    """Known numbers. data 2, noise 10, a quarter of the way to noise."""
    data, noise, sigma = torch.tensor([[2.0]]), torch.tensor([[10.0]]), torch.tensor([0.25])
    assert path.interpolate(data, noise, sigma).item() == 4.0
    assert path.velocity(data, noise).item() == 8.0


def test_velocity_gives_both_ends_back(sample):
    data, noise, sigma = sample
    noisy, v = path.interpolate(data, noise, sigma), path.velocity(data, noise)
    torch.testing.assert_close(path.denoised(noisy, sigma, v), data, **F64)
    torch.testing.assert_close(path.implied_noise(noisy, sigma, v), noise, **F64)


def test_both_ends_give_velocity_back(sample):
    data, noise, sigma = sample
    noisy, v = path.interpolate(data, noise, sigma), path.velocity(data, noise)
    torch.testing.assert_close(path.velocity_from_denoised(noisy, sigma, data), v, **F64)
    torch.testing.assert_close(path.velocity_from_noise(noisy, sigma, noise), v, **F64)


def test_round_trips_of_any_prediction(sample):
    """The conversions invert each other for a wrong velocity too, not only for the true one."""
    data, noise, sigma = sample
    noisy, wrong = path.interpolate(data, noise, sigma), torch.sin(7 * noise) - 2 * data
    back = path.velocity_from_denoised(noisy, sigma, path.denoised(noisy, sigma, wrong))
    torch.testing.assert_close(back, wrong, **F64)
    back = path.velocity_from_noise(noisy, sigma, path.implied_noise(noisy, sigma, wrong))
    torch.testing.assert_close(back, wrong, **F64)
    ends = path.denoised(noisy, sigma, wrong), path.implied_noise(noisy, sigma, wrong)
    torch.testing.assert_close(path.interpolate(*ends, sigma), noisy, **F64)


def test_velocity_loss_is_the_weighted_noise_loss(sample):
    """L_w = -1/2 w lambda' |eps_hat - eps|^2 with lambda = 2 ln((1-t)/t) and w = t / (1-t) is the velocity loss."""
    data, noise, sigma = sample
    t = sigma.clone().requires_grad_()
    (slope,) = torch.autograd.grad((2 * torch.log((1 - t) / t)).sum(), t)
    noisy, v = path.interpolate(data, noise, sigma), path.velocity(data, noise)
    guess = v + torch.cos(5 * data)
    eps_loss = (path.implied_noise(noisy, sigma, guess) - noise).square()
    v_loss = (guess - v).square()
    weight = path.expand(-0.5 * sigma / (1 - sigma) * slope, v_loss)
    torch.testing.assert_close(weight * eps_loss, v_loss, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma", [torch.tensor(0.5), torch.full((3,), 0.5), torch.full((2, 1), 0.5), torch.full((1,), 0.5)])
@pytest.mark.parametrize("convert", [path.interpolate, path.denoised, path.implied_noise])
def test_wrong_shape_of_sigma_raises(sigma, convert):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sigma has shape"):
        convert(x, x, sigma) if convert is path.interpolate else convert(x, sigma, x)


@pytest.mark.parametrize("other", [(1, 3, 4, 4), (2, 1, 4, 4)])
@pytest.mark.parametrize("function", ["interpolate", "velocity"])
def test_wrong_shape_of_noise_raises(function, other):
    data, noise = torch.zeros(2, 3, 4, 4), torch.zeros(other)
    with pytest.raises(ValueError, match="shape"):
        path.velocity(data, noise) if function == "velocity" else path.interpolate(data, noise, torch.full((2,), 0.5))


def test_ends_without_direction_raise():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sigma = 0 has no direction"):
        path.velocity_from_denoised(x, torch.tensor([0.5, 0.0]), x)
    with pytest.raises(ValueError, match="sigma = 1 has no direction"):
        path.velocity_from_noise(x, torch.tensor([1.0, 0.5]), x)


def test_dtype_of_the_sample_is_kept():
    """sigma arrives in float64 from the draw; it must not lift a float32 batch."""
    data, sigma = torch.ones(2, 3), torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert path.interpolate(data, -data, sigma).dtype == torch.float32
    assert path.denoised(data, sigma, data).dtype == torch.float32


@pytest.mark.parametrize("c", [5.4e-4, 0.1, 3.0])
def test_pseudo_huber_is_a_square_near_and_a_root_far_off(c):
    """And what a sample pulls by never exceeds that of the root."""
    error = torch.logspace(-14, 8, 60, dtype=torch.float64).requires_grad_()
    loss = path.pseudo_huber(error, c)
    torch.testing.assert_close(loss, (error + c**2).sqrt() - c, rtol=1e-6, atol=1e-9)
    near, far = error < 1e-6 * c**2, error > 1e8 * c**2
    torch.testing.assert_close(loss[near], error[near] / (2 * c), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss[far], error[far].sqrt(), rtol=1e-3, atol=0)
    (slope,) = torch.autograd.grad(loss.sum(), error)
    root = error.detach().sqrt()
    assert bool((slope * 2 * root <= 1).all()), "of the root mean square, one at most"
    single = path.pseudo_huber(error.detach().float(), c)
    torch.testing.assert_close(single.double(), loss.detach(), rtol=1e-5, atol=0)
