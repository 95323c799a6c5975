"""A diffusion model's own objective: the error of what it predicts, at the noise levels of its own schedule, all alike.

The same network through the same bridge as flow matching: that error is the velocity's times a weight
(flow.parameterization.own_weight), so what differs is where sigma is drawn and what a sample weighs.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from dedistill.data.source import Source
from dedistill.errors import UserError
from dedistill.flow.parameterization import min_snr_weight, own_weight
from dedistill.flow.schedule import Schedule
from dedistill.models.model import Model
from dedistill.objectives.base import NoisyBatch, Objective
from dedistill.recipe import Recipe


class Diffusion(Objective):
    name = "diffusion"

    def __init__(
        self, recipe: Recipe, source: Source, shift_of: Callable[[tuple[int, ...]], float], schedule: Schedule | None = None
    ):
        super().__init__(recipe, source, shift_of)
        self.schedule, self.min_snr = schedule, recipe.train.min_snr

    def loss(self, model: Model, batch: NoisyBatch) -> Tensor:
        schedule, sigma = _needed(model.components.schedule), batch.sigma.to(model.device, non_blocking=True)
        weight = own_weight(schedule.prediction, sigma)
        if self.min_snr is not None:
            weight = weight * min_snr_weight(schedule.prediction, sigma, self.min_snr)
        return super().loss(model, batch) * weight

    def sigmas(self, p: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return _needed(self.schedule).at(p)


def _needed(schedule: Schedule | None) -> Schedule:
    if schedule is None:
        raise UserError("train.objective: 'diffusion' is for models that were trained by diffusion; take 'flow'")
    return schedule
