"""Distillation to few steps and to a fed scale, on mixtures whose velocities are known: what each asks, whose loss is none."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from closed_form_models import ONE, PLANE, ClosedFormData, closed_form
from test_objective import Pairs, recipe

from dedistill.errors import UserError
from dedistill.flow.path import flow_loss, interpolate, velocity
from dedistill.flow.solvers import sigma_grid
from dedistill.models.model import Model, build_model, check_asked
from dedistill.objectives.base import objective_for
from dedistill.recipe import Recipe
from dedistill.recipe.objectives import OBJECTIVES

SLOTS = np.arange(64)


def asked(kind: str, source=None, steps: int = 4, **train):
    like = "reflow" if OBJECTIVES[kind].pairs else "flow"
    made: Recipe = recipe(like, batch=64, data={"caption_dropout": 0.0})
    update = {"objective": kind} | train
    sample = made.sample.model_copy(update={"steps": steps, "shift": 2.0})
    made = made.model_copy(update={"train": made.train.model_copy(update=update), "sample": sample})
    return objective_for(made, source or Pairs(), lambda shape: 1.0)


def taught(baked: float = 1.0, mixture=PLANE, **changes) -> Model:
    """A student whose base is the honest model."""
    model = closed_form(mixture, **changes)
    model.frozen = deepcopy(model.root)
    torch.nn.init.constant_(model.root.weight, baked)
    return model


# --- on pairs --------------------------------------------------------------------------------------------------------


def test_the_end_point_is_asked_from_the_stored_noise_alone():
    batch, pairs = asked("endpoint").noisy_batch(0, SLOTS), Pairs().draw(Pairs().slots(0, 0, 64))
    assert torch.equal(batch.noisy, pairs.noise) and (batch.sigma == 1).all()
    torch.testing.assert_close(batch.noisy - batch.target, pairs.latents)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_grid_is_that_of_the_recipes_sampler(steps):
    """Each level as often; one step is the end point, and every level lies on the straight path of its pair."""
    batch, pairs = asked("grid", steps=steps).noisy_batch(0, SLOTS), Pairs().draw(Pairs().slots(0, 0, 64))
    levels, counts = np.unique(batch.sigma.numpy(), return_counts=True)
    np.testing.assert_allclose(levels[::-1], sigma_grid(steps, 2.0)[:-1], rtol=1e-6)
    assert counts.max() - counts.min() <= 2
    s = batch.sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(batch.noisy - s * batch.target, pairs.latents, rtol=0, atol=1e-5)
    if steps == 1:
        other = asked("endpoint").noisy_batch(0, SLOTS)
        assert torch.equal(batch.noisy, other.noisy) and torch.equal(batch.target, other.target)


def test_a_fine_grid_is_reflow():
    """The same strata of the same uniform draws: a grid of 4,096 levels moves no sigma by more than one of them."""
    made = recipe("reflow", batch=64, timesteps={"shift": 2.0})
    reflow = objective_for(made, Pairs(), lambda shape: 1.0).noisy_batch(3, SLOTS)
    grid = asked("grid", steps=4096).noisy_batch(3, SLOTS)
    torch.testing.assert_close(1 - grid.sigma.flip(0).sort().values, 1 - reflow.sigma.flip(0).sort().values, rtol=0, atol=0.035)
    assert torch.equal(grid.target, reflow.target)


@pytest.mark.parametrize("kind", ["reflow", "endpoint", "features", "grid", "distill"])
def test_on_straight_paths_it_is_flow_matching_of_the_pair(kind):
    """Wherever it asks: the same noisy samples and targets as flow matching has of that image and that noise."""

    class Straight(Pairs):
        def draw(self, *args, **kwargs):
            batch = super().draw(*args, **kwargs)
            s = torch.from_numpy(batch.trajectory_sigmas).float().reshape(1, -1, 1, 1, 1)
            return replace(batch, trajectory=s * batch.noise[:, None] + (1 - s) * batch.latents[:, None])

    batch, pair = asked(kind, Straight()).noisy_batch(1, SLOTS), Straight().draw(Straight().slots(0, 1, 64))
    torch.testing.assert_close(batch.target, velocity(pair.latents, pair.noise), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.noisy, interpolate(pair.latents, pair.noise, batch.sigma), rtol=0, atol=1e-5)


# --- with the base as teacher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5])
def test_halving_asks_for_two_steps_of_the_base_in_one(steps):
    """On one Gaussian: from each noisy sample, Euler's two steps by its scalar recursion, and the mean velocity between."""
    made = asked("halve", ClosedFormData(ONE), steps=steps)
    batch, model = made.noisy_batch(0, SLOTS), taught(mixture=ONE)
    grid = sigma_grid(2 * steps, 2.0)
    x, target = batch.noisy.flatten(1).double(), []
    for row, sigma in zip(x, batch.sigma.double()):
        i = int(np.abs(grid - float(sigma)).argmin())
        z = row[None]
        for here, there in zip(grid[i : i + 2], grid[i + 1 : i + 3]):
            z = z + (there - here) * ONE.velocity(z, float(here))
        target.append((row - z[0]) / (grid[i] - grid[i + 2]))
    own = ONE.velocity(x, batch.sigma.double())
    wanted = flow_loss(own, torch.stack(target))
    torch.testing.assert_close(made.loss(model, batch), wanted.float(), rtol=1e-3, atol=1e-7)
    assert wanted.min() > 1e-7


