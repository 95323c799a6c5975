"""What is measured of every model of the laboratory: the same held-out samples, prompts and noise for all."""

from dataclasses import dataclass

import numpy as np

from dedistill.data.source import Source
from dedistill.evaluation.judges import DigitJudge
from dedistill.evaluation.meters import path_numbers
from dedistill.evaluation.numbers import image_numbers
from dedistill.evaluation.validation import held_out_meters
from dedistill.flow.guidance import ClassifierFree
from dedistill.flow.solvers import sigma_grid
from dedistill.models.model import Model
from dedistill.objectives.base import objective_for
from dedistill.recipe import Recipe
from dedistill.sampling.sampler import Sampling, sample, start_noise, trajectories

STEPS = 16
SCALES = (1, 2, 4)


@dataclass(frozen=True)
class Examiner:
    """recipe: of the data that held-out samples come from, whatever a model was trained on."""

    recipe: Recipe
    source: Source
    judge: DigitJudge
    prompts: list[str]
    held_out: int

    def losses(self, model: Model) -> dict[str, float]:
        """loss and guidance gap on held-out samples."""
        batches = objective_for(self.recipe, self.source, model.shift).validation_batches(self.held_out, model.chunk)
        found = held_out_meters(model, batches, 8)
        return {key: float(found[key].value[0]) for key in ("loss", "guidance")}

    def images(self, model: Model, cfg: float, *, steps: int = STEPS, length: int | None = None) -> dict[str, float]:
        """accuracy, frechet, precision, recall, saturated of images at one scale."""
        noise = start_noise(0, len(self.prompts), model.components.sample_shape)
        made = sample(model, self.prompts, noise, Sampling(steps=steps, guidance=ClassifierFree(cfg)), length=length)
        numbers = {"accuracy": float(np.mean(self.judge.correct(made, self.prompts)))} | self.judge.numbers(made)
        return numbers | {"saturated": float(image_numbers(made)["saturated"].mean())}

    def all(self, model: Model, scales: tuple[int, ...] = SCALES) -> dict[str, float]:
        """losses, and images with the scale behind each name: ``frechet_2``."""
        found = self.losses(model)
        for cfg in scales:
            found |= {f"{key}_{cfg}": value for key, value in self.images(model, cfg).items()}
        return found

    def paths(self, model: Model, cfg: float = 1.0) -> dict[str, float]:
        """straightness of the paths, and Frechet distances in one step and in 16."""
        noise, sigmas = start_noise(0, len(self.prompts), model.components.sample_shape), sigma_grid(32, model.grid_shift)
        how = Sampling(steps=32, guidance=ClassifierFree(cfg))
        found = [path_numbers(states, sigmas)[:2] for states in trajectories(model, self.prompts, noise, how)]
        chord, curvature = (np.concatenate(part) for part in zip(*found))
        one, many = (self.images(model, cfg, steps=steps) for steps in (1, STEPS))
        straightness = float((curvature @ -np.diff(sigmas)).sum() / chord.sum())
        return {"straightness": straightness, "frechet_one": one["frechet"], "frechet_16": many["frechet"]}
