"""Flow matching on data (arXiv 2210.02747): every sample with fresh noise, at a sigma of the recipe's density."""

import numpy as np
import torch
from torch import Tensor

from dedistill.data.source import Batch
from dedistill.flow.path import interpolate, velocity
from dedistill.objectives.base import Draws, Objective


class Flow(Objective):
    name = "flow"

    def noise(self, batch: Batch, draws: Draws) -> Tensor:
        """The noise [B, C, H, W] that each sample is mixed with."""
        return draws.noise(tuple(batch.latents.shape[1:]))

    def sample(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        noise, sigma = self.noise(batch, draws), draws.sigma(tuple(batch.latents.shape[1:]))
        s = torch.from_numpy(sigma.astype(np.float32))
        return interpolate(batch.latents, noise, s), s, velocity(batch.latents, noise)