def test_halving_a_straight_model_asks_for_what_it_says_already():
    """There flow matching on its own pairs and halving have the same answer; and the finer the grid, the nearer for any."""
    batch = (made := asked("halve", ClosedFormData(ONE))).noisy_batch(0, SLOTS)
    assert made.loss(taught(mixture=ONE, straight=True), batch).max() < 1e-9
    fine = [asked("halve", ClosedFormData(ONE), steps=n) for n in (8, 16)]
    losses = [float(made.loss(taught(mixture=ONE), made.noisy_batch(0, SLOTS)).mean()) for made in fine]
    assert losses[1] < losses[0] / 2.5, "of second order in the width of a step"


@pytest.mark.parametrize("baked", [1.0, 2.0])
def test_the_student_that_is_fed_the_scale_has_no_loss(baked):
    """Of the guided field of the honest base, at scales of every sample's own; a student that heeds them wrongly has one."""
    made = asked("guidance", ClosedFormData(), scales=[1.0, 5.0])
    batch, model = made.noisy_batch(0, SLOTS), taught(baked)
    assert batch.scales.min() >= 1 and batch.scales.max() <= 5 and batch.scales.unique().numel() == 64
    x, s = batch.noisy.flatten(1).double(), batch.sigma.double()
    rows = list(zip(x, s, batch.captions, batch.scales.tolist()))
    at = lambda fed: torch.cat([PLANE.guided(a[None], b[None], int(c), fed(w)) for a, b, c, w in rows])  # noqa: E731
    wanted = flow_loss(at(lambda w: baked * w), at(lambda w: w))
    torch.testing.assert_close(made.loss(model, batch), wanted, rtol=1e-3, atol=1e-8)
    assert (wanted.max() < 1e-9) == (baked == 1)


@pytest.mark.parametrize("kind", ["guidance", "halve"])
def test_with_nothing_to_distil_it_is_flow_matching(kind):
    """At scale 1, and with steps that are hardly any: the loss is flow matching's less the base's own, in the mean over what
    samples were made of, to two standard errors."""
    count = 4000
    made = asked(kind, ClosedFormData(), steps=1000, **({"scales": [1.0, 1.0]} if kind == "guidance" else {}))
    (batch,) = made.validation_batches(count, count)
    model = taught(2.0)
    found, text = made.loss(model, batch).double(), batch.conditioning(model)
    flow = [flow_loss(model.velocity(batch.noisy, batch.sigma, text), batch.target).double()]
    with model.as_base():
        flow.append(flow_loss(model.velocity(batch.noisy, batch.sigma, text), batch.target).double())
    rest = flow[0] - flow[1] - found
    assert abs(float(rest.mean())) < 2 * float(rest.std()) / count**0.5 and float(found.mean()) > 0.05


def test_the_same_draws_serve_validation():
    made = asked("guidance", ClosedFormData(), scales=[1.0, 3.0])
    whole, parts = (torch.cat([b.scales for b in made.validation_batches(32, size)]) for size in (32, 8))
    assert torch.equal(whole, parts) and whole.unique().numel() == 32 and 1 <= whole.min() < whole.max() <= 3


# --- a real network --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    made = recipe("reflow", batch=4)
    made = made.model_copy(update={"train": made.train.model_copy(update={"objective": "features"})})
    return made, build_model(made)


def test_features_are_the_bases_own(network):
    """A copy from before training gives them; its weights get no gradient, and the images do; none where images agree."""
    made, model = network
    made = objective_for(made, Pairs(), model.shift)
    batch = made.noisy_batch(0, np.arange(4))
    with torch.no_grad():
        for p in model.root.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    loss = made.loss(model, batch)
    loss.sum().backward()
    assert all(p.grad is None for p in model.frozen.parameters())
    assert any(p.grad.abs().max() > 0 for p in model.root.parameters() if p.grad is not None)
    with torch.no_grad():
        v = model.velocity(batch.noisy, batch.sigma, batch.conditioning(model))
        exact = made.loss(model, batch.__class__(**vars(batch) | {"target": v}))
        plain = flow_loss(v, batch.target)
    assert exact.max() < 1e-9 and (loss > plain).all()


def test_the_base_is_what_training_began_with(network):
    made, model = network
    before = {n: p.clone() for n, p in build_model(made).root.named_parameters()}
    with model.as_base():
        assert all(torch.equal(p, before[n]) for n, p in model.root.named_parameters())
    assert model.root is model.components.denoiser and model.root is not model.frozen


def test_an_engine_that_wraps_the_network_is_not_its_own_teacher(network):
    """What ZeRO calls in the network's place sees no pass of the base, and those of training again after it."""
    made, model = network
    batch = objective_for(made, Pairs(), model.shift).noisy_batch(0, np.arange(4))
    passes: list[str] = []
    at = ["trained"]
    wrapped = torch.nn.ModuleDict({"network": model.components.denoiser})
    wrapped.forward = lambda *args, **kwargs: (passes.append(at[0]), wrapped["network"](*args, **kwargs))[1]
    model.called = wrapped
    text = batch.conditioning(model)
    with torch.no_grad():
        for at[0] in ("before", "base", "after"):
            with model.as_base() if at[0] == "base" else nullcontext():
                model.velocity(batch.noisy, batch.sigma, text)
    assert passes == ["before", "after"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_network_that_cannot_be_fed_a_scale_is_refused(network):
    made, model = network
    made = made.model_copy(update={"train": made.train.model_copy(update={"objective": "guidance"})})
    with pytest.raises(UserError, match="'guidance' feeds the network a scale of guidance, and this one has no embedding"):
        check_asked(made, model.family, model.components)
