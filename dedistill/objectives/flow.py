"""Flow matching on data (arXiv 2210.02747): every sample with fresh noise, at a sigma of the recipe's density."""

import numpy as np
import torch
from torch import Tensor

from dedistill.data.source import Batch, needed
from dedistill.flow.path import interpolate, velocity
from dedistill.objectives.base import Draws, Objective


class Flow(Objective):
    name = "flow"

    def sample(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        shape = tuple(batch.latents.shape[1:])
        # an objective that needs a sample's own noise mixes it with that; another one would teach it nothing
        noise = needed(batch.noise) if "noise" in self.needs else draws.noise(shape)
        s = torch.from_numpy(draws.sigma(shape).astype(np.float32))
        return interpolate(batch.latents, noise, s), s, velocity(batch.latents, noise)
