"""Distilling to few steps: the mean velocity of a teacher between two stored points of its path, asked at the first."""

import numpy as np
import torch
from torch import Tensor

from dedistill.data.source import Batch, needed
from dedistill.errors import UserError
from dedistill.objectives.base import Draws, Objective


class Distill(Objective):
    """Of a student of as many steps as there are windows between the points."""

    name, needs = "distill", ("trajectory",)

    def sample(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        trajectory, points = needed(batch.trajectory), needed(batch.trajectory_sigmas)
        windows = trajectory.shape[1] - 1
        if windows < 1:
            raise UserError("data.path: these pairs store no trajectory points to distil from")
        k = np.minimum((draws.p * windows).astype(int), windows - 1)
        rows = torch.arange(len(k))
        here, there = trajectory[rows, k], trajectory[rows, k + 1]
        sigmas = torch.from_numpy(points.astype(np.float32))
        width = (sigmas[k + 1] - sigmas[k]).reshape(-1, 1, 1, 1)
        return here, sigmas[k], (there - here) / width
