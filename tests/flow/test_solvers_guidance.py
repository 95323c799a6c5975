"""Euler's method against a closed form and diffusers' grid; guidance; the loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from samplings import at

from dedistill.flow.guidance import CONDITIONAL, UNCONDITIONAL, ClassifierFree, Evaluation
from dedistill.flow.path import dynamic_shift, flow_loss
from dedistill.flow.solvers import sigma_grid, solve
from dedistill.models.model import Model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.sampling.sampler import sample, start_noise

MEAN, STD = 1.5, 0.4


def gaussian_velocity(noisy, sigma, index):
    """E[noise - data | noisy] for data ~ N(MEAN, STD^2)."""
    keep = 1 - sigma
    variance = keep**2 * STD**2 + sigma**2
    return -MEAN + (sigma - keep * STD**2) / variance * (noisy - keep * MEAN)


def gaussian_error(steps: int, shift: float = 1.0) -> float:
    """Largest distance of Euler's end from the exact one, MEAN + STD noise."""
    noise = torch.linspace(-3, 3, 31, dtype=torch.float64)
    *_, data = solve("euler", gaussian_velocity, noise, sigma_grid(steps, shift))
    return float((data - (MEAN + STD * noise)).abs().max())


@pytest.mark.parametrize("steps", [64, 128, 256])
def test_euler_converges_with_order_one(steps):
    """Half the step, half the error (2 +- .1)."""
    assert gaussian_error(steps) / gaussian_error(2 * steps) == pytest.approx(2, abs=0.1)
    assert gaussian_error(256) < 0.02


def test_euler_with_shift_converges_to_the_same_end():
    """A shifted grid is another road to the same data."""
    assert gaussian_error(512, shift=3.0) < 0.02


def test_euler_is_exact_on_straight_paths_and_reports_every_state():
    """With one true velocity, one step is enough; states are noise ... data, at the sigmas asked for."""
    data, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    calls = []

    def velocity(noisy, sigma, index):
        calls.append((sigma, index))
        return noise - data

    states = list(solve("euler", velocity, noise, sigma_grid(4)))
    assert calls == [(1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3)]
    assert len(states) == 5 and states[0] is noise
    for state, sigma in zip(states, [1, 0.75, 0.5, 0.25, 0], strict=True):
        torch.testing.assert_close(state, (1 - sigma) * data + sigma * noise, rtol=0, atol=1e-14)


def test_four_step_grid():
    """Schnell's grid."""
    assert sigma_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_grid_ends():
    """It begins in pure noise; 28 steps end at 1/28, then 0."""
    grid = sigma_grid(28)
    assert len(grid) == 29 and grid[0] == 1 and grid[-2:].tolist() == [pytest.approx(1 / 28), 0]


SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False}
DEV = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
DEV |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("config", [SCHNELL, DEV], ids=["schnell", "dev"])
def test_grid_equals_diffusers(config, tokens, steps):
    """Both flavours; with dynamic shifting the static shift of 3 is ignored, so shift is applied once."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    shift = dynamic_shift(tokens) if config["use_dynamic_shifting"] else 1.0
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=math.log(shift))
    np.testing.assert_allclose(sigma_grid(steps, shift), scheduler.sigmas.numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [0, -3])
def test_grid_needs_a_step(steps):
    with pytest.raises(ValueError, match="at least one"):
        sigma_grid(steps)


def guided(cond: torch.Tensor, uncond: torch.Tensor, cfg: float) -> torch.Tensor:
    return ClassifierFree(cfg).combine({CONDITIONAL: cond, UNCONDITIONAL: uncond}, Evaluation(cond, 1.0, sigma_grid(1), 0, {}))


def test_guidance_formula():
    """v_uncond + cfg (v_cond - v_uncond)."""
    cond, uncond = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    assert guided(cond, uncond, 4.0).tolist() == [[9.0, -2.0]]
    assert torch.equal(guided(cond, uncond, 0.0), uncond)
    assert torch.equal(guided(cond, uncond, 1.0), cond)


@pytest.mark.parametrize(
    ("cfg", "steps", "skip", "unconditional"),
    [(1.0, 8, 0, 0), (1.0, 8, 2, 0), (3.0, 8, 0, 8), (3.0, 8, 2, 6), (3.0, 8, 8, 0), (3.0, 4, 9, 0), (0.0, 8, 0, 8)],
)
def test_sampler_counts_skipped_guidance_in_steps(cfg, steps, skip, unconditional):
    """The first ``skip`` steps and cfg = 1 evaluate once per step; all others twice. Counted on a network."""
    how = at(steps, cfg, skip)
    guided = [i for i in range(steps) if UNCONDITIONAL in how.guidance.branches(sigma_grid(steps), i)]
    assert guided == list(range(steps))[steps - unconditional :]
    family = PixelFlux()
    components = family.tiny(0)
    calls = []
    components.denoiser.register_forward_hook(lambda *_: calls.append(1))
    model = Model(family, components, components.denoiser, text_length=12)
    sample(model, ["3 seven"], start_noise(0, 1, components.sample_shape), how)
    assert len(calls) == steps + unconditional == how.nfe()


def test_batched_branches_equal_sequential_ones():
    """Both branches in one batch give the velocities of two calls, to 1e-6."""
    family = PixelFlux()
    components = family.tiny(0)
    noisy, sigma = start_noise(0, 3, components.sample_shape), torch.tensor([0.2, 0.5, 0.9])
    captions = ["3 seven", "one", "the digit 2 and the digit 4"]
    with torch.no_grad():
        texts = [family.encode_text(components, said, 12) for said in (captions, [""] * 3, [*captions, *[""] * 3])]
        cond, uncond = (family.velocity(components, components.denoiser, noisy, sigma, text) for text in texts[:2])
        both = family.velocity(components, components.denoiser, noisy.repeat(2, 1, 1, 1), sigma.repeat(2), texts[2])
    sequential, batched = guided(cond, uncond, 4.0), guided(both[:3], both[3:], 4.0)
    torch.testing.assert_close(both, torch.cat([cond, uncond]), rtol=0, atol=1e-6)
    torch.testing.assert_close(batched, sequential, rtol=0, atol=7e-6)  # cfg 4 weighs the two with 4 and -3


@pytest.fixture
def pair():
    """Data with mean and spread of its own, and noise."""
    g = torch.Generator().manual_seed(0)
    data = 0.3 + 0.7 * torch.randn(4000, 1, 8, 8, generator=g)
    return SimpleNamespace(data=data, noise=torch.randn(data.shape, generator=g))


def test_loss_of_the_oracle_is_zero(pair):
    target = pair.noise - pair.data
    assert torch.equal(flow_loss(target, target), torch.zeros(4000))


def test_loss_of_the_zero_predictor(pair):
    """E|noise - data|^2 = 1 + Var(data) + mean^2."""
    target = pair.noise - pair.data
    assert flow_loss(torch.zeros_like(target), target).mean().item() == pytest.approx(1 + 0.49 + 0.09, rel=0.01)


def test_wrong_sign_costs_four_times_predicting_nothing(pair):
    """An oracle of the opposite sign is worse than predicting nothing."""
    target = pair.noise - pair.data
    nothing = flow_loss(torch.zeros_like(target), target)
    torch.testing.assert_close(flow_loss(-target, target), 4 * nothing)


def test_loss_is_one_mean_per_sample():
    """Plain mean over the elements, sample by sample."""
    target = torch.zeros(3, 2, 4, 4)
    predicted = torch.arange(3.0).reshape(3, 1, 1, 1).expand(target.shape)
    assert flow_loss(predicted, target).tolist() == [0.0, 1.0, 4.0]


def test_loss_is_in_float32(pair):
    """bf16 in, fp32 arithmetic: the loss of exactly the rounded numbers, in float32."""
    predicted, target = pair.data[:64].bfloat16(), pair.noise[:64].bfloat16()
    loss = flow_loss(predicted, target)
    exact = (predicted.double() - target.double()).square().flatten(1).mean(1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 1), (1, 3, 4, 4)])
def test_loss_refuses_shapes_that_would_broadcast(shape):
    """A broadcast target is a silent wrong loss."""
    with pytest.raises(ValueError, match="differ in shape"):
        flow_loss(torch.zeros(shape), torch.zeros(2, 3, 4, 4))
