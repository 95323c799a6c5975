"""An objective that only this file knows is trained on, validated and reported like any other."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dedistill.cli.train import train
from dedistill.data.digits import load_digits
from dedistill.data.source import Batch
from dedistill.errors import UserError
from dedistill.flow.path import interpolate
from dedistill.models.model import Model, build_model
from dedistill.objectives import base
from dedistill.objectives.base import Draws, NoisyBatch, Objective, objective_for
from dedistill.recipe import Recipe, load_recipe, schema
from dedistill.recipe.objectives import OBJECTIVES, Traits

C = 0.1


class PseudoHuber(Objective):
    """Flow matching whose outliers count for less, asked at the noisier half of the path."""

    name = "pseudo_huber"

    def sample(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        noise, sigma = draws.noise(tuple(batch.latents.shape[1:])), torch.from_numpy(0.5 + draws.p / 2).float()
        return interpolate(batch.latents, noise, sigma), sigma, noise - batch.latents

    def loss(self, model: Model, batch: NoisyBatch) -> Tensor:
        off = model.velocity(batch.noisy, batch.sigma, batch.conditioning(model)) - batch.target
        return ((off.square() + C**2).sqrt() - C).flatten(1).mean(1)


def named(recipe: Recipe, objective: str) -> Recipe:
    """``recipe`` with another objective, whether or not recipes may say so."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"objective": objective})})


@pytest.fixture
def recipe(adapter_recipe, monkeypatch) -> Recipe:
    monkeypatch.setitem(OBJECTIVES, "pseudo_huber", Traits("Pseudo-Huber"))
    return named(load_recipe(adapter_recipe, ["data.caption_dropout=0.0"]), "pseudo_huber")


def test_it_trains_and_validates_by_its_own_loss(recipe, capsys):
    assert train(recipe, []) == 0
    out = Path(recipe.run.out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    model = build_model(recipe)
    objective = objective_for(recipe, load_digits(recipe.data.caption_noise), model.shift)
    assert type(objective) is PseudoHuber
    with torch.no_grad():
        batch = objective.noisy_batch(0, np.arange(recipe.train.batch))
        assert rows[0]["loss"] == pytest.approx(float(objective.loss(model, batch).mean()), rel=1e-5)
        (held_out,) = objective.validation_batches(recipe.validate_.samples, 256)
        assert rows[0]["val_loss_start"] == pytest.approx(float(objective.loss(model, held_out).mean()), rel=1e-5)
    assert 0.5 < rows[0]["sigma_mean"] < 1 and float(held_out.sigma.min()) > 0.5
    assert len(rows) == 6 and rows[-1]["val_loss"] < rows[0]["val_loss_start"]
    assert json.loads((out / "plan.json").read_text())["effects"]["objective"] == "pseudo_huber"
    assert "Pseudo-Huber of pixel_flux on digits" in capsys.readouterr().err


def test_recipes_know_the_objectives():
    """Each is a file and a class of its name, and what it needs goes with what the recipe says of it."""
    digits = load_digits(0.0)
    assert get_args(schema.Train.model_fields["objective"].annotation) == tuple(OBJECTIVES)
    for name, traits in OBJECTIVES.items():
        assert Path(base.__file__).with_name(f"{name}.py").is_file()
        made = objective_for(named(load_recipe("dedistill:digits/teacher"), name), digits, lambda _: 1.0)
        assert made.name == name and bool(made.needs) == traits.pairs


@pytest.mark.parametrize(("name", "needed"), [("distill", "trajectory"), ("reflow", "noise")])
def test_a_source_without_what_is_needed_is_refused(name, needed):
    objective = objective_for(named(load_recipe("dedistill:digits/teacher"), name), load_digits(0.0), lambda _: 1.0)
    for ask in (lambda: objective.noisy_batch(0, np.arange(2)), lambda: objective.validation_batches(2, 2)):
        with pytest.raises(UserError, match=f"'{name}' needs the {needed} of every sample, which 'digits' does not have"):
            ask()
