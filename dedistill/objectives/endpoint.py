"""One-step distillation as InstaFlow does it (arXiv 2309.06380): from pure noise straight to the stored image.

|x0 that one Euler step reaches - image|^2 is the error of the velocity at sigma = 1: reflow asked nowhere else.
"""

import torch
from torch import Tensor

from dedistill.data.source import Batch, needed
from dedistill.flow.path import velocity
from dedistill.objectives.base import Draws, Objective


class Endpoint(Objective):
    name, needs = "endpoint", ("noise",)

    def sample(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        noise = needed(batch.noise)
        return noise, torch.ones(len(noise)), velocity(batch.latents, noise)
