"""Three ways to begin a reflow from a network that predicts noise, on mixtures whose noise is known exactly."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closed_form import Mixture
from scipy import integrate
from torch import nn

from dedistill.data.source import Batch, Slot
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.flow.parameterization import diffusion_velocity, own_weight
from dedistill.flow.path import flow_loss, midpoints
from dedistill.flow.schedule import schedule_of
from dedistill.flow.solvers import sigma_grid, solve
from dedistill.models.conditioning import Conditioning
from dedistill.models.family import Components
from dedistill.models.model import Model, check_asked
from dedistill.models.registry import get_family
from dedistill.objectives.base import objective_for
from dedistill.recipe.resolve import recipe_of

SCHEDULE = schedule_of(get_family("sd15").published_scheduler)
PLANE = Mixture.of([0.4, 0.6], [[-1.0, 0.5], [1.2, -0.3]], [[0.4, 0.7], [0.5, 0.3]], [0, 1])
MEANS = 1.5 * keyed.noise(0, "means", 0, range(4), (8,)).double()
EIGHT = Mixture.of([0.25] * 4, MEANS.tolist(), [[0.3] * 8] * 4, [0] * 4)


def noise_of(mixture: Mixture, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[noise | x] of a variance-preserving sample x [B, D] at the straight path's sigma t [B]."""
    t = t[:, None]
    z = x * torch.hypot(1 - t, t)
    return z + (1 - t) * mixture.velocity(z, t[:, 0])


class ExactNoise(nn.Module):
    """What a perfectly trained epsilon network says, called as diffusers' U-Nets are."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.mixture, self.of_float64 = mixture, nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.levels = torch.tensor(SCHEDULE.sigmas, dtype=torch.float64).logit()

    def forward(self, sample, step, **others):
        low = step.long().clamp(max=998)
        t = torch.lerp(self.levels[low], self.levels[low + 1], step.clamp(max=999).double() - low).sigmoid()
        return (noise_of(self.mixture, sample.flatten(1).double(), t).reshape(sample.shape),)


def read_as(prediction: str, mixture: Mixture = EIGHT) -> Model:
    """That network of the family sd15, its output read so."""
    schedule = SCHEDULE if prediction == "epsilon" else None
    network, image = ExactNoise(mixture), (1, 1, mixture.means.shape[1])
    place = SimpleNamespace(scheduler={"shift": 1.0}, scheduler_file="")
    more = {"vae": SimpleNamespace(scale=8), "schedule": schedule, "prediction": prediction, "source": place}
    return Model(
        get_family("sd15"), Components(network, SimpleNamespace(unload=lambda: None), image, **more), network, text_length=1
    )


def told(count: int) -> Conditioning:
    return Conditioning.of(torch.zeros(count, 1, 1), torch.ones(count, 1, dtype=torch.bool))


def ends(model: Model, noise: torch.Tensor, steps: int) -> torch.Tensor:
    def velocity(noisy, sigma, i):
        return model.velocity(noisy, torch.full((len(noisy),), sigma), told(len(noisy)))

    *_, data = solve("heun", velocity, noise, sigma_grid(steps))
    return data


@pytest.mark.parametrize("mixture", [PLANE, EIGHT], ids=["plane", "eight"])
def test_the_bridge_ends_where_the_diffusion_does(mixture):
    """d(x/a)/d(b/a) = noise, the diffusion's own equation without any velocity, against the bridge's along sigma; to 1e-8."""
    high, low = 0.93, 0.05
    x = keyed.noise(2, "start", 0, range(5), (mixture.means.shape[1],)).double()

    def diffusion(k: float, y: np.ndarray) -> np.ndarray:
        t, points = torch.full((5,), k / (1 + k), dtype=torch.float64), torch.from_numpy(y).reshape(x.shape)
        return noise_of(mixture, points / (1 + k * k) ** 0.5, t).numpy().ravel()

    def bridge(t: float, z: np.ndarray) -> np.ndarray:
        sigma, points = torch.full((5,), t, dtype=torch.float64), torch.from_numpy(z).reshape(x.shape)
        return diffusion_velocity("epsilon", lambda s: noise_of(mixture, s, sigma), points, sigma, 0.95).numpy().ravel()

    precise = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-11}
    first, last = high / (1 - high), low / (1 - low)
    y = integrate.solve_ivp(diffusion, (first, last), (x * (1 + first**2) ** 0.5).numpy().ravel(), **precise).y[:, -1]
    z = integrate.solve_ivp(bridge, (high, low), (x * np.hypot(1 - high, high)).numpy().ravel(), **precise).y[:, -1]
    assert np.abs(z - y / (1 + last)).max() < 1e-8 and np.abs(z - x.numpy().ravel()).max() > 0.1


def test_what_each_start_is_worth():
    """Loss on the model's own pairs over that of predicting nothing: through the bridge below a half, naively above it, and
    with InstaFlow's sign worse than nothing by far."""
    count = 1000
    noise = keyed.noise(0, "pairs", 0, range(count), (1, 1, 8)).double()
    data = ends(read_as("epsilon"), noise, 32)
    sigma = torch.from_numpy(midpoints(0, count))
    noisy = data + sigma.reshape(-1, 1, 1, 1) * (noise - data)
    losses = {}
    for prediction in ("epsilon", "velocity", "negative_velocity"):
        v = read_as(prediction).velocity(noisy, sigma, told(count))
        losses[prediction] = float(flow_loss(v, noise - data).mean() / (noise - data).square().mean())
    assert losses["epsilon"] < 0.3 and 0.9 < losses["velocity"] < 1.1 and losses["negative_velocity"] > 1.4


