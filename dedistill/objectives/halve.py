"""Progressive distillation (arXiv 2202.00512): one step of the student where its teacher, the frozen base, takes two.

On data, at the sampler's own noise levels. For the next halving the merged student is the base, and sample.steps half as many.
"""

import numpy as np
import torch
from torch import Tensor

from dedistill.flow.path import expand, flow_loss
from dedistill.models.model import Model
from dedistill.objectives.base import NoisyBatch
from dedistill.objectives.grid import OnGrid


class Halve(OnGrid):
    name = "halve"

    def loss(self, model: Model, batch: NoisyBatch) -> Tensor:
        noisy, sigma, text = batch.noisy.to(model.device), batch.sigma.to(model.device), batch.conditioning(model)
        grid = self.grid(tuple(noisy.shape[1:]), 2 * self.steps)
        place = np.abs(grid[None, ::2] - batch.sigma.double().numpy()[:, None]).argmin(1)
        middle, end = (torch.from_numpy(grid[2 * place + i].astype(np.float32)).to(model.device) for i in (1, 2))
        with torch.no_grad(), model.as_base():
            first = model.velocity(noisy, sigma, text)
            second = model.velocity(noisy + expand(middle - sigma, noisy) * first, middle, text)
        share = expand((sigma - middle) / (sigma - end), noisy)
        return flow_loss(model.velocity(noisy, sigma, text), share * first + (1 - share) * second, self.huber)
