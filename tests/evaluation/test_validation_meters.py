"""Meters of distillation while training: what they say, when they come, and that they change nothing."""

import json

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_objective import recipe as made_recipe
from test_run import run, same, weights

from dedistill.data.digits import load_digits
from dedistill.evaluation.meters import path_meters
from dedistill.evaluation.validation import FEW, Meters, held_out_meters
from dedistill.flow import keyed
from dedistill.flow.path import implied_noise
from dedistill.models.model import Model, build_model
from dedistill.objectives.base import Objective, objective_for
from dedistill.sampling.sampler import Sampling
from dedistill.train import main

KEYS = ("guidance_gap", "straightness", "few_step_gap")


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_meters_come_when_asked_and_disturb_nothing(adapter_recipe, tmp_path):
    """Before the first step, every N, and at the end; the run is the same without them."""
    measured = run(adapter_recipe, tmp_path / "a", "meters.every=4", "meters.samples=6", "meters.steps=3")
    plain = run(adapter_recipe, tmp_path / "b")
    assert same(weights(measured), weights(plain))
    found = rows(measured)
    assert [r["step"] for r in found if "guidance_gap" in r] == [4, 6]
    assert [r["step"] for r in found if "guidance_gap_start" in r] == [1]
    stripped = [{k: v for k, v in r.items() if not k.startswith(KEYS)} for r in found]
    assert stripped == rows(plain)
    assert all(r[key] > 0 for r in found if "guidance_gap" in r for key in KEYS)
    still = rows(run(adapter_recipe, tmp_path / "c", "meters.every=1", "meters.samples=4", "train.lr=1e-30", "train.steps=2"))
    for key in KEYS:
        assert still[0][key] == still[1][key] == still[0][f"{key}_start"], "the same questions every time"


@pytest.fixture(scope="module")
def digits() -> tuple[Model, Objective]:
    made = made_recipe()
    model = build_model(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # velocities of a fresh network are zero
        for parameter in model.root.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, objective_for(made, load_digits(0.2), model.shift)


def test_the_numbers_are_those_of_the_tool(digits):
    """The same meters as dedistill measure, on the samples' own captions and noise."""
    model, objective = digits
    found = Meters(objective, 12, Sampling(steps=5), 12)(model)
    (task,) = objective.validation_batches(12, 12)
    noise = implied_noise(task.noisy, task.sigma, task.target)
    torch.testing.assert_close(
        noise, keyed.noise(objective.seed, "validation/noise", 0, range(12), (1, 8, 16)), atol=1e-6, rtol=0
    )
    paths = path_meters(model, task.captions, noise, Sampling(steps=5), few=(FEW,))
    assert found["straightness"] == pytest.approx(paths["straightness"].value[0], rel=1e-5)
    assert found["few_step_gap"] == pytest.approx(paths["few_steps"].value[0], rel=1e-4)
    assert found["guidance_gap"] == pytest.approx(held_out_meters(model, [task], 4)["guidance"].value[0], rel=1e-6)
    assert model.root.training


def test_batches_do_not_matter(digits):
    model, objective = digits
    whole, parts = (Meters(objective, 10, Sampling(steps=4), size)(model) for size in (10, 3))
    np.testing.assert_allclose([*whole.values()], [*parts.values()], rtol=1e-4)


def test_several_processes_say_the_same(adapter_recipe, tmp_path):
    """With train.exact the rows of two and of three processes are those of one, to the bit."""
    settings = ["meters.every=2", "meters.samples=5", "meters.steps=3", "train.steps=2", "train.exact=true", "train.batch=4"]
    found = []
    for size in (1, 3):
        out = tmp_path / str(size)
        arguments = [str(adapter_recipe), "--debug", *(a for s in (f"run.out={out}", *settings) for a in ("--set", s))]
        assert run_ranks(size, main, arguments, said=tmp_path / f"said-{size}") == [0] * size
        found.append(rows(out))
    assert found[0] == found[1] and "straightness" in found[0][-1]