def test_a_reading_is_what_it_is_called():
    """The same output with either sign, fed the sample and 1000 sigma as they are."""
    noisy, sigma = keyed.noise(1, "x", 0, range(4), (1, 1, 8)), torch.tensor([0.1, 0.4, 0.7, 0.99])
    fed = read_as("velocity")
    out = fed.root(noisy.double(), 1000 * sigma)[0].float()
    assert torch.equal(fed.velocity(noisy, sigma, told(4)), out)
    assert torch.equal(read_as("negative_velocity").velocity(noisy, sigma, told(4)), -out)
    assert (read_as("epsilon").velocity(noisy, sigma, told(4)) - out).abs().max() > 0.1


class Pairs:
    name, image = "pairs", (1, 1, 8)

    def slots(self, seed, step, batch, *, held_out=False):
        return [Slot(str(p), (seed, step, p)) for p in range(batch)]

    def draw(self, slots):
        seed, step, _ = slots[0].index
        noise = keyed.noise(seed, "pair", step, [slot.index[2] for slot in slots], self.image)
        return Batch(0.5 * noise, [""] * len(noise), noise)


def recipe(objective: str, **train):
    return recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": "sd15", "path": "a"},
            "data": {"source": "pairs", "path": "a"},
            "train": {"objective": objective, "steps": 10, "batch": 64, "lr": 1e-3} | train,
        }
    )


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_rectified_diffusion_is_reflow_in_the_models_own_loss(gamma):
    """The stored noise, every level of the schedule alike, and reflow's error times what the own loss weighs it."""
    model = read_as("epsilon")
    made = objective_for(recipe("rectified_diffusion", min_snr=gamma), Pairs(), model.shift, SCHEDULE)
    batch = made.noisy_batch(1, np.arange(64))
    pairs = Pairs().draw(Pairs().slots(0, 1, 64))
    torch.testing.assert_close(batch.target, pairs.noise - pairs.latents)
    steps = SCHEDULE.steps(batch.sigma)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-2)
    assert np.bincount((steps.round() / 125).int()).tolist() == [8] * 8
    batch = replace(batch, text=told(64))
    reflow = objective_for(recipe("reflow"), Pairs(), model.shift).loss(model, batch)
    weight, ratio = own_weight("epsilon", batch.sigma), ((1 - batch.sigma) / batch.sigma) ** 2
    if gamma:
        weight = weight * ratio.clamp(max=gamma) / ratio
    torch.testing.assert_close(made.loss(model, batch), reflow * weight)


@pytest.mark.parametrize("objective", ["diffusion", "rectified_diffusion"])
def test_a_network_read_as_velocity_has_no_loss_of_its_own(objective):
    with pytest.raises(UserError, match=rf"'{objective}' is for models .* sd15 is read as velocity \(model.prediction\)"):
        check_asked(recipe(objective), get_family("sd15"), read_as("velocity").components)
