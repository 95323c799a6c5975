"""From the slots of a step to one loss per sample.

Three objectives, one loop: they differ in where the noisy sample, sigma and target come from.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dedistill.assemble import Model
from dedistill.data.source import Batch, Source
from dedistill.errors import UserError
from dedistill.flow import keyed, timesteps
from dedistill.flow.loss import flow_loss
from dedistill.flow.path import interpolate, velocity
from dedistill.recipe import Recipe

CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Task:
    """What the network is asked: velocity at ``noisy`` [B, C, H, W], ``sigma`` [B], given captions."""

    noisy: Tensor
    sigma: Tensor
    target: Tensor
    captions: list[str]
    dropped: Tensor
    """[B] bool: the caption is replaced by the empty prompt."""
    names: list[str]


class Objective:
    """The questions of every step of a run, each a pure function of (seed, step, position)."""

    def __init__(self, recipe: Recipe, source: Source, tokens: int, dynamic_shift: float):
        t = recipe.timesteps
        self.kind, self.seed, self.batch, self.source = recipe.train.objective, recipe.run.seed, recipe.train.batch, source
        given = {k: getattr(t, k) for k in ("alpha", "beta", "mean", "std", "scale")}
        self.shift = t.resolved_shift(dynamic_shift)
        self.sampling = {
            "density": t.density,
            "params": {k: v for k, v in given.items() if v is not None},
            "shift": self.shift,
            "stratify": t.stratify,
        }
        self.stratify = t.stratify
        dropout = recipe.data.caption_dropout
        self.dropout = dropout if dropout is not None else (CAPTION_DROPOUT if self.kind == "flow" else 0.0)

    def task(self, step: int, positions: np.ndarray) -> Task:
        """The training task of ``positions`` in ``step``."""
        batch = self.source.draw(self.seed, step, positions, self.batch)
        dropped = keyed.uniforms(self.seed, "caption-dropout", step, self.batch)[positions] < self.dropout
        if self.kind == "distill":
            p = timesteps.probabilities(self.seed, "sigma", step, self.batch, self.stratify)[positions]
            return _window_task(batch, p, torch.from_numpy(dropped))
        noise = self._noise(batch, "noise", step, positions)
        sigma = timesteps.draw(self.seed, step, self.batch, **self.sampling)[positions]
        return _flow_task(batch, noise, sigma, torch.from_numpy(dropped))

    def held_out(self, count: int) -> Task:
        """A fixed task on held-out samples: sigmas in the middle of equal intervals, whatever the training density."""
        positions = np.arange(count)
        batch = self.source.draw(self.seed, 0, positions, count, held_out=True)
        p = timesteps.midpoints(self.seed, count)
        dropped = torch.zeros(count, dtype=torch.bool)
        if self.kind == "distill":
            return _window_task(batch, p, dropped)
        return _flow_task(batch, self._noise(batch, "validation/noise", 0, positions), p, dropped)

    def _noise(self, batch: Batch, purpose: str, step: int, positions: np.ndarray) -> Tensor:
        if self.kind == "reflow":  # the picture belongs to this very noise; another one would teach nothing
            return batch.noise
        return keyed.noise(self.seed, purpose, step, positions, tuple(batch.pixels.shape[1:]))


def _flow_task(batch: Batch, noise: Tensor, sigma: np.ndarray, dropped: Tensor) -> Task:
    s = torch.from_numpy(sigma.astype(np.float32))
    noisy = interpolate(batch.pixels, noise, s)
    return Task(noisy, s, velocity(batch.pixels, noise), batch.captions, dropped, batch.names)


def _window_task(batch: Batch, p: np.ndarray, dropped: Tensor) -> Task:
    """Mean velocity of the teacher between two stored points, asked at the first: a student of as many steps."""
    windows = batch.trajectory.shape[1] - 1
    if windows < 1:
        raise UserError("data.path: these pairs store no trajectory points to distil from")
    k = np.minimum((p * windows).astype(int), windows - 1)
    rows = torch.arange(len(k))
    here, there = batch.trajectory[rows, k], batch.trajectory[rows, k + 1]
    sigmas = torch.from_numpy(batch.trajectory_sigmas.astype(np.float32))
    width = (sigmas[k + 1] - sigmas[k]).reshape(-1, 1, 1, 1)
    return Task(here, sigmas[k], (there - here) / width, batch.captions, dropped, batch.names)


def task_loss(model: Model, task: Task) -> Tensor:
    """The loss of each sample [B], float32, on the model's device."""
    text = model.encode(task.captions)
    if task.dropped.any():
        text = text.where(task.dropped.to(model.device), model.encode([""]))
    predicted = model.velocity(task.noisy.to(model.device), task.sigma.to(model.device), text)
    return flow_loss(predicted, task.target.to(model.device))
