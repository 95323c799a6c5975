"""Guidance distillation (arXiv 2210.03142): the student is fed a scale, and gives the base's guided velocity at once.

At scale 1 that is the base's own velocity, so where the base is exact the same network is best as under flow matching.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dedistill.data.source import Slot, Source, needed
from dedistill.flow.path import expand, flow_loss
from dedistill.flow.schedule import Schedule
from dedistill.models.model import Model
from dedistill.objectives.base import Draws, NoisyBatch, Objective
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import filled


class Guidance(Objective):
    name = "guidance"

    def __init__(
        self, recipe: Recipe, source: Source, shift_of: Callable[[tuple[int, ...]], float], schedule: Schedule | None = None
    ):
        super().__init__(recipe, source, shift_of, schedule)
        self.range = recipe.train.scales

    def asked(self, slots: list[Slot], draws: Draws, dropped: np.ndarray, told: np.ndarray) -> NoisyBatch:
        low, high = filled(self.range, "train.scales")
        scales = torch.from_numpy(low + (high - low) * draws.more()).float()
        return replace(super().asked(slots, draws, dropped, told), scales=scales)

    def loss(self, model: Model, batch: NoisyBatch) -> Tensor:
        noisy, sigma, text = batch.noisy.to(model.device), batch.sigma.to(model.device), batch.conditioning(model)
        scales = needed(batch.scales).to(model.device)
        negative = replace(model.encode([model.negative]).expand(len(text)), framing=text.framing)
        with torch.no_grad(), model.as_base():
            without = model.velocity(noisy, sigma, negative)
            guided = without + expand(scales, noisy) * (model.velocity(noisy, sigma, text) - without)
        return flow_loss(model.velocity(noisy, sigma, text, scales), guided, self.huber)
