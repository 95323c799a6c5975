"""The questions of a run: keyed by (seed, step, position), of three kinds, and what is measured on them."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dedistill.data.digits import load_digits
from dedistill.data.source import Batch, Slot
from dedistill.errors import UserError
from dedistill.evaluation.validation import Validator, standard_error
from dedistill.flow import keyed
from dedistill.flow.path import dynamic_shift, flow_loss
from dedistill.models.conditioning import Conditioning
from dedistill.models.model import build_model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.objectives.base import NoisyBatch, Objective, objective_for
from dedistill.recipe.resolve import recipe_of
from dedistill.recipe.schema import Recipe

KINDS = ["flow", "distill", "reflow"]
CAPTIONS = ["two then three", "a handwritten 4 then a seven", "9 9", "handwritten one and zero"]
SIGMAS = np.array([1.0, 0.7, 0.25, 0.0])
SLOPE = 0.5

every_kind = pytest.mark.parametrize("kind", KINDS)


class Pairs:
    """Endless pairs in memory: image = SLOPE * noise + offset of its index, with two points on the way, not on the line."""

    name, image = "pairs", (1, 8, 16)
    permuted = False

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        places = range(step * batch + 10**6 * held_out, (step + 1) * batch + 10**6 * held_out)
        return [Slot(f"pairs/{place}", (seed, place)) for place in places]

    def draw(self, slots: list[Slot]) -> Batch:
        seed, places = slots[0].index[0], np.array([slot.index[1] for slot in slots])
        noise = keyed.noise(seed, "pair", 0, places, self.image)
        pixels = SLOPE * noise + offset(places)
        bend = keyed.noise(seed, "bend", 0, places, self.image)
        states = [s * noise + (1 - s) * pixels + s * (1 - s) * bend for s in SIGMAS]
        given = noise.roll(1, 0) if self.permuted else noise
        return Batch(pixels, [CAPTIONS[p % 4] for p in places], given, torch.stack(states, 1), SIGMAS)


def offset(places: np.ndarray) -> Tensor:
    return torch.tensor(0.1 * (np.asarray(places) % 7)).float().reshape(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def digits():
    return load_digits(0.2)


def recipe(kind: str = "flow", batch: int = 16, seed: int = 0, **tables) -> Recipe:
    sizes = {"layers": 1, "single_layers": 1, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
    data = {"source": "digits"} if kind == "flow" else {"source": "pairs", "path": "a"}
    return recipe_of(
        {
            "run": {"name": "a", "out": "a", "seed": seed},
            "model": {"family": "pixel_flux", "new": {"height": 8, "width": 16, "patch": 4, **sizes}},
            "data": data | tables.pop("data", {}),
            "train": {"objective": kind, "steps": 10, "batch": batch, "lr": 1e-3} | tables.pop("train", {}),
            **tables,
        }
    )


def objective(kind: str = "flow", source=None, **kwargs) -> Objective:
    return objective_for(recipe(kind, **kwargs), source or Pairs(), lambda shape: dynamic_shift(8))


def join(tasks: list[NoisyBatch]) -> NoisyBatch:
    def both(name: str):
        parts = [getattr(t, name) for t in tasks]
        if parts[0] is None or isinstance(parts[0], str):
            return parts[0]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else [x for p in parts for x in p]

    return NoisyBatch(*(both(f.name) for f in fields(NoisyBatch)))


def same(a: NoisyBatch, b: NoisyBatch) -> list[str]:
    """Names of the fields in which two tasks agree."""
    pairs = [(f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(NoisyBatch)]
    return [n for n, x, y in pairs if (torch.equal(x, y) if isinstance(x, Tensor) else x == y)]


EVERYTHING = [f.name for f in fields(NoisyBatch)]


@every_kind
def test_a_task_is_a_function_of_seed_step_and_position(kind, digits):
    """Asked again, by another object, it is the same to the bit; another seed or step is another question."""
    source, slots = digits if kind == "flow" else Pairs(), np.arange(16)
    first = objective(kind, source).noisy_batch(3, slots)
    torch.manual_seed(9)
    again = objective(kind, source)
    again.noisy_batch(7, slots)
    assert same(again.noisy_batch(3, slots), first) == EVERYTHING
    for other in (again.noisy_batch(4, slots), objective(kind, source, seed=1).noisy_batch(3, slots)):
        assert not {"noisy", "sigma", "target"} & set(same(other, first))


@pytest.mark.parametrize("sizes", [[1] * 16, [4] * 4, [8, 8], [3, 5, 8], [16]], ids=str)
@every_kind
def test_micro_batches_ask_the_same_questions(kind, sizes, digits):
    """Samples, noise, sigmas, captions and dropout do not depend on how the slots of a step are grouped."""
    dropping = {"data": {"caption_dropout": 0.5}} if kind == "flow" else {}
    made = objective(kind, digits if kind == "flow" else None, **dropping)
    whole = made.noisy_batch(5, np.arange(16))
    assert kind != "flow" or 0 < whole.captions.count("") < 16
    parts = [made.noisy_batch(5, p) for p in np.split(np.arange(16), np.cumsum(sizes)[:-1])]
    assert same(join(parts), whole) == EVERYTHING
    backwards = made.noisy_batch(5, np.arange(16)[::-1])
    assert torch.equal(backwards.noisy.flip(0), whole.noisy) and backwards.captions[::-1] == whole.captions


def test_sigmas_of_a_step_cover_the_whole_range():
    """One sigma in each sixteenth of the global batch, at a place that changes from step to step."""
    made = objective()
    order = [(made.noisy_batch(step, np.arange(16)).sigma * 16).long() for step in range(50)]
    assert all(sorted(o.tolist()) == list(range(16)) for o in order)
    first = [int(o[0]) for o in order]
    assert len(set(first)) > 10


def test_flow_matching_task(digits):
    """The noisy sample is (1 - sigma) data + sigma noise and the target noise - data: both from one fresh noise."""
    task = objective(source=digits).noisy_batch(2, np.arange(16))
    batch = digits.draw(digits.slots(0, 2, 16))
    noise, s = task.target + batch.latents, task.sigma.reshape(-1, 1, 1, 1)
    assert task.noisy.dtype == task.sigma.dtype == torch.float32
    torch.testing.assert_close(task.noisy, (1 - s) * batch.latents + s * noise, rtol=0, atol=1e-5)
    assert float(noise.mean()) == pytest.approx(0, abs=0.1) and float(noise.std()) == pytest.approx(1, abs=0.05)
    assert task.names == [slot.name for slot in digits.slots(0, 2, 16)]
    assert all(told in ("", own) for told, own in zip(task.captions, batch.captions))


def test_distillation_task_ends_at_the_next_stored_point():
    """Asked at a stored point, the target times the width of the window leads exactly to the next stored point."""
    seen = set()
    for step in range(4):
        task = objective("distill").noisy_batch(step, np.arange(16))
        batch = Pairs().draw(Pairs().slots(0, step, 16))
        for i, sigma in enumerate(task.sigma.tolist()):
            k = int(np.argmin(np.abs(SIGMAS - sigma)))
            assert torch.equal(task.noisy[i], batch.trajectory[i, k])
            reached = task.noisy[i] + float(SIGMAS[k + 1] - SIGMAS[k]) * task.target[i]
            torch.testing.assert_close(reached, batch.trajectory[i, k + 1], rtol=0, atol=1e-5)
            seen.add(k)
        counts = np.bincount([int(np.argmin(np.abs(SIGMAS - s))) for s in task.sigma.tolist()], minlength=4)
        assert counts[3] == 0 and set(counts[:3]) <= {5, 6}, "strata give every window its share"
    assert seen == {0, 1, 2}


def test_distilling_needs_points_on_the_way():
    """Pairs without a trajectory are refused, not guessed."""

    class Ends(Pairs):
        def draw(self, *args, **kwargs):
            batch = super().draw(*args, **kwargs)
            return replace(batch, trajectory=batch.trajectory[:, -1:], trajectory_sigmas=SIGMAS[-1:])

    with pytest.raises(UserError, match="no trajectory points"):
        objective("distill", Ends()).noisy_batch(0, np.arange(4))


def oracle_loss(task: NoisyBatch, places: np.ndarray) -> float:
    """Loss of the exact velocity field of ``Pairs``: noise and image can both be read off the noisy sample."""
    s, b = task.sigma.reshape(-1, 1, 1, 1), offset(places)
    noise = (task.noisy - (1 - s) * b) / ((1 - s) * SLOPE + s)
    return float(flow_loss((1 - SLOPE) * noise - b, task.target).mean())


def test_reflow_uses_the_stored_noise():
    """The field of the pairs has loss 0 on them; with permuted or fresh noise there is nothing to learn."""
    slots = np.arange(64)
    task = objective("reflow", batch=64).noisy_batch(0, slots)
    batch = Pairs().draw(Pairs().slots(0, 0, 64))
    torch.testing.assert_close(task.target + batch.latents, batch.noise, rtol=0, atol=1e-6)
    assert oracle_loss(task, slots) < 1e-10
    permuted = Pairs()
    permuted.permuted = True
    assert oracle_loss(objective("reflow", permuted, batch=64).noisy_batch(0, slots), slots) > 0.1
    assert oracle_loss(objective("flow", batch=64).noisy_batch(0, slots), slots) > 0.1
    held_out = objective("reflow").validation_batches(64, 64)[0]
    assert oracle_loss(held_out, slots + 10**6) < 1e-10


@every_kind
def test_held_out_questions_are_fixed(kind, digits):
    """Neither density, shift, batch nor steps taken change them; no caption is dropped; sigmas are midpoints."""
    source = digits if kind == "flow" else Pairs()
    plain = objective(kind, source).validation_batches(32, 32)[0]
    densities = [{"density": "beta", "alpha": 5.0}, {"density": "logit_normal", "shift": 3.0}, {"stratify": False}]
    for settings in densities if kind != "distill" else [{}]:
        other = objective(kind, source, batch=4, timesteps=settings)
        other.noisy_batch(0, np.arange(4))
        assert same(other.validation_batches(32, 32)[0], plain) == EVERYTHING
    assert "" not in plain.captions
    trained = [objective(kind, source).noisy_batch(step, np.arange(16)) for step in range(4)]
    assert not set(plain.names) & {name for batch in trained for name in batch.names}
    if kind == "distill":
        assert set(plain.sigma.tolist()) == set(SIGMAS[:-1].astype(np.float32).tolist())
    else:
        torch.testing.assert_close(plain.sigma.sort().values, (torch.arange(32) + 0.5) / 32)


def test_the_density_is_that_of_training_only(digits):
    """The same settings do change what is trained on, or the test above would hold for the wrong reason."""
    slots = np.arange(256)
    made = [objective(batch=256, timesteps=t) for t in ({}, {"density": "beta", "alpha": 5.0})]
    means = [float(one.noisy_batch(0, slots).sigma.mean()) for one in made]
    assert means == pytest.approx([0.5, 5 / 7], abs=0.01)
    auto = objective(batch=256, timesteps={"shift": "auto"})
    assert auto.shift_of((1, 8, 16)) == dynamic_shift(8) > 1 and float(auto.noisy_batch(0, slots).sigma.mean()) > 0.55


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [("flow", None, 0.1), ("flow", 0.25, 0.25), ("flow", 0.0, 0), ("distill", None, 0), ("reflow", None, 0)],
)
def test_rate_of_dropped_captions(kind, given, wanted):
    """A tenth for images unless told otherwise, none for pairs; within a percent over 20,000 slots."""
    settings = {} if given is None else {"data": {"caption_dropout": given}}
    made = objective(kind, batch=2000, **settings)
    captions = [made.noisy_batch(step, np.arange(2000)).captions for step in range(10 if wanted else 1)]
    drops = torch.tensor([[caption == "" for caption in step] for step in captions]).float()
    assert float(drops.mean()) == pytest.approx(wanted, abs=0.01 if wanted else 0)
    if wanted:
        assert float(drops.mean(0).max()) < 0.85, "no slot is always dropped"


class Listening(PixelFlux):
    """The real family, remembering the text it was given."""

    heard: Conditioning

    def velocity(self, components, denoiser, noisy, sigma, text, guidance=None):
        self.heard = text
        return super().velocity(components, denoiser, noisy, sigma, text, guidance)


def test_dropped_captions_are_the_empty_prompt_entirely(digits):
    """Embeds, mask and pooled vector of '' together, one real token; other rows keep their caption."""
    model = build_model(recipe(data={"caption_dropout": 0.5}))
    model.family = Listening()
    task = objective(source=digits, data={"caption_dropout": 0.5}).noisy_batch(0, np.arange(16))
    whole = digits.draw(digits.slots(0, 0, 16)).captions
    assert 0 < task.captions.count("") < 16 and all(told in ("", own) for told, own in zip(task.captions, whole))
    with torch.no_grad():
        losses = objective(source=digits).loss(model, task)
        heard, empty, said = model.family.heard, model.encode([""]), model.encode(whole)
    for i, caption in enumerate(task.captions):
        expected = said if caption else empty
        real = int(heard.tokens.mask[i].sum())
        assert real == int(expected.tokens.mask[i if caption else 0].sum()) and (caption or real == 1)
        assert torch.equal(heard.tokens.embeds[i, :real], expected.tokens.embeds[i if caption else 0, :real])
        assert torch.equal(heard.vectors["pooled"][i], expected.vectors["pooled"][i if caption else 0])
    assert losses.shape == (16,) and losses.dtype == torch.float32


def test_validation_repeats_and_leaves_the_model_as_it_was(digits):
    """Same number whenever asked, whatever was trained between, in chunks or not; mode and gradients are untouched."""
    model = build_model(recipe())
    made = objective(source=digits)
    validate = Validator(made, 300, 256)
    model.root.train()
    first = validate(model)
    made.loss(model, made.noisy_batch(0, np.arange(8))).sum().backward()
    before = {n: p.grad.clone() for n, p in model.trainable().items()}
    assert validate(model) == first and model.root.training
    model.chunk = 7
    assert validate(model) == pytest.approx(first, rel=1e-5)
    model.chunk = 256
    assert all(torch.equal(p.grad, before[n]) for n, p in model.trainable().items())
    task = made.validation_batches(300, 300)[0]
    with torch.no_grad():
        losses = made.loss(model, task).double()
    assert first["val_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert first["val_loss_se"] == pytest.approx(standard_error(task.sigma.numpy(), losses.numpy(), task.image_ids), rel=1e-3)
    assert 0 < first["val_loss_se"] < float(losses.std()) / 300**0.5 * 1.2


@pytest.mark.parametrize(("images", "draws"), [(64, 64), (63, 63), (20, 256), (256, 256)])
def test_standard_error_against_many_repetitions(images, draws):
    """Of a mean whose sigmas are fixed and whose images may be drawn often, known by repeating it 2,000 times; within 15 %."""
    sigma = (np.arange(draws) + 0.5) / draws
    rng = np.random.default_rng(0)
    image = np.arange(draws) % images
    losses = 1 + 10 * sigma**2 + 0.5 * rng.standard_normal((2000, images))[:, image] + 0.2 * rng.standard_normal((2000, draws))
    truth, names = losses.mean(1).std(), [str(i) for i in image]
    found = np.array([standard_error(sigma, row, names) for row in losses[:300]])
    assert found.mean() == pytest.approx(truth, rel=0.15)
    naive = losses.std(1).mean() / draws**0.5
    assert images < draws or naive > 2 * truth, "the loss must depend strongly on sigma"


def test_standard_error_at_the_edges():
    """None for few images, however often drawn; no differences have no error; a scale passes through."""
    sigma = (np.arange(64) + 0.5) / 64
    assert standard_error(sigma, sigma, ["one"] * 64) is None and standard_error([0.5], [1.0], ["one"]) is None
    assert standard_error(sigma, np.arange(64), [str(i % 15) for i in range(64)]) is None
    names = [str(i) for i in range(64)]
    assert standard_error(sigma, np.full(64, 2.0), names) == pytest.approx(0, abs=1e-12)
    losses = np.random.default_rng(0).random(64)
    assert standard_error(sigma, 10 * losses, names) == pytest.approx(10 * standard_error(sigma, losses, names))


@every_kind
def test_huber_is_laid_over_each_sample_s_error(kind, digits):
    """And over that of validation, which is the same loss."""
    source, c = digits if kind == "flow" else Pairs(), 0.3
    model = build_model(recipe(kind))
    plain, other = objective(kind, source), objective(kind, source, train={"huber": c})
    batch = plain.noisy_batch(0, np.arange(8))
    with torch.no_grad():
        error, loss = plain.loss(model, batch), other.loss(model, batch)
    torch.testing.assert_close(loss, (error + c**2).sqrt() - c, rtol=1e-4, atol=1e-6)
    assert bool((loss != error).all())
